"""How many threads compute where nobody says: in chat, and in every arm of a comparison."""

from __future__ import annotations

import os
from pathlib import Path

_DEVICES = Path("/sys/devices")


def n_cores(devices: Path = _DEVICES) -> int:
    """llama-bench's own default, of the CPUs that this process may use.

    Cores, not hardware threads: two threads on one core slow decoding down, and so do the slow cores of a hybrid CPU.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    fast = usable & _fast_cpus(devices) or usable
    return len({_core(devices, cpu) for cpu in fast})


def _fast_cpus(devices: Path) -> set[int]:
    """Empty where all cores are alike."""
    listed = devices / "cpu_core" / "cpus"
    parts = listed.read_text().strip().split(",") if listed.is_file() else []
    bounds = (part.partition("-") for part in parts)
    return {cpu for first, _, last in bounds for cpu in range(int(first), int(last or first) + 1)}


def _core(devices: Path, cpu: int) -> str:
    """The same for the hardware threads of one core."""
    siblings = devices / "system" / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    return siblings.read_text() if siblings.is_file() else str(cpu)
