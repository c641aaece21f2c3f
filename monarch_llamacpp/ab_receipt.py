"""What an A/B comparison depends on: machine, compiler, and hashes of model, libraries, knobs and text."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

from . import __version__, builder_cmake, library, pin
from .ab_arms import Arm
from .ab_rows import Row, make_receipt
from .ab_settings import Settings
from .errors import MonarchError
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
    knobs = dict(arm.knobs) if arm.knobs else None
    return {"build": arm.build, "type_kv": arm.type_kv, "knobs": knobs, "libraries": library_hashes(arm.bin_dir)}


def arm_receipt(arm: Arm, settings: Settings, **facts: object) -> str:
    """facts: what else the rows of this kind depend on."""
    common = {"model": sha256(settings.model), "arm": describe_arm(arm), "n_threads": settings.n_threads}
    common |= {"n_gpu_layers": settings.n_gpu_layers}
    return make_receipt(common | {"machine": machine(), "package": __version__} | facts)


@lru_cache(maxsize=4)
def library_hashes(folder: Path) -> Row:
    files = (file for file in sorted(folder.glob("lib*")) if not file.is_symlink() and ".so" in file.name)
    return {file.name: sha256(file) for file in files}


def machine() -> Row:
    return {
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "n_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _compiler() -> str | None:
    """Of this machine; a cache that was copied to it needs none."""
    try:
        return builder_cmake.find_toolchain().identity
    except MonarchError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@lru_cache(maxsize=64)
def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
