"""Scripts that no other test runs."""

import json
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


def test_every_arm_is_timed_and_pages_as_it_says(stock_bin: Path, patched_bin: Path, tmp_path: Path) -> None:
    """What the README's table of speed comes from; no speed is judged here."""
    rows = tmp_path / "rows.json"
    command = [sys.executable, "scripts/bench_cpu.py", "--shape", "tiny", "--depths", "1024", "--reps", "1"]
    command += ["--n-gen", "2", "--n-prompt", "32", "--threads", "1", "--json", str(rows)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]
    timed = {(row["depth"], row["arm"]): row for row in map(json.loads, rows.read_text().splitlines())}
    stock = ["stock f16 -fa 0", "stock f16 -fa 1", "stock q8_0 -fa 1", "stock q4_0 -fa 1"]
    assert list(timed) == [(depth, arm) for depth in (0, 1024) for arm in [*stock, "auto", "exact", "paged"]]
    assert [line.split(" tok/s")[0].split()[0] for line in result.stdout.splitlines()] == ["0"] * 7 + ["1024"] * 7
    for (depth, arm), row in timed.items():
        assert len(row["tokens_ms"]) == 2 and min(*row["tokens_ms"], row["prompt_ms"]) > 0
        assert ("stats" in row) == (arm not in stock)
        if depth and arm not in stock:
            assert row["stats"]["mode"] == {"auto": "exact"}.get(arm, arm) and row["stats"]["n_cold"] >= 480
            assert row["stats"]["n_promoted"] > 0 and (row["stats"]["n_scored"] > 0) == (arm == "paged")


def test_the_demo_shows_what_it_says(stock_bin: Path, patched_bin: Path) -> None:
    result = subprocess.run([sys.executable, "scripts/demo.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Right answers of 4: off 4, window 0, paged 4" in result.stdout
