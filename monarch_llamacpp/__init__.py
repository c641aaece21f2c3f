"""A paged KV cache for llama.cpp, driven from Python."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .knobs import Knobs
    from .llama import Llama

__version__ = "0.1.0"
__all__ = ["Knobs", "Llama"]

_MODULES = {"Knobs": "knobs", "Llama": "llama"}


def __getattr__(name: str) -> Any:
    # importing the package must not load the library
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
