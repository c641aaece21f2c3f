"""Runs a script on one library. A process holds one llama.cpp, so tests that compare two use a child for each."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def run_child(lib_dir: Path, script: str, args: Sequence[object] = (), *, env: Mapping[str, str] | None = None,
              stdin: str = "") -> str:
    """Standard output of tests/<script> on the library in lib_dir; only the MONARCH_* variables given reach it."""
    command = [sys.executable, str(TESTS / script), *map(str, args)]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, env=environment(lib_dir, env or {}))
    assert result.returncode == 0, f"{script} ended with status {result.returncode}:\n{result.stderr[-4000:]}"
    return result.stdout


def run_child_json(lib_dir: Path, script: str, args: Sequence[object] = (), **options: Any) -> Any:
    """What the script printed as its last line."""
    return json.loads(run_child(lib_dir, script, args, **options).splitlines()[-1])


def environment(lib_dir: Path, extra: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if _is_kept(name)}
    return kept | {"LLAMA_CPP_LIB_PATH": str(lib_dir)} | dict(extra)


def _is_kept(name: str) -> bool:
    return name == "MONARCH_CACHE" or not name.startswith("MONARCH")
