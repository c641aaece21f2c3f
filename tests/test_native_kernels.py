"""Every kernel against the plain path on the op alone: all head sizes, bits, page sizes; NEON under qemu."""

import platform
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from kernels import KERNELS, require
from logits import nmse
from native_kernels import EXACT, PAGED, WINDOW, Case, build, run, run_estimates, upstream_dir

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
CROSS = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"


class Program(NamedTuple):
    kernel: str
    command: list[str]


@pytest.fixture(scope="module")
def build_for(sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    if not upstream_dir().is_dir():
        pytest.fail(f"{upstream_dir()} is missing: run python -m monarch_llamacpp build --tools", pytrace=False)
    return cache(lambda compiler, machine: build(compiler, machine, tmp_path_factory.mktemp(machine), sanitizer))


@pytest.fixture(params=KERNELS)
def program(request: pytest.FixtureRequest, build_for: Callable[[str, str], Path], sanitizer: str) -> Program:
    kernel, machine = request.param, KERNELS[request.param].machine
    if machine == platform.machine() or machine != "aarch64":
        require(kernel)
        return Program(kernel, [str(build_for("c++", machine))])
    if sanitizer:
        pytest.skip(f"the {kernel} kernel runs emulated here, which the sanitizers do not support")
    if missing := [tool for tool in (CROSS, QEMU) if not shutil.which(tool)]:
        pytest.skip(f"the {kernel} kernel needs {' and '.join(missing)} on this machine")
    return Program(kernel, [QEMU, "-cpu", "max", str(build_for(CROSS, machine))])


def run_both(
    program: Program, cases: list[Case], run: Callable = run
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The kernel's results and the plain path's."""
    got, want = (run(program.command, kernel, cases) for kernel in (program.kernel, "plain"))
    for case, a, b in zip(cases, got, want, strict=True):
        # AVX-512 leaves pages of such heads to the plain path
        is_plain = run is run_estimates and case.head_dim % 32 != 0
        assert is_plain or not np.array_equal(a, b), f"the plain path served: {case}"
    return got, want


@pytest.mark.parametrize("mode", [EXACT, PAGED])
def test_kernel_equals_plain_path(program: Program, mode: int) -> None:
    """paged with a budget for all pages: the order of attending differs, the result must not."""
    cases = [
        Case(head_dim, n_gqa, n_tokens, page_size, bits_k, bits_v, mode=mode, mask_f32=n_tokens > 1)
        for head_dim in HEAD_DIMS
        for bits_k, bits_v in [(4, 4), (3, 2), (2, 3)]
        for n_gqa, n_tokens, page_size in [(5, 7, 16), (4, 5, 32)]
    ]
    got, want = run_both(program, cases)
    truth = run(program.command, "plain", [case._replace(bits_k=16, bits_v=16) for case in cases])
    for case, a, b, exact in zip(cases, got, want, truth, strict=True):
        assert nmse(a, b) <= 0.02 * nmse(b, exact), case


def test_tokens_of_little_v_are_as_exact_as_others(program: Program) -> None:
    """Row by row: tokens like attention sinks have little V and get most of the attention."""
    cases = [Case(head_dim, n_gqa=8, n_tokens=4, n_pages=12, faint=1, mask_f32=1) for head_dim in HEAD_DIMS]
    got, want = run_both(program, cases)
    truth = run(program.command, "plain", [case._replace(bits_k=16, bits_v=16) for case in cases])
    for case, a, b, exact in zip(cases, got, want, truth, strict=True):
        kernel, codec = (((x - y) ** 2).sum(-1) for x, y in ((a, b), (b, exact)))
        assert np.median(kernel / codec) <= 0.005, case


def test_hot_window_alone_is_f32(program: Program) -> None:
    cases = [
        Case(head_dim, n_gqa, n_tokens, mode=WINDOW, n_kv=n_kv, mask_f32=n_tokens > 1)
        for head_dim in HEAD_DIMS
        for n_gqa, n_tokens, n_kv in [(1, 1, 16), (3, 1, 31), (4, 9, 77)]
    ]
    got, want = run_both(program, cases)
    for case, a, b in zip(cases, got, want, strict=True):
        assert nmse(a, b) <= 1e-11, case


@pytest.mark.parametrize(("scorer", "limit"), [(0, 0.015), (1, 0.015), (2, 0.14)])
def test_scores_equal_the_plain_ones(program: Program, scorer: int, limit: float) -> None:
    """All pages are promoted, so all estimates show: what rounding adds is little against what tells pages apart."""
    cases = [
        Case(head_dim, n_gqa, n_pages=n_pages, n_promote=n_pages, mode=PAGED, scorer=scorer)
        for head_dim in HEAD_DIMS
        for n_gqa, n_pages in [(1, 37), (3, 37), (7, 37), (1, 38), (7, 38), (9, 38)]
    ]
    got, want = run_both(program, cases, run_estimates)
    for case, a, b in zip(cases, got, want, strict=True):
        error, spread = np.log(a / b), np.log(b).std()
        assert error.std() <= limit * spread and abs(error.mean()) <= limit * spread, case


@pytest.mark.parametrize("scorer", [0, 1, 2])
def test_scores_choose_the_same_pages(program: Program, scorer: int) -> None:
    """With few pages promoted, the kernel's scores choose nearly as the plain ones do, over all head sizes."""
    cases = [Case(head_dim, n_gqa=3, n_pages=37, n_promote=6, mode=PAGED, scorer=scorer) for head_dim in HEAD_DIMS]
    got, want = run_both(program, cases)
    none = run(program.command, "plain", [case._replace(mode=WINDOW) for case in cases])
    apart = [nmse(a, b) / nmse(window, b) for a, b, window in zip(got, want, none, strict=True)]
    assert sum(apart) <= 0.1 * len(apart) and max(apart) <= 0.3, apart


@pytest.mark.parametrize("scorer", [0, 1, 2])
def test_rest_goes_to_the_mean_v_of_the_hot_window(program: Program, scorer: int) -> None:
    """With no page promoted: the hot window's attention and its mean V, weighted by half the estimate; minmax: none."""
    base = [Case(head_dim, n_gqa=1, n_pages=37, n_promote=0, scorer=scorer, n_kv=75) for head_dim in HEAD_DIMS]

    def cases(**changes: int) -> list[Case]:
        return [case._replace(**changes) for case in base]

    paged, hot, mean = (
        run(program.command, program.kernel, cases(**changes))
        for changes in ({"mode": PAGED}, {"mode": WINDOW}, {"mode": WINDOW, "q_zero": 1})
    )
    estimates = run_estimates(program.command, program.kernel, cases(mode=PAGED, n_promote=37))
    for case, got, of_hot, v, estimated in zip(base, paged, hot, mean, estimates, strict=True):
        left_out = estimated.sum(1).reshape(1, -1, 1) * (scorer != 0)  # a KV head has one query head
        share = left_out / 2 / (1 - left_out / 2)
        assert nmse(got, (1 - share) * of_hot + share * v) <= 1e-9, case
        assert scorer == 0 or (share > 0.01).all()


@pytest.mark.parametrize("scorer", [1, 2])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_rest_goes_to_the_mean_v_of_what_is_read(program: Program, n_threads: int, scorer: int) -> None:
    """A query of zeros attends to all alike, so the mean adds nothing to what minmax gives, which has no rest."""
    zero = {"mode": PAGED, "n_pages": 32, "n_promote": 6, "n_kv": 75, "q_zero": 1, "n_threads": n_threads}
    base = [Case(head_dim, 3, **zero) for head_dim in HEAD_DIMS]
    got, want = (run(program.command, program.kernel, [case._replace(scorer=s) for case in base]) for s in (scorer, 0))
    for case, a, b in zip(base, got, want, strict=True):
        assert nmse(a, b) <= 1e-9, case


def test_rest_of_a_block_of_queries(program: Program) -> None:
    """The block's first token says which slots count for the mean; the shares are as exact as the scores."""
    cases = [Case(head_dim, 4, 9, mode=PAGED, n_promote=0, scorer=1, n_kv=75, mask_f32=1) for head_dim in HEAD_DIMS]
    got, want = run_both(program, cases)
    for case, a, b in zip(cases, got, want, strict=True):
        assert nmse(a, b) <= 1e-4, case


def test_hot_window_of_another_type(program: Program) -> None:
    cases = [Case(head_dim, mode=WINDOW, hot_bf16=1) for head_dim in HEAD_DIMS]
    got, want = run_both(program, cases)
    for case, a, b in zip(cases, got, want, strict=True):
        assert nmse(a, b) <= 1e-11, case


# KV heads are two: 3, 4, 5 and 8 threads cut the one block of each into 3, 2, 5 and 4 parts
@pytest.mark.parametrize(("mode", "n_promote"), [(WINDOW, 37), (EXACT, 37), (PAGED, 37), (PAGED, 0)])
def test_parts_equal_the_whole(program: Program, mode: int, n_promote: int) -> None:
    """On the same bytes only the order of sums differs. None promoted: what is estimated of all goes to the mean V."""
    shapes = [(5, 1, 16), (3, 2, 8), (1, 1, 32)]
    cases = [
        Case(head_dim, n_gqa, n_tokens, page_size, mode=mode, n_pages=37, n_promote=n_promote, n_kv=187)
        for head_dim, (n_gqa, n_tokens, page_size) in zip(HEAD_DIMS, shapes * 3, strict=False)
    ]

    def share(n_threads: int, run: Callable = run) -> list[np.ndarray]:
        return run(program.command, program.kernel, [case._replace(n_threads=n_threads) for case in cases])

    whole = share(1)
    for n_threads, alike in [(3, 6), (4, 4), (5, 10), (8, 8)]:
        for case, got, want, again in zip(cases, share(n_threads), whole, share(alike), strict=True):
            assert 0 < nmse(got, want) <= 1e-11, (n_threads, case)
            assert np.array_equal(got, again), (n_threads, alike, case)
    for case, got, want in zip(cases, share(5, run_estimates), share(1, run_estimates), strict=True):
        assert np.allclose(got, want, rtol=1e-5, atol=0), case


@pytest.mark.parametrize("mode", [EXACT, PAGED])
def test_who_does_a_block_does_not_matter(program: Program, mode: int) -> None:
    """Heads of one block belong to a thread; of a prompt's many blocks, each goes to the thread that is free."""
    shapes = [(4, 200), (1, 70), (4, 1)]
    cases = [
        Case(head_dim, n_gqa, n_tokens, mode=mode, n_pages=37, n_kv=187)
        for head_dim, (n_gqa, n_tokens) in zip(HEAD_DIMS, shapes * 3, strict=False)
    ]
    for n_threads, cut in [(2, cases), (3, [case for case in cases if case.n_tokens > 1])]:
        alone = run(program.command, program.kernel, cut)
        shared = run(program.command, program.kernel, [case._replace(n_threads=n_threads) for case in cut])
        for case, got, want in zip(cut, shared, alone, strict=True):
            assert np.array_equal(got, want), (n_threads, case)
