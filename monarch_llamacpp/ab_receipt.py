"""What an A/B comparison depends on: machine, compiler, and hashes of model, libraries, knobs and text."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from . import __version__, builder_cmake, library, pin
from .ab_arms import Arm
from .ab_rows import Row
from .ab_settings import Settings
from .cpuinfo import cpu_name
from .errors import MonarchError
from .hashes import hash_file, hash_value
from .versions import installed_versions


def environment(arms: Sequence[Arm], settings: Settings) -> Row:
    builds = library.find_builds().values()
    text = {"file": str(settings.text), "sha256": sha256(settings.text)} if settings.text else None
    return {
        "row": "environment",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "pin": vars(pin.read_pin()),
        "builds": {build.arm_dir.name: build.digest for build in builds if build},
        "compiler": _compiler(),
        "versions": installed_versions(),
        "model": {"file": str(settings.model), "sha256": sha256(settings.model)},
        "text": text,
        "settings": {name: value for name, value in vars(settings).items() if name not in ("model", "text")},
        "arms": {arm.name: describe_arm(arm) for arm in arms},
    }


def describe_arm(arm: Arm) -> Row:
    held = {"build": arm.build, "type_kv": arm.type_kv, "knobs": arm.knob_values}
    return held | {"libraries": library_hashes(arm.bin_dir)}


def arm_receipt(arm: Arm, settings: Settings, **facts: object) -> str:
    """Of all that a row depends on, facts included: a resumed comparison takes only rows of the same receipt."""
    common = {"model": sha256(settings.model), "arm": describe_arm(arm), "n_threads": settings.n_threads}
    common |= {"n_gpu_layers": settings.n_gpu_layers}
    return hash_value(common | {"machine": machine(), "package": __version__} | facts)


@lru_cache(maxsize=4)
def library_hashes(folder: Path) -> Row:
    files = (file for file in sorted(folder.glob("lib*")) if not file.is_symlink() and ".so" in file.name)
    return {file.name: sha256(file) for file in files}


def machine() -> Row:
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "n_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _compiler() -> str | None:
    """Of this machine; a cache that was copied to it needs none."""
    try:
        return builder_cmake.find_toolchain().identity
    except MonarchError:
        return None


@lru_cache(maxsize=64)
def sha256(file: Path) -> str:
    """Once for each file: a receipt of every arm asks for the model's."""
    return hash_file(file)
