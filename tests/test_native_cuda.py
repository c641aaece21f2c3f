"""The CUDA kernels: compiled with nvcc where there is one, and emulated on the CPU against the plain path everywhere.

The emulation (cuda_emulation.h) runs the very kernels, thread by thread. It proves their arithmetic and their use of
shared memory and barriers; it says nothing about speed or about a real device.
"""

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from emulated_device import EMULATION_FLAGS
from native_kernels import EXACT, PAGED, WINDOW, build, upstream_dir

from monarch_llamacpp import builder_cuda, builder_source, paths
from monarch_llamacpp.errors import MonarchError

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
ARCHITECTURES = ("sm_75", "sm_80", "sm_90")

FLAGS = (
    *EMULATION_FLAGS,
    "-DMONARCH_SCRATCH_MAX=280000u",  # little, so that many queries take several launches
    # whatever is not aligned ends the program
    "-fsanitize=alignment,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
)


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
    mask_f32: int = 0
    residual_k: int = 0
    n_sm: int = 8
    n_steps: int = 2
    threshold: int = 0  # in millionths
    sticky_threshold: int = 0
    n_masked: int = 0  # the first slots of the ring, seen by nobody
    hot_f32: int = 0
    q_zero: int = 0
    n_runs: int = 1  # of tokens of one sequence; more than one share the pages
    n_frames: int = 0


class Result(NamedTuple):
    nmse: float
    mass: float  # the greatest difference of a logged probability
    n_logged: int
    n_dropped: int
    n_state: int  # differences in logs and counters
    n_pages: int  # steps whose page-outs differ in a byte
    n_orders: int  # steps that the order of threads changes
    n_guards: int  # writes out of bounds
    n_frames: int  # differences in what frames hold
    n_page_ins: int
    n_hits: int
    n_promoted: int
    n_launches: int  # of all cases so far


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not upstream_dir().is_dir():
        pytest.fail(f"{upstream_dir()} is missing: run python -m monarch_llamacpp build --tools", pytrace=False)
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip(f"the emulation is not tried on {platform.machine()}")
    return build("c++", platform.machine(), tmp_path_factory.mktemp("cuda"), "", "native_cuda", FLAGS)


