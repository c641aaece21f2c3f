"""native_kernels.cpp: the op that attends, without the rest of llama.cpp, on made-up pages."""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from kernels import served
from sanitizer import FLAGS

from monarch_llamacpp import builder_source, paths, pin

N_HEAD_KV = 2
WINDOW, PAGED, EXACT = 1, 2, 3  # enum monarch_mode


_OPTIONS = re.compile(r'set_source_files_properties\(([^()]*)PROPERTIES COMPILE_OPTIONS "([^"]+)"\)')
_CONDITION = re.compile(r"\$<\$<[^>]*>:([^>]*)>")


class Case(NamedTuple):
    head_dim: int
    n_gqa: int = 4
    n_tokens: int = 1
    page_size: int = 16
    bits_k: int = 4
    bits_v: int = 4
    scorer: int = 1
    mode: int = EXACT
    n_pages: int = 9
    n_promote: int = 9
    n_kv: int = 43
    hot_bf16: int = 0
    mask_f32: int = 0
    n_runs: int = 1
    q_zero: int = 0
    faint: int = 0  # tokens of much attention and little V
    n_threads: int = 1


def upstream_dir() -> Path:
    return builder_source.upstream_dir(pin.read_pin(), paths.cache_dir())


def _sources() -> list[Path]:
    folder = paths.native_dir()
    names = [f"monarch-{name}.cpp" for name in ("codec", "cpu", "page", "policy", "summary")]
    return [*sorted(folder.glob("monarch-attend*.cpp")), *(folder / name for name in names)]


def _flags(source: Path, machine: str) -> list[str]:
    """What monarch.cmake adds for this file on this machine, with GCC and Clang."""
    cmake = (paths.native_dir() / "monarch.cmake").read_text()
    every = re.search(r"function\(monarch_add_ggml_cpu .*?    if \(", cmake, re.DOTALL)[0]
    here = re.search({"x86_64": r"x86_64\|.*?elseif", "aarch64": r"aarch64\|.*?endif"}[machine], cmake, re.DOTALL)[0]
    added = [options for files, options in _OPTIONS.findall(every + here) if f"/{source.name}\n" in files]
    return [flag for options in added for flag in _CONDITION.sub(r"\1", options).split(";")]


def build(
    compiler: str, machine: str, folder: Path, sanitizer: str, main: str = "native_kernels", flags: tuple[str, ...] = ()
) -> Path:
    """For the oldest processor of its kind: only the kernels may use newer instructions. flags: for the main file."""
    ggml = upstream_dir() / "ggml"
    include = [f"-I{path}" for path in (paths.native_dir(), ggml / "include", ggml / "src", ggml / "src" / "ggml-cpu")]

    main_file = Path(__file__).with_name(f"{main}.cpp")

    def compile_file(source: Path) -> Path:
        out = folder / f"{source.stem}.o"
        own = flags if source == main_file else _flags(source, machine)
        command = [compiler, "-std=c++17", *FLAGS[sanitizer], *include, *own, "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_file, [main_file, *_sources()]))
    program = folder / main
    link = FLAGS[sanitizer] if sanitizer else ["-static"]  # qemu finds no libraries
    subprocess.run([compiler, *link, "-pthread", *map(str, objects), "-o", str(program)], check=True)
    return program


def _run(command: list[str], kernel: str, cases: list[Case]) -> list[tuple[np.ndarray, np.ndarray]]:
    text = "\n".join(" ".join(str(int(value)) for value in case) for case in cases)
    env = os.environ | {"MONARCH_KERNEL": kernel}
    done = subprocess.run(command, input=text.encode(), capture_output=True, env=env, check=True)
    assert served(done.stderr.decode()) == [kernel, kernel], f"{kernel} did not serve"
    values = np.frombuffer(done.stdout, np.float32)
    results, at = [], 0
    for case in cases:
        attention = (case.n_tokens, N_HEAD_KV * case.n_gqa, case.head_dim)
        estimates = (N_HEAD_KV, case.n_pages)
        middle = at + np.prod(attention)
        end = middle + np.prod(estimates)
        results.append((values[at:middle].reshape(attention), values[middle:end].reshape(estimates)))
        at = end
    assert at == len(values)
    return results


def run(command: list[str], kernel: str, cases: list[Case]) -> list[np.ndarray]:
    """The attention of every case: [n_tokens, n_head, head_dim]."""
    return [attention for attention, _ in _run(command, kernel, cases)]


def run_estimates(command: list[str], kernel: str, cases: list[Case]) -> list[np.ndarray]:
    """The estimated attention probability of every case's pages: [n_head_kv, n_pages], 0 where not promoted."""
    return [estimates for _, estimates in _run(command, kernel, cases)]
