"""What callers give, checked before llama.cpp sees it: that ends the process, or takes the lower bits of a number."""

from __future__ import annotations

from pathlib import Path

from .errors import MonarchError, UsageError

GGUF_MAGIC = b"GGUF"

MAX_CTX_SIZE = 2**31 - 1  # positions are 32 bits
MAX_THREADS = 512  # GGML_MAX_N_THREADS
MAX_GPU_LAYERS = 2**31 - 1


def check_threads(name: str, value: int | None) -> None:
    if value is not None and not 1 <= value <= MAX_THREADS:
        raise UsageError(f"{name} {value}: allowed is 1 to {MAX_THREADS}")


def check_ctx_size(name: str, value: int) -> None:
    if not 0 <= value <= MAX_CTX_SIZE:
        raise UsageError(f"{name} {value}: allowed is 1 to {MAX_CTX_SIZE}, 0 for the trained context")


def check_gpu_layers(name: str, value: int) -> None:
    if not -1 <= value <= MAX_GPU_LAYERS:
        raise UsageError(f"{name} {value}: allowed is 0 to {MAX_GPU_LAYERS}, -1 for all")


def check_model(file: Path) -> None:
    if not file.is_file():
        raise MonarchError(f"no model at {file}: give the path of a GGUF file")
    if not _is_text(str(file)):
        raise MonarchError(f"{file}: llama-cpp-python opens only names in UTF-8: rename the file or its folder")
    if not is_gguf(file):
        raise MonarchError(f"{file} is no GGUF: python -m monarch_llamacpp convert makes one of a checkpoint")


def _is_text(name: str) -> bool:
    """Python keeps bytes of a name that are no UTF-8 as lone surrogates."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def is_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with open(file, "rb") as opened:
        return opened.read(len(GGUF_MAGIC)) == GGUF_MAGIC
