"""Runs cases of child_logits.py on one library and reads what came back."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from child import run_child

EXACT_CODEC = {"MONARCH_COLD_BITS_K": "16", "MONARCH_COLD_BITS_V": "16"}


class Result(NamedTuple):
    logits: np.ndarray  # [n_decoded, n_vocab]
    info: dict[str, Any]


def run_cases(
    lib_dir: Path, folder: Path, cases: list[dict[str, Any]], env: dict[str, str] | None = None
) -> list[Result]:
    """env reaches the child from its start; a case's own only while it runs."""
    out = folder / f"logits-{lib_dir.parent.name}-{len(list(folder.iterdir()))}.npz"
    run_child(lib_dir, "child_logits.py", [out], stdin=json.dumps(cases), env=env)
    with np.load(out) as data:
        return [Result(data[f"logits{i}"], json.loads(str(data[f"info{i}"]))) for i in range(len(cases))]


def nmse(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.square(got - want).sum() / np.square(want).sum())


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 96, n)]
