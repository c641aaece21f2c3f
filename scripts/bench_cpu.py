#!/usr/bin/env python3
"""Decode and prefill at depth: paged and exact against the best of stock llama.cpp, on this machine's CPU.

    python scripts/bench_cpu.py [--shape tinyllama|8b|tiny] [--depths 2048,8192,32768] [--json FILE]

Needs `python -m monarch_llamacpp build`, for --check with --tools; its model stays in the cache folder (0.6 GB, 4.5
for 8b). Every arm and repetition is a process of its own, and arms take turns. Depths are filled by restoring the same
synthetic state in every arm; --check shows at 8192 that a filled cache and a prefilled one decode at the same speed,
and what llama-bench says there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import synth_model  # noqa: E402

from monarch_llamacpp import library, paths  # noqa: E402


@dataclass(frozen=True)
class Arm:
    name: str
    patched: bool = False
    kv_type: str = "f16"
    flash_attn: bool = True
    mode: str = "off"
    cold_tier: str = "auto"


STOCK = [
    Arm("stock f16 -fa 0", flash_attn=False),
    Arm("stock f16 -fa 1"),
    Arm("stock q8_0 -fa 1", kv_type="q8_0"),
    Arm("stock q4_0 -fa 1", kv_type="q4_0"),
]
PATCHED = [Arm(mode, patched=True, mode=mode) for mode in ("auto", "exact", "paged")]


def environment(arm: Arm) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MONARCH") or "CACHE" in name}
    lib_dir = library.patched_dir() if arm.patched else library.stock_dir()
    return kept | {"LLAMA_CPP_LIB_PATH": str(lib_dir), "MONARCH_MODE": arm.mode}


def check_counters(arm: Arm, stats: dict, depth: int) -> None:
    """Paged that promotes nothing would be fast too."""
    if depth > 2048 and (stats["n_cold"] < depth / 2 or (arm.mode == "paged" and not 0 < stats["n_promoted"])):
        raise SystemExit(f"{arm.name} at {depth}: {stats['n_cold']} cold tokens, {stats['n_promoted']} pages promoted")


def run(arm: Arm, model: Path, args: argparse.Namespace, depth: int, fill: str = "state") -> dict[str, Any]:
    config = {
        "patched": arm.patched, "model": str(model), "depth": depth, "n_gen": args.n_gen,
        "n_prompt": args.n_prompt if depth < 65536 else 0, "n_threads": args.threads, "type": arm.kv_type,
        "flash_attn": arm.flash_attn, "v_trans": not arm.patched, "fill": fill, "n_gpu_layers": 0, "logits": None,
    }  # fmt: skip
    return run_child(arm, config) | {"fill": fill}


def run_child(arm: Arm, config: dict[str, Any], env: dict[str, str] | None = None) -> dict[str, Any]:
    depth = config["depth"]
    command = [sys.executable, str(ROOT / "scripts" / "bench_child.py"), json.dumps(config)]
    result = subprocess.run(command, env=environment(arm) | (env or {}), capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{arm.name} at {depth}: {result.stderr.strip().splitlines()[-1]}")
    row = json.loads(result.stdout)
    if arm.patched:
        check_counters(arm, row["stats"], depth)
    return row | {"arm": arm.name, "depth": depth}


def milliseconds(rows: list[dict]) -> float:
    """Of a token."""
    return statistics.median([ms for row in rows for ms in row["tokens_ms"]])


def tokens_per_second(rows: list[dict]) -> float:
    return 1e3 / milliseconds(rows)


def prompt_per_second(rows: list[dict], n_prompt: int) -> float:
    times = [row["prompt_ms"] for row in rows if row["prompt_ms"]]
    return 1e3 * n_prompt / min(times) if times else float("nan")


def measure(title: str, arms: list[Arm], reps: int, run_arm: Callable[[Arm], dict]) -> dict[str, list[dict]]:
    """Each arm's rows; arms take turns."""
    rows: dict[str, list[dict]] = {}
    for _ in range(reps):
        for arm in arms:
            print(f"{title}: {arm.name}", file=sys.stderr, flush=True)
            rows.setdefault(arm.name, []).append(run_arm(arm))
    return rows


