"""Two contexts in two threads at once."""

import os
import subprocess
from pathlib import Path

from child import TESTS
from native_kernels import upstream_dir
from sanitizer import FLAGS, OPTIONS

from models import write_random_model
from monarch_llamacpp import paths


def build(lib_dir: Path, folder: Path, sanitizer: str) -> Path:
    program = folder / "two_threads"
    upstream = upstream_dir()
    include = [f"-I{path}" for path in (upstream / "include", upstream / "ggml" / "include", paths.native_dir())]
    link = [f"-L{lib_dir}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{lib_dir}", "-pthread"]
    source = str(TESTS / "two_threads.cpp")
    subprocess.run(["c++", "-std=c++17", *FLAGS[sanitizer], *include, source, "-o", str(program), *link], check=True)
    return program


def test_two_contexts_at_once_agree(patched_bin: Path, tmp_path: Path, sanitizer: str) -> None:
    program = build(patched_bin, tmp_path, sanitizer)
    model = write_random_model(tmp_path / "model.gguf", head_dim=64, n_head=4, n_head_kv=2)
    done = subprocess.run([program, model], capture_output=True, text=True, env=os.environ | OPTIONS)
    assert (done.returncode, done.stderr) == (0, "")
