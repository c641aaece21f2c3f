"""Contexts as programs in C++ use them: two in two threads at once, and the memory that one says it takes."""

import os
import subprocess
from pathlib import Path

from child import TESTS
from native_kernels import upstream_dir
from sanitizer import FLAGS, OPTIONS

from models import write_random_model
from monarch_llamacpp import paths


def build(name: str, lib_dir: Path, folder: Path, sanitizer: str) -> Path:
    program = folder / name
    upstream = upstream_dir()
    include = [upstream / "include", upstream / "ggml" / "include", upstream / "src", paths.native_dir()]
    link = [f"-L{lib_dir}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{lib_dir}", "-pthread"]
    command = ["c++", "-std=c++17", *FLAGS[sanitizer], *(f"-I{path}" for path in include), str(TESTS / f"{name}.cpp")]
    subprocess.run([*command, "-o", str(program), *link], check=True)
    return program


def test_two_contexts_at_once_agree(patched_bin: Path, tmp_path: Path, sanitizer: str) -> None:
    program = build("two_threads", patched_bin, tmp_path, sanitizer)
    model = write_random_model(tmp_path / "model.gguf", head_dim=64, n_head=4, n_head_kv=2)
    done = subprocess.run([program, model], capture_output=True, text=True, env=os.environ | OPTIONS)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_context_takes_what_it_says(patched_bin: Path, tmp_path: Path, sanitizer: str) -> None:
    """Foretold, allocated, and used when it is full: the rest are spare pages, logs and the outputs' buffer."""
    program = build("memory_breakdown", patched_bin, tmp_path, sanitizer)
    model = write_random_model(tmp_path / "model.gguf", head_dim=64, n_head=4, n_head_kv=2, n_ctx=8192)
    env = os.environ | OPTIONS | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "256"}
    done = subprocess.run([program, model], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    foretold, allocated, used = map(int, done.stdout.split())
    assert foretold == allocated
    assert used <= allocated <= 1.2 * used
