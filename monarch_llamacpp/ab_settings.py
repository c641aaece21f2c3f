"""What an A/B comparison measures: the options of `ab` beside its arms, checked before any work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .checks import MAX_CTX_SIZE, check_gpu_layers, check_model, check_threads
from .cores import n_cores
from .errors import MonarchError, UsageError

PARTS = ("memory", "quality", "speed")


@dataclass(frozen=True)
class Preset:
    depths: str
    reps: int
    n_prompt: int
    n_gen: int
    text_tokens: int
    decode_tokens: int
    chunks: int
    lengths: str
    haystacks: int  # of each length
    continuations: int
    continue_tokens: int


PRESETS = {
    "quick": Preset("0,2048", 5, 512, 64, 2048, 256, 1, "1024,2048", 2, 2, 48),
    "full": Preset("0,2048,8192", 5, 512, 128, 8192, 1024, 4, "1024,4096,16384", 4, 4, 128),
}


@dataclass(frozen=True)
class Settings:
    model: Path
    depths: Sequence[int]
    n_prompt: int
    n_gen: int
    n_threads: int
    reps: int
    parts: Sequence[str] = PARTS
    text: Path | None = None
    text_tokens: int = 0
    decode_tokens: int = 0
    chunks: int = 1
    lengths: Sequence[int] = ()
    haystacks: int = 1
    continuations: int = 1
    continue_tokens: int = 1
    n_gpu_layers: int = -1

    @property
    def probe_tokens(self) -> int:
        return max([*self.depths, 1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Without a default of its own, an option's is the preset's."""
    preset = PRESETS["quick"]
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="how much (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="NAME,...", help="(default: %(default)s)")
    parser.add_argument("--depths", metavar="N,...", help=f"tokens held (quick: {preset.depths})")
    parser.add_argument("--reps", type=int, metavar="N", help=f"repetitions kept (quick: {preset.reps})")
    parser.add_argument("-n", type=int, dest="n_gen", metavar="N", help=f"generated (quick: {preset.n_gen})")
    parser.add_argument(
        "-p", type=int, dest="n_prompt", metavar="N", help=f"of the prompt; 0: none (quick: {preset.n_prompt})"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(default: the number of cores)")
    parser.add_argument("--n-gpu-layers", type=int, default=-1, metavar="N", help="(default: all, on a CUDA build)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for quality (default: one is made)")
    parser.add_argument(
        "--text-tokens", type=int, metavar="N", help=f"at most the trained context (quick: {preset.text_tokens})"
    )
    parser.add_argument(
        "--decode-tokens", type=int, metavar="N", help=f"of them, one at a time (quick: {preset.decode_tokens})"
    )
    parser.add_argument(
        "--chunks", type=int, metavar="N", help=f"of the text, each of --text-tokens (quick: {preset.chunks})"
    )
    parser.add_argument("--lengths", metavar="N,...", help=f"texts with needles (quick: {preset.lengths})")


def read_settings(args: argparse.Namespace) -> Settings:
    preset = PRESETS[args.preset]
    chosen = {name: getattr(args, name, None) for name in vars(preset)}
    values = {name: vars(preset)[name] if value is None else value for name, value in chosen.items()}
    if args.mode is not None:
        raise UsageError("--mode belongs to the arms: choose them with --arms, or give one with --arm NAME:mode=...")
    check_model(args.model)
    if args.text and not args.text.is_file():
        raise MonarchError(f"no text at {args.text}: give the path of a text file")
    _check_least(args, values)
    for name, least in (("depths", 0), ("lengths", 256)):
        values[name] = _numbers(f"--{name}", values[name], least)
    given = {"n_threads": args.threads or n_cores(), "n_gpu_layers": args.n_gpu_layers, "parts": _parts(args.parts)}
    return Settings(args.model, text=args.text, **given, **values)


def _check_least(args: argparse.Namespace, values: dict) -> None:
    limits = (("reps", "--reps", 1), ("n_gen", "-n", 1), ("n_prompt", "-p", 0), ("text_tokens", "--text-tokens", 64))
    for name, flag, least in (*limits, ("decode_tokens", "--decode-tokens", 1), ("chunks", "--chunks", 1)):
        if values[name] < least:
            raise UsageError(f"{flag} {values[name]}: allowed is {least} and more")
    if values["decode_tokens"] > values["text_tokens"] // 2:
        raise UsageError(f"--decode-tokens {values['decode_tokens']}: allowed is half of --text-tokens at most")
    check_threads("--threads", args.threads)
    check_gpu_layers("--n-gpu-layers", args.n_gpu_layers)


def _numbers(flag: str, text: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} {text}: allowed is numbers of tokens with commas between") from None
    if min(numbers) < least or max(numbers) > MAX_CTX_SIZE or len(set(numbers)) < len(numbers):
        raise UsageError(f"{flag} {text}: allowed is {least} and more, to {MAX_CTX_SIZE}, each once")
    return numbers


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if len(set(parts)) < len(parts) or not set(parts) <= set(PARTS):
        raise UsageError(f"--parts {text}: allowed is {', '.join(PARTS)}, each once")
    return parts