def run(program: Path, cases: list[Case]) -> list[Result]:
    text = "\n".join(" ".join(str(int(value)) for value in case) for case in cases)
    env = os.environ | {"MONARCH_KERNEL": "plain"}
    done = subprocess.run([str(program)], input=text, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    results = [Result(*map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(results) == len(cases)
    return results


def check(program: Path, cases: list[Case]) -> list[Result]:
    """Same attention, same choice of pages, same bytes; whatever the order of threads."""
    results = run(program, cases)
    for case, result in zip(cases, results, strict=True):
        assert result.nmse <= 1e-10, (case, result)
        assert result.mass <= 1e-5, (case, result)
        assert result[4:9] == (0, 0, 0, 0, 0), (case, result)
    return results


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_exact(emulation: Path, head_dim: int) -> None:
    cases = [
        Case(head_dim, n_gqa, n_tokens, page_size, bits_k, bits_v, n_sm=n_sm, residual_k=residual, mask_f32=n_gqa == 5)
        for n_gqa, n_tokens, page_size, n_sm in [(1, 1, 16, 40), (5, 3, 32, 1), (8, 1, 8, 8)]
        for bits_k, bits_v, residual in [(4, 4, 0), (3, 2, 1), (2, 3, 0)]
    ]
    results = check(emulation, cases)
    for case, result in zip(cases, results, strict=True):
        assert result.n_promoted == case.n_steps * 2 * case.n_pages


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_paged(emulation: Path, head_dim: int) -> None:
    base = Case(head_dim, mode=PAGED, n_pages=37, n_promote=6, n_steps=3, sticky_threshold=2)
    cases = [
        base._replace(n_gqa=n_gqa, n_tokens=n_tokens, scorer=scorer)
        for scorer, n_gqa, n_tokens in [(0, 3, 1), (1, 4, 2), (2, 4, 1)]
    ]
    for case, result in zip(cases, check(emulation, cases), strict=True):
        assert result.n_promoted == case.n_steps * 2 * case.n_promote
        assert result.n_logged >= result.n_promoted


def test_many_queries_take_several_launches(emulation: Path) -> None:
    """More blocks of queries than there is scratch for, the last of them not full."""
    base = Case(64, n_gqa=8, mode=PAGED, n_pages=37, n_promote=6, n_steps=1)
    few, many = (run(emulation, [base._replace(n_tokens=n)])[0] for n in (8, 20))
    assert many.n_launches > few.n_launches
    check(emulation, [
        base._replace(n_gqa=n_gqa, n_tokens=n_tokens, mode=mode, mask_f32=1)
        for n_gqa, n_tokens, mode in [(8, 20, PAGED), (3, 43, EXACT), (70, 2, PAGED)]
    ])


def test_hot_window_alone(emulation: Path) -> None:
    cases = [
        Case(head_dim, n_gqa, n_tokens, mode=WINDOW, n_kv=n_kv, hot_f32=hot_f32)
        for head_dim in (64, 80)
        for n_gqa, n_tokens, n_kv, hot_f32 in [(1, 1, 16, 0), (3, 1, 31, 1), (4, 9, 77, 0)]
    ]
    assert all(result.n_promoted == 0 for result in check(emulation, cases))


def test_parts_where_all_is_masked(emulation: Path) -> None:
    """Some parts of the ring hold nothing that a query may see."""
    base = Case(64, n_tokens=2, n_kv=300, n_masked=200, n_sm=40, n_promote=4)
    check(emulation, [base._replace(mode=mode) for mode in (WINDOW, EXACT, PAGED)])


@pytest.mark.parametrize("mode", [PAGED, EXACT])
def test_no_page_yet(emulation: Path, mode: int) -> None:
    check(emulation, [Case(64, mode=mode, n_pages=0)])


def test_uncompressed_pages(emulation: Path) -> None:
    cases = [Case(head_dim, bits_k=16, bits_v=16, mode=mode) for head_dim in (64, 80) for mode in (EXACT, PAGED)]
    check(emulation, [*cases, Case(64, bits_k=16, bits_v=4), Case(64, bits_k=4, bits_v=16)])


def test_sticky_pages_and_a_failed_step(emulation: Path) -> None:
    """The native test lets the third step's predecessor fail: its log must not be applied."""
    sticky = Case(64, mode=PAGED, n_pages=9, n_promote=3, n_steps=14, sticky_threshold=1)
    other, never = sticky._replace(n_promote=5, scorer=2), sticky._replace(sticky_threshold=0)
    results = check(emulation, [sticky, other, never])
    assert results[0].n_dropped > 0 and results[1].n_dropped > 0
    assert results[2].n_dropped == 0


def test_several_sequences_that_share_pages(emulation: Path) -> None:
    base = Case(64, n_pages=9, n_promote=5, n_steps=6, sticky_threshold=2)  # 9 and 7: every run lists each page once
    check(emulation, [
        base._replace(mode=mode, n_tokens=n_tokens, n_runs=n_runs, n_gqa=n_gqa)
        for mode in (PAGED, EXACT, WINDOW)
        for n_tokens, n_runs, n_gqa in [(2, 2, 4), (5, 3, 16), (4, 4, 1)]
    ])


def test_frames_hold_what_was_promoted_last(emulation: Path) -> None:
    """One frame, or more than pages; more pages missing than a step copies; pages written again; other codecs."""
    base = Case(64, mode=PAGED, n_pages=37, n_promote=6, n_steps=12, sticky_threshold=2)
    few, many = check(emulation, [base._replace(n_frames=n) for n in (1, 60)])
    assert few.n_page_ins > 2 and many.n_page_ins > 12
    assert 0 < few.n_hits < many.n_hits
    check(emulation, [base._replace(n_frames=n, n_promote=30) for n in (7, 20, 33)])
    check(emulation, [
        base._replace(n_frames=8, head_dim=head_dim, page_size=page_size, bits_k=bits_k, residual_k=residual_k)
        for head_dim, page_size, bits_k, residual_k in [(80, 8, 3, 0), (96, 32, 4, 1), (128, 16, 2, 1)]
    ])
    shared = base._replace(n_frames=9, n_pages=9, n_promote=5, n_tokens=5, n_runs=3)
    check(emulation, [shared, shared._replace(n_gqa=8, n_tokens=20, n_steps=4)])  # in one launch, and in several
    [nothing] = check(emulation, [shared._replace(mode=EXACT)])
    assert nothing.n_page_ins == nothing.n_hits == 0


def test_threshold_and_budget(emulation: Path) -> None:
    base = Case(64, mode=PAGED, n_pages=300, n_promote=300, n_steps=1, n_sm=40)
    thresholds = [base._replace(threshold=threshold) for threshold in (0, 3000, 10**6)]
    budgets = [base._replace(n_promote=n) for n in (7, 0)]
    promoted = [result.n_promoted for result in check(emulation, thresholds + budgets)]
    assert promoted[0] == 600 and promoted[2] == 0 and promoted[3] == 14 and promoted[4] == 0
    assert 0 < promoted[1] < 600


def test_of_equal_pages_the_later_wins(emulation: Path) -> None:
    """A query of zeros finds all whole pages equal."""
    base = Case(64, mode=PAGED, n_pages=700, n_steps=1, q_zero=1)
    check(emulation, [base._replace(n_promote=n) for n in (233, 234, 235)])  # threads look at three pages each


def nvcc(source: Path, out: Path, *flags: str) -> str:
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH: the CUDA kernels are emulated only")
    command = ["nvcc", "-std=c++17", *flags, "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_the_kernels(architecture: str, tmp_path: Path) -> None:
    source = paths.native_dir() / "monarch-cuda.cu"
    include = [f"-I{paths.native_dir()}", f"-I{upstream_dir()}/ggml/include"]
    output = nvcc(source, tmp_path / "cuda.o", f"-arch={architecture}", "-fmad=false", "-Werror", "all-warnings",
                  "-Xptxas", "-v", *include)
    spills = [line for line in output.splitlines() if "spill" in line]
    assert len(spills) >= 10 and all("0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


@pytest.mark.parametrize("name", ["monarch-cuda-backend.cu", "ggml-cuda.cu"])
def test_nvcc_compiles_what_calls_the_kernels(name: str, tmp_path: Path) -> None:
    """The patched dispatch of ggml-cuda; all of ggml-cuda would take an hour."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc on PATH")
    try:
        cuda = builder_cuda.find_cuda("75")
    except MonarchError as error:
        pytest.skip(str(error))
    files = builder_source.patched_files(upstream_dir(), paths.patches_dir(), paths.native_dir())
    needed = {path: file for path, file in files.items() if path.startswith(("ggml/", "monarch/"))}
    builder_source.sync_tree(tmp_path, needed)
    [source] = [file for file in tmp_path.rglob(name) if file.is_file()]
    src = tmp_path / "ggml/src"
    folders = [tmp_path / "monarch", tmp_path / "ggml/include", src, src / "ggml-cuda"]
    flags = shlex.split(cuda.options.get("CMAKE_CUDA_FLAGS", ""))
    nvcc(source, tmp_path / "out.o", "-arch=sm_75", "-use_fast_math", "-extended-lambda", "-DGGML_CUDA_NO_VMM", *flags,
         *(f"-I{folder}" for folder in folders))
