"""`python -m monarch_llamacpp info`: versions, pin, ABI, backends and paths."""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path

from . import builder_recipe, builder_stamp, library, paths, pin

_NOT_BACKENDS = {"base"}


def collect() -> dict:
    pinned = pin.read_pin()
    arms = {arm: builder_stamp.find_built(arm, paths.cache_dir(), pinned) for arm in builder_recipe.ARMS}
    return {arm: _describe(built) for arm, built in arms.items()} | {
        "pin": vars(pinned),
        "abi": library.abi_version(),
        "backends": _backends(arms["patched"]),
        "versions": _versions(),
        "cache": str(paths.cache_dir()),
        "native": str(paths.native_dir()),
        "patches": str(paths.patches_dir()),
    }


def _describe(built: builder_stamp.Built | None) -> dict:
    folder = str(built.bin_dir) if built else None
    tools = [tool for tool in builder_recipe.TOOLS if built and tool in built.targets]
    return {"lib_dir": folder, "bin_dir": folder if tools else None, "tools": tools}


def _backends(built: builder_stamp.Built | None) -> list[str]:
    """From the files: loading the library here would fix llama_cpp to it."""
    names = {_backend(file) for file in built.bin_dir.glob("libggml-*.so")} if built else set()
    return sorted(name.upper() for name in names - _NOT_BACKENDS)


def _backend(file: Path) -> str:
    return file.name.removeprefix("libggml-").removesuffix(".so")


def _versions() -> dict[str, str | None]:
    names = ("monarch_llamacpp", "llama_cpp_python", "gguf", "numpy", "cffi")
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _lines(value: dict, prefix: str = "") -> list[str]:
    lines = []
    for key, entry in value.items():
        if isinstance(entry, dict):
            lines += _lines(entry, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {_text(entry)}")
    return lines


def _text(entry: object) -> str:
    if isinstance(entry, list):
        return ", ".join(entry) or "none"
    return "none" if entry is None else str(entry)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    information = collect()
    print(json.dumps(information, indent=2) if args.json else "\n".join(_lines(information)))
    return 0