def report(depth: int, rows: dict[str, list[dict]], args: argparse.Namespace, stock_at_0: float) -> float:
    """Prints the depth's lines and returns the best stock speed."""
    speed = {name: tokens_per_second(part) for name, part in rows.items()}
    prompt = {name: prompt_per_second(part, args.n_prompt) for name, part in rows.items()}
    best = max(speed[arm.name] for arm in STOCK)
    best_prompt = max(prompt[arm.name] for arm in STOCK)
    for name in rows:
        print(
            f"{depth:>7} {name:<17} {speed[name]:7.1f} tok/s  {speed[name] / best:6.2f} x stock"
            f"  {speed[name] / (stock_at_0 or best):5.2f} x stock at 0"
            f"  prompt {prompt[name]:7.1f} tok/s {prompt[name] / best_prompt:6.2f} x{memory_text(rows[name][0])}"
        )
    return best


def memory_text(row: dict[str, Any]) -> str:
    """What decoding took at most beyond the loaded model, and what the paged cache holds."""
    res = ""
    if row["peak_bytes"]:
        res += f"  takes {(row['peak_bytes'] - row['model_bytes']) / 2**20:6.0f} MiB"
    if stats := row.get("stats"):
        res += f", holds {stats['kv_bytes'] / 2**20:6.0f}, of which hot {stats['hot_bytes'] / 2**20:4.0f}"
    return res


def check(model: Path, args: argparse.Namespace) -> None:
    """Filled and prefilled caches, and llama-bench, at 8192 tokens; they take turns."""
    ways: dict[str, Callable[[Arm], float]] = {
        "filled by state": lambda arm: tokens_per_second([run(arm, model, args, 8192, "state")]),
        "filled by prefill": lambda arm: tokens_per_second([run(arm, model, args, 8192, "prefill")]),
        "llama-bench": lambda arm: run_tool(arm, model, args, 8192),
    }
    for arm in (STOCK[1], PATCHED[1]):
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.reps):
            for way, measure_rate in ways.items():
                rates[way].append(measure_rate(arm))
        for way, values in rates.items():
            each = ", ".join(f"{value:.1f}" for value in values)
            print(f"   8192 {arm.name:<17} {statistics.median(values):7.1f} tok/s  {way} ({each})", flush=True)


def run_tool(arm: Arm, model: Path, args: argparse.Namespace, depth: int) -> float:
    """Upstream's own llama-bench of the arm's build."""
    tool = (library.patched_dir() if arm.patched else library.stock_dir()) / "llama-bench"
    command = [str(tool), "-m", str(model), "-p", "0", "-n", str(args.n_gen), "-d", str(depth), "-r", "1", "-fa", "1"]
    output = subprocess.run([*command, "-t", str(args.threads), "-o", "json"], env=environment(arm),
                            capture_output=True, text=True, check=True).stdout  # fmt: skip
    return json.loads(output)[0]["avg_ts"]


def synthetic(shape: str) -> Path:
    model = paths.cache_dir() / f"random-{shape}-q4_0.gguf"
    if not model.exists():
        synth_model.write_model(model, synth_model.SHAPES[shape], "q4_0")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=synth_model.SHAPES, default="tinyllama")
    parser.add_argument("--depths", default="2048,8192,32768", help="besides 0")
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--n-gen", type=int, default=16)
    parser.add_argument("--n-prompt", type=int, default=512, help="prompt batch timed below depth 65536; 0: none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--check", action="store_true", help="compare filled with prefilled caches and llama-bench")
    parser.add_argument("--json", type=Path, help="write every row")
    args = parser.parse_args()

    model = synthetic(args.shape)
    if args.check:
        check(model, args)

    stock_at_0, written = 0.0, []
    for depth in [0, *map(int, args.depths.split(","))]:
        run_arm = partial(run, model=model, args=args, depth=depth)
        rows = measure(f"depth {depth}", [*STOCK, *PATCHED], args.reps, run_arm)
        written += [row for part in rows.values() for row in part]
        best = report(depth, rows, args, stock_at_0)
        stock_at_0 = stock_at_0 or best
        if args.json:
            args.json.write_text("".join(json.dumps(row) + "\n" for row in written))


if __name__ == "__main__":
    main()
