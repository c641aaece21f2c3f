"""`python -m monarch_llamacpp info`: versions, pin, ABI, backends and paths."""

import argparse
import json
from pathlib import Path

from . import builder_recipe, library, paths, pin
from .builder_stamp import Built
from .versions import installed_versions

_NOT_BACKENDS = {"base"}


def collect() -> dict:
    arms = library.find_builds()
    return {arm: _describe(built) for arm, built in arms.items()} | {
        "pin": vars(pin.read_pin()),
        "abi": library.abi_version(),
        "backends": _backends(arms["patched"]),
        "versions": installed_versions(),
        "cache": str(paths.cache_dir()),
        "native": str(paths.native_dir()),
        "patches": str(paths.patches_dir()),
    }


def _describe(built: Built | None) -> dict:
    folder = str(built.bin_dir) if built else None
    tools = [tool for tool in builder_recipe.TOOLS if built and tool in built.targets]
    return {"lib_dir": folder, "bin_dir": folder if tools else None, "tools": tools}


def _backends(built: Built | None) -> list[str]:
    """From the files: loading the library here would fix llama_cpp to it."""
    names = {_backend(file) for file in built.bin_dir.glob("libggml-*.so")} if built else set()
    return sorted(name.upper() for name in names - _NOT_BACKENDS)


def _backend(file: Path) -> str:
    return file.name.removeprefix("libggml-").removesuffix(".so")


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
