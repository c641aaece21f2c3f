"""Speed by upstream's llama-bench of each build: one process per arm and repetition, arms interleaved."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence

from . import library
from .ab_arms import Arm
from .ab_child import Report, check_activity
from .ab_lab import Lab
from .ab_rows import Row
from .ab_settings import Settings
from .errors import MonarchError
from .stats import Stats

TOOL = "llama-bench"

_STATS = re.compile(r"^log_stats: statistics: (\{.*\})$", re.MULTILINE)

Job = tuple[Arm, int]  # with a setting of flash attention
Key = tuple[str, int, int, int, int]


def run_bench(lab: Lab) -> None:
    """One row per arm, flash attention setting and test, with a sample per process: its second repetition."""
    jobs = [(arm, flash_attn) for arm in lab.arms for flash_attn in arm.flash_attn]
    receipts, rows = {}, {}
    for arm in lab.arms:
        taken, receipts[arm.name] = lab.take("speed", arm, lambda row: _test(row) in _tests(lab.settings))
        rows |= {_key(row): row for row in taken}
    left = Counter({job: lab.settings.reps - _n_done(job, lab.settings, rows) for job in jobs})
    part = lab.part("speed", sum(n for n in left.values() if n > 0))
    for round in range(lab.settings.reps):
        for arm, flash_attn in (job for job in jobs if left[job] > round):
            if arm in lab.arms:
                part.next(f"{TOOL}, {arm.name}, -fa {flash_attn}")
                with lab.attempt(arm, "speed"):
                    _add(rows, _run_once(arm, flash_attn, lab.settings), receipts[arm.name], lab)


def _add(rows: dict[Key, Row], new: Sequence[Row], receipt: str, lab: Lab) -> None:
    for row in new:
        rows[_key(row)] = merge_rows([*filter(None, [rows.get(_key(row))]), row]) | {"receipt": receipt}
    lab.rows.put(rows[_key(row)] for row in new)


def _key(row: Row) -> Key:
    return row["arm"], int(row["flash_attn"]), *_test(row)


def _test(row: Row) -> tuple[int, int, int]:
    return row["n_depth"], row["n_prompt"], row["n_gen"]


def _tests(settings: Settings) -> list[tuple[int, int, int]]:
    kinds = [(settings.n_prompt, 0)] * (settings.n_prompt > 0) + [(0, settings.n_gen)]
    return [(depth, *kind) for depth in settings.depths for kind in kinds]


def _n_done(job: Job, settings: Settings, rows: dict[Key, Row]) -> int:
    keys = ((job[0].name, job[1], *test) for test in _tests(settings))
    return min(len(rows[key]["samples_ts"]) if key in rows else 0 for key in keys)


def _run_once(arm: Arm, flash_attn: int, settings: Settings) -> list[Row]:
    command = [str(arm.bin_dir / TOOL), "--output", "json", "--repetitions", "2", "--model", str(settings.model)]
    command += ["--verbose"] * arm.pages  # the library logs what it counted
    command += ["--n-depth", ",".join(map(str, settings.depths)), "--flash-attn", str(flash_attn)]
    command += ["--n-prompt", str(settings.n_prompt), "--n-gen", str(settings.n_gen)]
    command += ["--cache-type-k", arm.type_kv, "--cache-type-v", arm.type_kv]
    command += ["--n-gpu-layers", str(settings.n_gpu_layers), "--threads", str(settings.n_threads)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=arm.environment())
    except FileNotFoundError:
        raise MonarchError(f"{TOOL} is not built: run python -m monarch_llamacpp build --tools") from None
    if result.returncode != 0:
        raise MonarchError(f"{TOOL} of {arm.name} ended with status {result.returncode}: {_last_line(result.stderr)}")
    rows = json.loads(result.stdout)
    stats = _read_stats(result.stderr, arm, len(rows))
    return [_label_row(row, arm, each) for row, each in zip(rows, stats, strict=True)]


def _read_stats(log: str, arm: Arm, n_tests: int) -> list[Report | None]:
    """Of each test's context: a paged cache logs its statistics when it goes."""
    found = [Stats(**json.loads(text)).with_sums() for text in _STATS.findall(log)] if arm.pages else [None] * n_tests
    if len(found) != n_tests:
        raise MonarchError(f"{TOOL} of {arm.name} logged the statistics of {len(found)} contexts in {n_tests} tests")
    return found


def _label_row(row: Row, arm: Arm, stats: Report | None) -> Row:
    """Refuses a row of another build: the comparison would be of one thing with itself."""
    expected = library.build_commit(arm.build)
    if row["build_commit"] != expected:
        raise MonarchError(f"arm {arm.name} ran llama.cpp {row['build_commit']}, not {expected}: build again")
    check_activity(arm, stats, min(row["n_prompt"], row["n_ubatch"]) or 1)
    held = {"knobs": arm.knob_values, "stats": stats}
    return {"row": "speed", "arm": arm.name, **_drop_first(row), **held}


def _drop_first(row: Row) -> Row:
    """A process's first repetition pays for what is touched for the first time."""
    return row | {name: row[name][1:] for name in ("samples_ns", "samples_ts")}


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
