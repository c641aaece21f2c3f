#!/usr/bin/env python3
"""Decode at depth on a GPU: paged and exact against the best of stock llama.cpp, cold pages on the device or in RAM.

    python scripts/bench_cuda.py [--shapes tinyllama,8b] [--depths 8192,32768,131072] [--json FILE]

Needs `python -m monarch_llamacpp build --cuda`. First the GPU's logits are compared with the CPU's, then times are
taken: every arm is a process of its own, and arms take turns. Depths are filled by restoring the same synthetic state
in every arm. "Added time" is what depth adds to a token: t(depth) - t(0).
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_cpu import Arm, measure, milliseconds, run_child, synthetic  # noqa: E402

from monarch_llamacpp import info  # noqa: E402

ALL_LAYERS = 999
STOCK = [Arm(f"stock {kind} -fa 1", kv_type=kind) for kind in ("f16", "q8_0", "q4_0")]
PATCHED = [Arm(mode, patched=True, mode=mode, cold_tier="device") for mode in ("exact", "paged")]
PATCHED += [Arm("paged ram", patched=True, mode="paged", cold_tier="ram")]
CHECK_DEPTH, CHECK_TOKENS = 4096, 16
NMSE_MAX = 1e-4


def run(
    arm: Arm, model: Path, depth: int, n_gen: int, n_gpu_layers: int = ALL_LAYERS, logits: Path | None = None
) -> dict[str, Any]:
    config = {
        "patched": arm.patched, "model": str(model), "depth": depth, "n_gen": n_gen, "n_prompt": 0,
        "type": arm.kv_type, "flash_attn": arm.flash_attn, "v_trans": False, "fill": "state",
        "n_threads": os.cpu_count(), "n_gpu_layers": n_gpu_layers, "logits": str(logits) if logits else None,
    }  # fmt: skip
    row = run_child(arm, config, {"MONARCH_COLD_TIER": arm.cold_tier})  # device: refused where it would be the CPU's
    if arm.cold_tier == "ram" and n_gpu_layers and not row["stats"]["frame_bytes"]:
        raise SystemExit(f"{arm.name} has no frames: the CPU attended its pages")
    return row


def difference(arm: Arm, model: Path, folder: Path) -> float:
    """NMSE of the GPU's logits against the CPU's, on the same restored state and the same tokens."""
    logits = []
    for n_gpu_layers in (0, ALL_LAYERS):
        file = folder / f"{n_gpu_layers}.npy"
        run(arm, model, CHECK_DEPTH, CHECK_TOKENS, n_gpu_layers, file)
        logits.append(np.load(file).astype(np.float64))
    return float(np.square(logits[1] - logits[0]).sum() / np.square(logits[0]).sum())


def check(model: Path) -> bool:
    """Weights are multiplied otherwise on a GPU: paging may add nothing to what stock differs by."""
    with tempfile.TemporaryDirectory() as folder:
        stock, *paged = (difference(arm, model, Path(folder)) for arm in (STOCK[0], *PATCHED))
    allowed = max(NMSE_MAX, 2 * stock)
    for arm, value in zip(PATCHED, paged, strict=True):
        print(f"GPU against CPU: {arm.name} NMSE {value:.1e} (stock {stock:.1e}, at most {allowed:.1e})")
    return max(paged) <= allowed


def report(depth: int, rows: dict[str, list[dict[str, Any]]], best_at_0: float) -> float:
    """Prints the depth's lines; returns the best stock time."""
    times = {name: milliseconds(part) for name, part in rows.items()}
    best = min(times[arm.name] for arm in STOCK)
    stock_bytes = rows[STOCK[0].name][0]["device_bytes"]
    for name, time in times.items():
        line = f"{depth:>7} {name:<16} {time:7.2f} ms {1e3 / time:7.1f} tok/s {best / time:5.2f} x stock"
        if best > best_at_0 > 0:
            removed = 1 - (time - best_at_0) / (best - best_at_0)
            line += f"  added {time - best_at_0:6.2f} ms, of stock's removed {removed:5.2f}"
        device_bytes = rows[name][0]["device_bytes"]
        share = device_bytes / max(stock_bytes, 1)
        line += f"  context on the device {device_bytes / 2**20:6.0f} MiB, {share:5.2f} x stock f16"
        print(line + frames_text(rows[name][0].get("stats") or {}))
    return best


def frames_text(stats: dict[str, Any]) -> str:
    """How often a promoted page was in a frame."""
    if not stats.get("frame_bytes") or not stats["n_promotions"]:
        return ""
    return f", {stats['n_frame_hits'] / stats['n_promotions']:.0%} of promoted pages in frames"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="tinyllama,8b")
    parser.add_argument("--depths", default="8192,32768,131072", help="besides 0")
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--n-gen", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write every row")
    args = parser.parse_args()

    if "CUDA" not in info.collect()["backends"]:
        raise SystemExit("the library was built without CUDA: run `python -m monarch_llamacpp build --cuda`")

    is_right = check(synthetic("tinyllama"))
    written: list[dict[str, Any]] = []
    for shape in args.shapes.split(","):
        best_at_0, model = 0.0, synthetic(shape)
        print(shape)
        for depth in [0, *map(int, args.depths.split(","))]:
            run_arm = partial(run, model=model, depth=depth, n_gen=args.n_gen)
            rows = measure(f"{shape} at {depth}", [*STOCK, *PATCHED], args.reps, run_arm)
            written += [row | {"shape": shape} for part in rows.values() for row in part]
            best = report(depth, rows, best_at_0)
            best_at_0 = best_at_0 or best
            if args.json:
                args.json.write_text("".join(json.dumps(row) + "\n" for row in written))
    if not is_right:
        raise SystemExit("the GPU's logits are not the CPU's: the times above mean nothing")


if __name__ == "__main__":
    main()
