"""Upstream's own tests on the patched library: operators, states, threads; with paging on where it matters."""

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from child import environment
from logits import EXACT_CODEC
from native_kernels import upstream_dir

from models import write_random_model
from monarch_llamacpp import paths

TESTS = Path(__file__).resolve().parent
PAGED = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "32"}


def add_cases(source: str) -> str:
    """test-backend-ops.cpp with the cases of backend_ops_cases.h among its own."""
    head = "static std::vector<std::unique_ptr<test_case>> make_test_cases_eval() {\n"
    body = "    std::vector<std::unique_ptr<test_case>> test_cases;\n"
    assert source.count(head + body) == 1
    more = f'#include "backend_ops_cases.h"\n\n{head}{body}    add_monarch_cases(test_cases);\n'
    return source.replace(head + body, more)


@pytest.fixture(scope="module")
def program(patched_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles one of upstream's tests against the patched libraries."""
    upstream, folder = upstream_dir(), tmp_path_factory.mktemp("upstream")
    patched = patched_bin.parent / "src"
    include = [patched / "include", patched / "ggml" / "include", upstream / "common", upstream / "tests"]
    include += [upstream / "vendor", paths.native_dir(), TESTS]

    @cache
    def build(name: str) -> Path:
        text = (upstream / "tests" / f"{name}.cpp").read_text(encoding="utf-8")
        source = folder / f"{name}.cpp"
        source.write_text(add_cases(text) if name == "test-backend-ops" else text, encoding="utf-8")
        link = [f"-L{patched_bin}", "-lllama-common", "-lllama", "-lggml", "-lggml-cpu", "-lggml-base"]
        command = ["c++", "-std=c++17", "-O1", "-w", *(f"-I{path}" for path in include), str(source), "-o"]
        command += [str(source.with_suffix("")), *link, f"-Wl,-rpath,{patched_bin}", "-pthread"]
        subprocess.run(command, check=True)
        return source.with_suffix("")

    return build


def run(program: Path, args: list[str], lib_dir: Path, env: dict[str, str]) -> str:
    # some write files where they stand
    result = subprocess.run(
        [program, *args], cwd=program.parent, capture_output=True, text=True, errors="replace",
        env=environment(lib_dir, env),
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return result.stdout + result.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "model.gguf", head_dim=64, n_head=4, n_head_kv=2)


def passed(output: str) -> tuple[int, int]:
    n_passed, n_all = re.findall(r"(\d+)/(\d+) tests passed", output)[-1]
    return int(n_passed), int(n_all)


def test_the_new_op_agrees_with_its_plain_path(program: Callable[[str], Path], patched_bin: Path) -> None:
    output = run(program("test-backend-ops"), ["test", "-b", "CPU", "-o", "MONARCH"], patched_bin, {})
    n_passed, n_all = passed(output)
    assert n_passed == n_all >= 100


@pytest.mark.long
def test_the_old_ops_are_as_they_were(program: Callable[[str], Path], patched_bin: Path) -> None:
    n_passed, n_all = passed(run(program("test-backend-ops"), ["test", "-b", "CPU", "-j", "2"], patched_bin, {}))
    assert n_passed == n_all > 5000


@pytest.mark.parametrize("env", [{}, PAGED], ids=["off", "paged"])
def test_states_go_on_in_other_contexts(
    program: Callable[[str], Path], patched_bin: Path, model: Path, env: dict[str, str]
) -> None:
    run(program("test-save-load-state"), ["-m", str(model), "-ngl", "0", "-n", "16", "-c", "256"], patched_bin, env)


@pytest.mark.parametrize("env", [{}, PAGED], ids=["off", "paged"])
def test_a_state_goes_where_there_are_holes(
    program: Callable[[str], Path], patched_bin: Path, model: Path, env: dict[str, str]
) -> None:
    args = ["-m", str(model), "-ngl", "0"]
    assert "SUCCESS" in run(program("test-state-restore-fragmented"), args, patched_bin, env)


def test_contexts_in_many_threads(program: Callable[[str], Path], patched_bin: Path) -> None:
    model = TESTS.parent / "models" / "monarch-small.gguf"
    args = ["-m", str(model), "-p", "The meaning of life is", "-n", "128", "-c", "256", "-ub", "32"]
    run(program("test-thread-safety"), [*args, "-ngl", "0", "-np", "4", "-t", "2"], patched_bin, PAGED)
