"""One arm in a process of its own: what its cache holds, whether it pages, and what it recalls.

llama-bench cannot print the counters of the paged cache, so this run stands for it: the same library, knobs and depth.
Prints one line of JSON. LLAMA_CPP_LIB_PATH and MONARCH_* choose the arm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ab_arms import Arm
from .errors import MonarchError
from .recall import MODEL_NAME
from .recall_text import Haystack, Needle, make_haystack

if TYPE_CHECKING:
    import llama_cpp

N_UBATCH = 512
N_NEEDLES = 10
LEAST_RECALL_TOKENS = 1024
_ROOM = 64  # for a question and its answer
_N_DECODE = 4

Report = dict[str, Any]


def run_probe(arm: Arm, model: Path, n_tokens: int, n_threads: int | None) -> Report:
    command = [sys.executable, "-m", __name__, str(model), "--build", arm.build, "--tokens", str(n_tokens)]
    command += ["--threads", str(n_threads)] if n_threads else []
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=arm.environment())
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"it ended with status {result.returncode}"]
        raise MonarchError(f"arm {arm.name}: {lines[-1].removeprefix('error: ')}")
    report = json.loads(result.stdout.splitlines()[-1])
    check_activity(arm, report["stats"])
    return report


def check_activity(arm: Arm, stats: Report | None) -> None:
    """An arm that did not do what its name says is no measurement."""
    if problem := _contradiction(arm, stats):
        raise MonarchError(f"arm {arm.name} does not do what its name says: {problem}")


def _contradiction(arm: Arm, stats: Report | None) -> str | None:
    if (stats is not None) != arm.pages:
        return f"paging is {'off' if stats is None else 'on'}"
    if stats is None:
        return None
    if stats["mode"] != arm.knobs.mode:
        return f"it ran in mode {stats['mode']}"
    if stats["n_cold"] == 0:
        return None  # everything is hot: nothing to page, which the report says
    if arm.knobs.mode == "window" and stats["n_promotions"]:
        return f"{stats['n_promotions']} pages were promoted"
    if arm.knobs.mode == "paged" and not stats["n_promotions"]:
        return f"no page of {stats['n_cold']} cold tokens was promoted: see promote_tokens, promotion_threshold"
    n_places = stats["n_layer"] * stats["n_head_kv"]
    # the newest page may have left the hot window in this very step
    if arm.knobs.mode == "exact" and stats["n_promoted"] < (stats["n_pages"] - 1) * n_places:
        return f"it attended {stats['n_promoted']} of {stats['n_pages'] * n_places} cold pages"
    return None


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--build", choices=("stock", "patched"), required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def _open_model(args: argparse.Namespace) -> llama_cpp.Llama:
    if args.build == "patched":
        from .llama import Llama
    else:
        from llama_cpp import Llama
    options = {"n_ctx": args.tokens + _ROOM, "n_batch": N_UBATCH, "n_ubatch": N_UBATCH, "verbose": False}
    return Llama(args.model, n_threads=args.threads, n_threads_batch=args.threads, **options)


def _read_stats(llm: llama_cpp.Llama) -> Report | None:
    """None where paging is off."""
    if not hasattr(llm, "stats"):
        return None
    try:
        stats = llm.stats()
    except MonarchError:
        return None
    return dataclasses.asdict(stats) | {"kv_bytes": stats.kv_bytes}


def _kv_bytes(llm: llama_cpp.Llama, stats: Report | None) -> int:
    """Of upstream's cache: what it would save, K and V of the tokens held and a few bytes for each cell."""
    from llama_cpp import llama_state_seq_get_size

    return stats["kv_bytes"] if stats else llama_state_seq_get_size(llm.ctx, 0)


def _make_haystack(llm: llama_cpp.Llama, n_tokens: int) -> Haystack | None:
    """None for any model but the recall model, and where the depth is too short to hide anything in."""
    if llm.metadata.get("general.name") != MODEL_NAME or n_tokens < LEAST_RECALL_TOKENS:
        return None
    return make_haystack(n_tokens, N_NEEDLES)


def _ask(llm: llama_cpp.Llama, haystack: Haystack, needle: Needle) -> bool:
    llm.n_tokens = len(haystack.tokens)  # eval() forgets what comes after
    llm.eval(needle.question_tokens())
    for expected in needle.answer_tokens():
        token = llm.sample(temp=0)
        if token != expected:
            return False
        llm.eval([token])
    return True


def _random_tokens(llm: llama_cpp.Llama, n: int) -> list[int]:
    """As llama-bench does."""
    rng = random.Random(0)
    return [rng.randrange(llm.n_vocab()) for _ in range(n)]


def _decode_some(llm: llama_cpp.Llama) -> None:
    for _ in range(_N_DECODE):
        llm.eval([llm.sample(temp=0)])


def _measure(llm: llama_cpp.Llama, n_tokens: int) -> Report:
    haystack = _make_haystack(llm, n_tokens)
    llm.eval(haystack.tokens if haystack else _random_tokens(llm, n_tokens))
    _decode_some(llm)
    stats = _read_stats(llm)
    report = {"n_tokens": llm.n_tokens, "kv_bytes": _kv_bytes(llm, stats), "stats": stats, "needles": None}
    if haystack:
        report["needles"] = [_ask(llm, haystack, needle) for needle in haystack.needles]
    return report


def main() -> int:
    args = _parse_args()
    try:
        print(json.dumps(_measure(_open_model(args), args.tokens)))
    except (MonarchError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
