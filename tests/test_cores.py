"""The number of threads where nobody gives one: cores, as llama-bench counts them."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import models
from monarch_llamacpp.cores import n_cores

HYBRID = ["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"]  # two fast cores of two threads, four slow ones


def write_devices(folder: Path, siblings: list[str], fast: str = "") -> Path:
    for cpu, text in enumerate(siblings):
        topology = folder / "system" / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{text}\n")
    if fast:
        (folder / "cpu_core").mkdir()
        (folder / "cpu_core" / "cpus").write_text(f"{fast}\n")
    return folder


@pytest.mark.parametrize(
    ("siblings", "fast", "usable", "expected"),
    [
        (["0", "1"], "", {0, 1}, 2),
        (["0,2", "1,3", "0,2", "1,3"], "", {0, 1, 2, 3}, 2),
        (["0,2", "1,3", "0,2", "1,3"], "", {0, 2}, 1),
        (["0,2", "1,3", "0,2", "1,3"], "", {0, 3}, 2),
        (HYBRID, "0-3", set(range(8)), 2),
        (HYBRID, "0-1,2,3", {0, 1, 4, 5}, 1),
        (HYBRID, "0-3", {4, 5, 6}, 3),
        ([], "", {0, 1, 2}, 3),
    ],
)
def test_cores_not_threads_and_fast_ones(tmp_path, monkeypatch, siblings, fast, usable, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: usable, raising=False)
    assert n_cores(write_devices(tmp_path, siblings, fast)) == expected


def test_llama_bench_takes_as_many(stock_bin, tmp_path):
    if len(os.sched_getaffinity(0)) < os.cpu_count() or not Path("/sys/devices/system/cpu/cpu0/topology").is_dir():
        pytest.skip("llama-bench counts CPUs that this process may not use, and guesses where none are listed")
    model = models.write_random_model(tmp_path / "random.gguf")
    command = [stock_bin / "llama-bench", "-m", model, "-o", "json", "-r", "1", "-p", "0", "-n", "1", "--no-warmup"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)[0]["n_threads"] == n_cores()
