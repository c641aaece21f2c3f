"""Which kernels this processor can run, and which one served: a test must not compare the plain path with itself."""

import re
from typing import NamedTuple

import pytest

from monarch_llamacpp.cpuinfo import cpu_features


class Kernel(NamedTuple):
    machine: str
    features: set[str]  # what its own check asks the processor for, as /proc/cpuinfo names it


KERNELS = {
    "avx512": Kernel("x86_64", {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"}),
    "avx2": Kernel("x86_64", {"avx2", "fma"}),
    "neon": Kernel("aarch64", {"asimddp"}),
}

_SAID = re.compile(r"^monarch_attend_say_kernels: hot window: (\w+), cold pages: (\w+)$", re.MULTILINE)


def require(kernel: str) -> None:
    """Skips only what the processor lacks: a kernel that does not notice what it has is an error."""
    machine, *present = cpu_features().split()
    if machine != KERNELS[kernel].machine:
        pytest.skip(f"{kernel} is for {KERNELS[kernel].machine}, this machine is {machine}")
    if missing := KERNELS[kernel].features - set(present):
        pytest.skip(f"{kernel} needs {', '.join(sorted(missing))}, which this processor lacks")


def served(log: str) -> list[str]:
    """For the hot window and for the pages, of the first model that was attended; [] if none was."""
    said = _SAID.search(log)
    return list(said.groups()) if said else []
