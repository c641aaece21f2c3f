"""The processor, as Linux describes it."""

import functools
import platform
from pathlib import Path


def cpu_name() -> str:
    return _read("model name") or platform.machine()


@functools.cache
def cpu_features() -> str:
    """The machine, then what its processor can do: what GGML_NATIVE compiles for, and another CPU may lack."""
    return " ".join([platform.machine(), *sorted(_read("flags", "Features").split())])


def _read(*keys: str) -> str:
    """What the first line of one of these keys says; empty where there is none."""
    file = Path("/proc/cpuinfo")
    lines = (line.partition(":") for line in (file.read_text().splitlines() if file.is_file() else ()))
    return next((value.strip() for key, _, value in lines if key.strip() in keys), "")
