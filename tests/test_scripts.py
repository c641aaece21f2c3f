"""Scripts that no other test runs."""

import subprocess
import sys
from pathlib import Path

from child import TESTS

ROOT = TESTS.parent


def test_a_session_is_kept_and_restored(stock_bin: Path, patched_bin: Path) -> None:
    command = [sys.executable, "scripts/bench_restore.py", "models/monarch-small.gguf", "--tokens", "600"]
    result = subprocess.run([*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]
    assert result.stdout.startswith("600 tokens, mode paged: read in ") and ", restored in " in result.stdout


def test_the_demo_shows_what_it_says(stock_bin: Path, patched_bin: Path) -> None:
    result = subprocess.run([sys.executable, "scripts/demo.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Right answers of 4: off 4, window 0, paged 4" in result.stdout
