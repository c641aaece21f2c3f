"""Reads LLAMA_CPP_VERSION: which llama.cpp is built, and the hash that proves it."""

import dataclasses
import re
from pathlib import Path

from . import paths
from .errors import MonarchError


@dataclasses.dataclass(frozen=True)
class Pin:
    sdist: str
    sha256: str
    llama_cpp_python: str
    llama_cpp_commit: str


def read_pin(file: Path | None = None) -> Pin:
    file = file or paths.pin_file()
    values = _parse(file)
    names = [field.name for field in dataclasses.fields(Pin)]
    if sorted(values) != sorted(names):
        raise MonarchError(f"{file}: needs exactly the keys {', '.join(names)}; restore the file")
    pin = Pin(**values)
    _check(file, "sdist", pin.sdist, r"[\w.-]+\.tar\.gz")
    _check(file, "sha256", pin.sha256, r"[0-9a-f]{64}")
    _check(file, "llama_cpp_commit", pin.llama_cpp_commit, r"[0-9a-f]{40}")
    return pin


def _parse(file: Path) -> dict[str, str]:
    values: dict[str, str] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or key in values:
            raise MonarchError(f"{file}:{number}: expected one `key = value` a line, each key once")
        values[key] = value
    return values


def _check(file: Path, key: str, value: str, pattern: str) -> None:
    if not re.fullmatch(pattern, value):
        raise MonarchError(f"{file}: {key} = {value!r} is malformed; restore the file")
