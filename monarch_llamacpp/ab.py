"""`python -m monarch_llamacpp ab`: speed, memory and recall of paged caches beside unmodified upstream."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from . import builder_cmake, builder_recipe, builder_stamp, info, paths, pin
from .ab_arms import ARMS, Arm, make_arm
from .ab_bench import Row, Settings, run_bench
from .ab_probe import LEAST_RECALL_TOKENS, N_UBATCH, run_probe
from .ab_report import print_report
from .builder_progress import Progress
from .errors import MonarchError, UsageError
from .knobs import add_knob_arguments, knobs_from_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--depths", default="0,2048", metavar="N,...", help="tokens held (default: %(default)s)")
    parser.add_argument("--arms", default=",".join(ARMS), metavar="NAME,...", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, one JSON object per line")
    parser.add_argument("--reps", type=int, default=3, metavar="N", help="repetitions kept (default: %(default)s)")
    parser.add_argument("-n", type=int, default=64, dest="n_gen", metavar="N", help="generated (default: %(default)s)")
    parser.add_argument(
        "-p", type=int, default=512, dest="n_prompt", metavar="N", help="of the prompt (default: %(default)s; 0: none)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(default: llama-bench's)")
    add_knob_arguments(parser)


def run(args: argparse.Namespace) -> int:
    settings = _settings(args)
    names, knobs = _names(args.arms), knobs_from_args(args)
    _check_json(args.json)
    arms = [make_arm(name, knobs) for name in names]
    progress = Progress()
    memory, quality = _probe(arms, settings, progress)
    speed = run_bench(arms, settings, progress)
    if args.json:
        _write_rows(args.json, [_environment(settings), *speed, *quality, *memory])
    _print(settings, speed, quality, memory)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    if args.mode is not None:
        raise UsageError("--mode belongs to the arms here: choose them with --arms")
    if not args.model.is_file():
        raise MonarchError(f"no model at {args.model}: give the path of a GGUF file")
    for name, value, least in (("--reps", args.reps, 1), ("-n", args.n_gen, 1), ("-p", args.n_prompt, 0)):
        if value < least:
            raise UsageError(f"{name} {value}: allowed is {least} and more")
    if args.threads is not None and args.threads < 1:
        raise UsageError(f"--threads {args.threads}: allowed is 1 and more")
    return Settings(args.model, _depths(args.depths), args.n_prompt, args.n_gen, args.threads, args.reps)


def _depths(text: str) -> list[int]:
    try:
        depths = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--depths {text}: allowed is numbers of tokens with commas between") from None
    if min(depths) < 0 or len(set(depths)) < len(depths):
        raise UsageError(f"--depths {text}: allowed is 0 and more, each once")
    return depths


def _names(text: str) -> list[str]:
    names = text.split(",")
    if len(set(names)) < len(names) or not set(names) <= set(ARMS):
        raise UsageError(f"--arms {text}: allowed is {', '.join(ARMS)}, each once")
    return names


def _check_json(file: Path | None) -> None:
    """Before the work, not after it."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"--json {file}: give a file in a folder that exists")


def _probe(arms: Sequence[Arm], settings: Settings, progress: Progress) -> tuple[list[Row], list[Row]]:
    """Memory and recall at the greatest depth; stops before the long part if an arm is not what it should be."""
    memory, quality = [], []
    for i, arm in enumerate(arms):
        progress.count(f"memory and recall of {arm.name}", i, len(arms))
        report = run_probe(arm, settings.model, max([*settings.depths, 1]), settings.n_threads)
        needles = report.pop("needles")
        memory.append({"row": "memory", "arm": arm.name, **report})
        if needles:
            quality.append(_recall_row(arm, report["n_tokens"], needles))
    progress.count("memory and recall", len(arms), len(arms))
    if not quality:
        progress.step(f"recall: needs the constructed recall model and a depth of {LEAST_RECALL_TOKENS} tokens")
    return memory, quality


def _recall_row(arm: Arm, n_tokens: int, needles: list[bool]) -> Row:
    found = {"value": sum(needles) / len(needles), "n_found": sum(needles), "n_needles": len(needles)}
    held = {"n_tokens": n_tokens, "n_ubatch": N_UBATCH}
    return {"row": "quality", "arm": arm.name, "metric": "needle_recall", **found, **held}


def _environment(settings: Settings) -> Row:
    pinned = pin.read_pin()
    built = (builder_stamp.find_built(arm, paths.cache_dir(), pinned) for arm in builder_recipe.ARMS)
    return {
        "row": "environment",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": _machine(),
        "pin": vars(pinned),
        "builds": {build.arm_dir.name: build.digest for build in built if build},
        "compiler": builder_cmake.find_toolchain().identity,
        "versions": info.collect()["versions"],
        "model": {"file": str(settings.model), "sha256": _sha256(settings.model)},
        "settings": {name: value for name, value in vars(settings).items() if name != "model"},
    }


def _machine() -> Row:
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "n_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_rows(file: Path, rows: Sequence[Row]) -> None:
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _print(settings: Settings, speed: Sequence[Row], quality: Sequence[Row], memory: Sequence[Row]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    first = speed[0]
    console.print(
        f"{settings.model.name}, {first['n_threads']} threads, {settings.reps} repetitions after one thrown away: "
        "median ± standard deviation"
    )
    print_report(console, speed, quality, memory)
