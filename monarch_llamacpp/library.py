"""Finds and loads the patched library. One process holds one llama.cpp: stock or patched, never both."""

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

from . import builder_recipe, builder_stamp, paths, pin
from .builder_stamp import Built
from .errors import MonarchError

BUILD_COMMAND = "python -m monarch_llamacpp build"


def stock_dir() -> Path:
    """The folder of unmodified upstream's libraries and tools."""
    return _bin_dir("stock")


def patched_dir() -> Path:
    return _bin_dir("patched")


def sanitized_dir(sanitizer: str) -> Path:
    """The patched library, instrumented."""
    return _bin_dir(sanitizer)


def find_builds() -> dict[str, Built | None]:
    """Stock and patched, as far as they are built."""
    pinned = pin.read_pin()
    return {arm: builder_stamp.find_built(arm, paths.cache_dir(), pinned) for arm in builder_recipe.ARMS}


def build_commit(arm: str) -> str:
    """What the arm's tools say they were built from."""
    return builder_recipe.cmake_options(arm, pin.read_pin())["LLAMA_BUILD_COMMIT"]


def _bin_dir(arm: str) -> Path:
    cache = paths.cache_dir()
    if built := builder_stamp.find_built(arm, cache, pin.read_pin()):
        return built.bin_dir
    state = "was built from other sources, or for another CPU" if any(cache.glob(f"{arm}-*/bin")) else "is not built"
    raise MonarchError(f"the {arm} library {state}: run {BUILD_COMMAND}")


@functools.cache
def load() -> ModuleType:
    """Makes llama_cpp use the patched library and returns the shim, a cffi module with `ffi` and `lib`."""
    folder = patched_dir()
    shim = builder_stamp.shim_file(folder)
    if not shim.is_file():
        raise MonarchError(f"{shim.name} is not built for this Python: run {BUILD_COMMAND}")
    _choose_for_llama_cpp(folder)
    module = _import_file(shim)
    _check_abi(module.lib.monarch_abi_version(), abi_version(), folder)
    return module


def _choose_for_llama_cpp(folder: Path) -> None:
    """llama_cpp reads the variable once, when it is first imported."""
    imported = sys.modules.get("llama_cpp.llama_cpp")
    if imported and Path(imported._base_path).resolve() != folder:
        raise MonarchError(f"llama_cpp was already imported with the library in {imported._base_path}, not {folder}: "
                           "import monarch_llamacpp.llama before llama_cpp")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)


def _import_file(shim: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(builder_stamp.SHIM_MODULE, shim)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise MonarchError(f"{shim} does not load ({error}): delete it and run {BUILD_COMMAND}") from error
    return module


def _check_abi(library: int, header: int, folder: Path) -> None:
    if library != header:
        raise MonarchError(f"the library in {folder} has ABI {library}, this package needs {header}: "
                           f"run {BUILD_COMMAND}")


def abi_version() -> int:
    """MONARCH_ABI_VERSION of the sources at hand."""
    header = paths.native_dir() / "monarch.h"
    match = re.search(r"#define MONARCH_ABI_VERSION (\d+)", header.read_text())
    if not match:
        raise MonarchError(f"{header}: MONARCH_ABI_VERSION is missing; restore the file")
    return int(match[1])
