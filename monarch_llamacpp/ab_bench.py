"""Speed by upstream's llama-bench of each build: one process per arm and repetition, arms interleaved."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import builder_recipe, pin
from .ab_arms import Arm
from .builder_progress import Progress
from .errors import MonarchError

TOOL = "llama-bench"

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    model: Path
    depths: Sequence[int]
    n_prompt: int
    n_gen: int
    n_threads: int | None
    reps: int


def run_bench(arms: Sequence[Arm], settings: Settings, progress: Progress) -> list[Row]:
    """One row per arm, flash attention setting and test, with a sample per repetition; the first is thrown away."""
    jobs = [(arm, flash_attn) for arm in arms for flash_attn in arm.flash_attn]
    runs: dict[tuple, list[Row]] = defaultdict(list)
    total = (settings.reps + 1) * len(jobs)
    for i in range(total):
        arm, flash_attn = jobs[i % len(jobs)]
        progress.count(f"{TOOL} {arm.name}", i, total)
        for row in _run_once(arm, flash_attn, settings):
            if i >= len(jobs):
                runs[arm.name, flash_attn, row["n_depth"], row["n_prompt"], row["n_gen"]].append(row)
    progress.count(TOOL, total, total)
    return [merge_rows(rows) for rows in runs.values()]


def _run_once(arm: Arm, flash_attn: int, settings: Settings) -> list[Row]:
    command = [str(arm.bin_dir / TOOL), "--output", "json", "--repetitions", "1", "--model", str(settings.model)]
    command += ["--n-depth", ",".join(map(str, settings.depths)), "--flash-attn", str(flash_attn)]
    command += ["--n-prompt", str(settings.n_prompt), "--n-gen", str(settings.n_gen)]
    command += ["--threads", str(settings.n_threads)] if settings.n_threads else []
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=arm.environment())
    except FileNotFoundError:
        raise MonarchError(f"{TOOL} is not built: run python -m monarch_llamacpp build --tools") from None
    if result.returncode != 0:
        raise MonarchError(f"{TOOL} of {arm.name} ended with status {result.returncode}: {_last_line(result.stderr)}")
    return [_label_row(row, arm) for row in json.loads(result.stdout)]


def _label_row(row: Row, arm: Arm) -> Row:
    """Refuses a row of another build: the comparison would be of one thing with itself."""
    expected = builder_recipe.cmake_options(arm.build, pin.read_pin())["LLAMA_BUILD_COMMIT"]
    if row["build_commit"] != expected:
        raise MonarchError(f"arm {arm.name} ran llama.cpp {row['build_commit']}, not {expected}: build again")
    return {"row": "speed", "arm": arm.name, **row, "knobs": dict(arm.knobs) if arm.knobs else None}


def merge_rows(rows: Sequence[Row]) -> Row:
    """Repetitions of one test in llama-bench's own fields."""
    merged = dict(rows[-1])
    for unit in ("ns", "ts"):
        samples = [sample for row in rows for sample in row[f"samples_{unit}"]]
        merged[f"samples_{unit}"] = samples
        merged[f"avg_{unit}"] = statistics.fmean(samples)
        merged[f"stddev_{unit}"] = statistics.stdev(samples) if len(samples) > 1 else 0.0
    return merged


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it gives no reason"
