"""One arm in a process of its own: what its cache holds, whether it pages, and how long a user waits.

Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .ab_arms import Arm
from .ab_child import Report, check_activity, kv_bytes, make_parser, open_model, read_stats, run_child, run_main
from .ab_lab import Lab
from .ab_rows import Row
from .device import free_vram

if TYPE_CHECKING:
    import llama_cpp

N_UBATCH = 512
_N_POINTS = 64  # of the timeline
_LEAST = ("peak_rss_bytes", "vram_bytes", "first_token_s")


def run_probes(lab: Lab) -> None:
    """Memory, latency and paging at the greatest depth."""
    facts = {"n_tokens": lab.settings.probe_tokens, "n_gen": lab.settings.n_gen}
    jobs = [(arm, receipt) for arm in lab.arms for taken, receipt in [lab.take("memory", arm, **facts)] if not taken]
    part = lab.part("memory", sum(len(arm.flash_attn) for arm, _ in jobs))
    for arm, receipt in jobs:
        with lab.attempt(arm, "memory"):
            reports = {}
            for flash_attn in arm.flash_attn:
                part.next(f"{arm.name}, -fa {flash_attn}")
                reports[flash_attn] = _run(lab, arm, flash_attn, facts)
            lab.rows.put([_row(arm, reports) | {"receipt": receipt}])


def _run(lab: Lab, arm: Arm, flash_attn: int, facts: Mapping[str, int]) -> Report:
    options = ["--tokens", facts["n_tokens"], "--generate", facts["n_gen"]]
    report = run_child(arm, __name__, [lab.settings.model, *options], flash_attn, lab.settings)
    check_activity(arm, report["stats"])
    return report


def _row(arm: Arm, reports: Mapping[int, Report]) -> Row:
    """Of the setting of the faster tokens; what the other one does better counts, too."""
    flash_attn, best = min(reports.items(), key=lambda item: statistics.median(item[1]["token_ms"]))
    least = {name: min(report[name] for report in reports.values()) for name in _LEAST}
    held = {"type_kv": arm.type_kv, "flash_attn": flash_attn, "knobs": arm.knob_values}
    return {"row": "memory", "arm": arm.name, **held, **best, **least}


# in the child


def _measure(args: argparse.Namespace) -> Report:
    free_before = free_vram()
    llm = open_model(args, args.tokens + args.generate + 1, N_UBATCH)
    tokens = _random_tokens(llm, args.tokens)
    timeline = [_point(llm)]
    start = time.perf_counter()
    for i in range(0, len(tokens), N_UBATCH):
        llm.eval(tokens[i : i + N_UBATCH])
        timeline.append(_point(llm))
    llm.eval([llm.sample(temp=0)])
    first = time.perf_counter() - start
    latencies = _decode(llm, args.generate, timeline)
    stats = read_stats(llm)
    sizes = {"n_tokens": llm.n_tokens, "kv_bytes": kv_bytes(llm, stats), "peak_rss_bytes": _peak_rss()}
    sizes |= {"vram_bytes": free_before - free_vram()}
    times = {"first_token_s": first, "token_ms": latencies}
    return sizes | times | {"stats": stats, "timeline": timeline}


def _decode(llm: llama_cpp.Llama, n: int, timeline: list[list[int]]) -> list[float]:
    """Milliseconds of each token."""
    latencies = []
    for i in range(n):
        start = time.perf_counter()
        llm.eval([llm.sample(temp=0)])
        latencies.append(round(1e3 * (time.perf_counter() - start), 3))
        if i % max(1, n // _N_POINTS) == 0:
            timeline.append(_point(llm))
    return latencies


def _point(llm: llama_cpp.Llama) -> list[int]:
    """Tokens held, hot, promoted and sticky (a mean over layers and KV heads), cold; bytes."""
    stats = read_stats(llm)
    if stats is None:
        return [llm.n_tokens, llm.n_tokens, 0, 0, 0, kv_bytes(llm, None)]
    page = llm.knobs().page_size
    promoted, sticky = (round(stats[name] * page / stats["n_places"]) for name in ("n_promoted", "n_sticky"))
    return [llm.n_tokens, stats["n_hot"], promoted, sticky, stats["n_cold"], stats["kv_bytes"]]


def _peak_rss() -> int:
    """Of this process, weights and Python included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _random_tokens(llm: llama_cpp.Llama, n: int) -> list[int]:
    """As llama-bench does."""
    rng = random.Random(0)
    return [rng.randrange(llm.n_vocab()) for _ in range(n)]


def main() -> int:
    parser = make_parser()
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--generate", type=int, required=True)
    return run_main(_measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
