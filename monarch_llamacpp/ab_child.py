"""For processes that run one arm: LLAMA_CPP_LIB_PATH and MONARCH_* choose library and knobs.

The parent's side is run_child() and check_activity(); everything below them is the child's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .ab_arms import Arm
from .ab_settings import Settings
from .errors import MonarchError

if TYPE_CHECKING:
    import llama_cpp

Report = dict[str, Any]


def run_child(arm: Arm, module: str, args: Sequence[object], flash_attn: int, settings: Settings) -> Report:
    """What the module prints as its last line; what it says on stderr last, where it fails."""
    command = [sys.executable, "-m", module, *map(str, args), "--build", arm.build, "--type-kv", arm.type_kv]
    command += ["--flash-attn", str(flash_attn), "--n-gpu-layers", str(settings.n_gpu_layers)]
    command += ["--threads", str(settings.n_threads)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=arm.environment())
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"it ended with status {result.returncode}"]
        raise MonarchError(f"arm {arm.name}: {lines[-1].removeprefix('error: ')}")
    return json.loads(result.stdout.splitlines()[-1])


def check_activity(arm: Arm, stats: Report | None, n_step: int = 1) -> None:
    """An arm that did not do what its name says is no measurement; its last step was of n_step tokens."""
    if problem := _contradiction(arm, stats, n_step):
        raise MonarchError(f"arm {arm.name} does not do what its name says: {problem}")


def _contradiction(arm: Arm, stats: Report | None, n_step: int) -> str | None:
    if (stats is not None) != arm.pages:
        return f"paging is {'off' if stats is None else 'on'}"
    if stats is None:
        return None
    mode = arm.knobs.mode
    if stats["mode"] != mode and mode != "auto":
        return f"it ran in mode {stats['mode']}"
    if stats["n_cold"] == 0:
        return None  # everything is hot: nothing to page, which the report says
    # those that left the hot window in this very step could not be promoted in it
    n_new = n_step // arm.knobs.page_size
    if mode == "window" and stats["n_promotions"]:
        return f"{stats['n_promotions']} pages were promoted"
    if mode == "paged" and not stats["n_promotions"] and stats["n_pages"] > n_new:
        return f"no page of {stats['n_cold']} cold tokens was promoted: see promote_tokens, promotion_threshold"
    n_places = stats["n_places"]
    if mode == "exact" and stats["n_promoted"] < (stats["n_pages"] - n_new - 1) * n_places:
        return f"it attended {stats['n_promoted']} of {stats['n_pages'] * n_places} cold pages"
    return None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--build", choices=("stock", "patched"), required=True)
    parser.add_argument("--type-kv", default="f16")
    parser.add_argument("--flash-attn", type=int, default=0)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--n-gpu-layers", type=int, default=-1)
    return parser


def open_model(args: argparse.Namespace, n_ctx: int, n_ubatch: int) -> llama_cpp.Llama:
    if args.build == "patched":
        from .llama import Llama, llama_cpp
    else:
        import llama_cpp
        from llama_cpp import Llama
    options = {"n_ctx": n_ctx, "n_batch": n_ubatch, "n_ubatch": n_ubatch, "n_gpu_layers": args.n_gpu_layers}
    type_kv = getattr(llama_cpp, f"GGML_TYPE_{args.type_kv.upper()}")
    options |= {"type_k": type_kv, "type_v": type_kv, "flash_attn": bool(args.flash_attn)}
    return Llama(args.model, n_threads=args.threads, n_threads_batch=args.threads, verbose=False, **options)


def read_stats(llm: llama_cpp.Llama) -> Report | None:
    """None where paging is off."""
    if not hasattr(llm, "stats"):
        return None
    try:
        return llm.stats().with_sums()
    except MonarchError:
        return None


def kv_bytes(llm: llama_cpp.Llama, stats: Report | None) -> int:
    """Of upstream's cache: what it would save, K and V of the tokens held and a few bytes for each cell."""
    from llama_cpp import llama_state_seq_get_size

    return stats["kv_bytes"] if stats else llama_state_seq_get_size(llm.ctx, 0)


def run_main(measure: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> int:
    try:
        print(json.dumps(measure(args)))
    except (MonarchError, ValueError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
