"""`convert`: a Hugging Face llama, mistral or qwen2 checkpoint to GGUF, one tensor in memory at a time."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import gguf
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from .convert_hparams import Hparams, add_hparams, read_hparams
from .convert_safetensors import Checkpoint
from .convert_source import DEFAULT_REPO, find_source
from .convert_tensors import OUTTYPES, Plan, plan_tensors, write_tensors
from .convert_vocab import Vocab, add_vocab, read_vocab
from .errors import MonarchError
from .output_file import check_gguf_output, replaced
from .units import MIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="?", default=DEFAULT_REPO, help=f"folder or Hugging Face repo id (default: {DEFAULT_REPO})"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the GGUF to write")
    parser.add_argument("--outtype", choices=OUTTYPES, default="f16", help="type of the matrices (default: f16)")


def run(args: argparse.Namespace) -> int:
    check_gguf_output(args.output)
    folder, name = find_source(args.source)
    n_bytes = convert(folder, args.output, args.outtype, name)
    print(f"{args.output}: {n_bytes / MIB:.1f} MiB, {args.outtype}", file=sys.stderr)
    return 0


def convert(folder: Path, output: Path, outtype: str, name: str) -> int:
    """Writes output, or leaves no trace and raises MonarchError; returns its size in bytes."""
    hparams = read_hparams(folder)
    plan = plan_tensors(Checkpoint(folder), hparams, outtype)  # first: it proves the sizes that config.json claims
    vocab = read_vocab(folder, hparams)
    try:
        with replaced(output) as part:
            write_gguf(part, hparams, vocab, plan, outtype, name)
    except OSError as error:
        cause = error.strerror or "not all of it could be written, the disk may be full"  # numpy does not tell
        raise MonarchError(f"{error.filename or output}: {cause}; no output was left") from error
    return output.stat().st_size


def write_gguf(path: Path, hparams: Hparams, vocab: Vocab, plan: list[Plan], outtype: str, name: str) -> None:
    with contextlib.closing(gguf.GGUFWriter(path, hparams.arch)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(OUTTYPES[outtype].file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_hparams(writer, hparams)
        add_vocab(writer, vocab)
        with make_progress() as progress:
            write_tensors(writer, plan, progress)


def make_progress() -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()]
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
