"""Where things are: the cache, and the sources that the project ships."""

import os
from pathlib import Path

from .errors import MonarchError


def cache_dir() -> Path:
    """MONARCH_CACHE, or monarch_llamacpp in the user cache directory. Resolved: build trees hold absolute paths."""
    if chosen := os.environ.get("MONARCH_CACHE"):
        return Path(chosen).expanduser().resolve()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user_cache).expanduser().resolve() / "monarch_llamacpp"


def data_dir() -> Path:
    """The folder that holds LLAMA_CPP_VERSION, patches/ and native/: inside a wheel, or the root of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_data", package.parent):
        if (folder / "LLAMA_CPP_VERSION").is_file():
            return folder
    raise MonarchError(f"LLAMA_CPP_VERSION is missing beside {package}: reinstall monarch_llamacpp")


def pin_file() -> Path:
    return data_dir() / "LLAMA_CPP_VERSION"


def patches_dir() -> Path:
    return data_dir() / "patches"


def native_dir() -> Path:
    return data_dir() / "native"
