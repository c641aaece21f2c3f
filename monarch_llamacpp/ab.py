"""`python -m monarch_llamacpp ab`: speed, memory and quality of paged caches beside unmodified upstream."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from . import ab_settings
from .ab_arms import ARMS, Arm, make_arms
from .ab_bench import run_bench
from .ab_html import make_page
from .ab_lab import Lab
from .ab_probe import run_probes
from .ab_quality import run_quality
from .ab_receipt import environment
from .ab_report import print_report
from .ab_rows import Rows, read_rows
from .ab_settings import Settings, read_settings
from .errors import UsageError
from .knobs import add_knob_arguments, knobs_from_args
from .output_file import check_flag_output, write_file
from .progress import Progress

_RUN = {"memory": run_probes, "quality": run_quality, "speed": run_bench}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--arms", default=",".join(ARMS), metavar="NAME,...", help="(default: %(default)s)")
    parser.add_argument(
        "--arm", action="append", default=[], metavar="NAME:KNOB=VALUE,...", help="one more, of mode paged if not said"
    )
    ab_settings.add_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here, one JSON object per line")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures here")
    parser.add_argument("--resume", action="store_true", help="keep what the --json file has already")
    add_knob_arguments(parser, hidden=("mode",))


def run(args: argparse.Namespace) -> int:
    settings = read_settings(args)
    _check_outputs(args)
    knobs = knobs_from_args(args)
    arms = make_arms(args.arms, args.arm, knobs)
    rows = Rows(args.json, read_rows(args.json) if args.resume else ())
    _measure(arms, settings, rows, args.html)
    return 1 if rows.of("failure") else 0


def _check_outputs(args: argparse.Namespace) -> None:
    read = {file.resolve() for file in (args.model, args.text) if file}
    for flag, file in (("--json", args.json), ("--html", args.html)):
        if file:
            check_flag_output(flag, file)
        if file and file.resolve() in read:
            raise UsageError(f"{flag} {file}: the comparison reads it: give another file")
    if args.json and args.html and args.json.resolve() == args.html.resolve():
        raise UsageError(f"--json and --html both name {args.json}: give two files")
    if args.resume and not args.json:
        raise UsageError("--resume: name the file to continue with --json")


def _measure(arms: Sequence[Arm], settings: Settings, rows: Rows, html: Path | None) -> None:
    """What is done when somebody stops it is reported all the same."""
    lab = Lab(arms, settings, rows, Progress())
    rows.put([environment(arms, settings)])
    try:
        for part in settings.parts:
            _RUN[part](lab)
        rows.finish()
    finally:
        print_report(Console(file=sys.stdout, highlight=False), rows.all())
        if html:
            write_file(html, make_page(rows.all()))
