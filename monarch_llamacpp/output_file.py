"""Files that commands write: whole or not at all, and never a device, a pipe or a link in a file's place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .checks import is_gguf
from .errors import UsageError


def check_output(file: Path) -> None:
    """Before the work, not after it."""
    if file.is_dir():
        raise UsageError(f"{file} is a folder: name the file to write")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"the folder {file.absolute().parent} does not exist: create it, or write elsewhere")
    if file.exists() and not file.is_file():
        raise UsageError(f"{file} is a device or a pipe: give a file, it is replaced when all is written")
    if not os.access(file.resolve().parent, os.W_OK):
        raise UsageError(f"the folder {file.resolve().parent} cannot be written to: write elsewhere")


def check_flag_output(flag: str, file: Path) -> None:
    """The same, in the flag's name."""
    try:
        check_output(file)
    except UsageError as error:
        raise UsageError(f"{flag} {file}: {error}") from None


def check_gguf_output(file: Path) -> None:
    check_output(file)
    if file.exists() and not is_gguf(file):
        raise UsageError(f"{file} exists and is no GGUF: name another file")


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A name beside the file that becomes the file, or what it links to, when all is written and on the disk.

    Raises OSError, and then leaves the file as it was and nothing beside it.
    """
    check_output(file)
    target = file.resolve()
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    open(part, "xb").close()  # never through a link that waits there
    try:
        yield part
        _sync(part)
        part.replace(target)
        _sync(target.parent)
    finally:
        part.unlink(missing_ok=True)


def write_file(file: Path, text: str) -> None:
    """Whole or not at all; what names of files hold that is no text becomes a question mark."""
    with replaced(file) as part:
        part.write_text(text, encoding="utf-8", errors="replace")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
