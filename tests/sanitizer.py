"""Running what was built with `python -m monarch_llamacpp build --sanitizer ...`: `pytest --sanitizer ...` does so."""

import os
import subprocess
from functools import cache
from pathlib import Path

FLAGS = {
    "": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}

# the first error ends the program; Python itself frees little at its end
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def of(lib_dir: Path) -> str:
    """The sanitizer that the library in this folder was built with, or nothing."""
    arm = lib_dir.parent.name.partition("-")[0]
    return arm if arm in FLAGS else ""


def environment(lib_dir: Path) -> dict[str, str]:
    """What a program without sanitizer, Python, needs for loading the library."""
    if of(lib_dir) != "address":
        return {}
    return OPTIONS | {"LD_PRELOAD": " ".join(map(_runtime, ("libasan.so", "libubsan.so")))}


@cache
def _runtime(name: str) -> str:
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(found).is_absolute(), f"the compiler brings no {name}"
    return found
