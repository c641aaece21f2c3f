"""The fuzz harnesses: built, and run over their corpus and a little more. `make fuzz` runs them for long."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "fuzz"))

import run as fuzz


@pytest.mark.parametrize("name", fuzz.HARNESSES)
def test_corpus_and_some_mutations(patched_bin: Path, tmp_path: Path, sanitizer: str, name: str) -> None:
    program = fuzz.build(name, patched_bin, tmp_path, sanitizer)
    done = fuzz.run(name, program, tmp_path, ["-runs", "1000", "-last", str(tmp_path / "last")])
    assert (done.returncode, done.stdout) == (0, "1000 runs\n")
