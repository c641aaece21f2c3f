"""Versions of what is installed."""

from __future__ import annotations

import importlib.metadata
import platform

_PACKAGES = ("monarch_llamacpp", "llama_cpp_python", "gguf", "numpy", "cffi")


def installed_versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
