"""Every kernel against the plain path on the same pages: what it rounds must be little beside what the codec loses."""

from pathlib import Path

import numpy as np
import pytest
from kernels import KERNELS, require, served
from logits import Result, nmse, random_tokens, run_cases

from models import write_random_model

SHAPES = [  # head size, query heads, KV heads, page size, bits of K, bits of V
    (32, 4, 4, 16, 4, 4),
    (64, 8, 1, 16, 4, 4),
    (64, 6, 2, 32, 4, 4),
    (64, 4, 2, 16, 3, 2),
    (80, 4, 2, 16, 4, 4),  # with AVX-512 the hot window alone: the plain path attends its pages
    (96, 5, 1, 16, 2, 3),
    (128, 4, 1, 16, 4, 4),
    (192, 2, 1, 32, 3, 4),
    (256, 2, 1, 16, 4, 4),
]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    require(request.param)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[dict]:
    res = []
    for head_dim, n_head, n_head_kv, page_size, bits_k, bits_v in SHAPES:
        model = folder / f"{head_dim}-{n_head}-{n_head_kv}.gguf"
        write_random_model(model, head_dim=head_dim, n_head=n_head, n_head_kv=n_head_kv)
        env = {
            "MONARCH_HOT_WINDOW": "32", "MONARCH_PAGE_SIZE": str(page_size),
            "MONARCH_COLD_BITS_K": str(bits_k), "MONARCH_COLD_BITS_V": str(bits_v),
        }  # fmt: skip
        steps = [["decode", 250], ["decode", 61], ["rm", 203]] + [["decode", 1]] * 40
        tokens = random_tokens(351, seed=head_dim)
        res.append({"model": str(model), "n_ctx": 640, "n_ubatch": 128, "tokens": tokens, "steps": steps, "env": env})
    return res


def run_kernel(lib_dir: Path, folder: Path, cases: list[dict], kernel: str, **env: str) -> list[Result]:
    extra = {"MONARCH_KERNEL": kernel} | {f"MONARCH_{name.upper()}": value for name, value in env.items()}
    # the library reads MONARCH_KERNEL once: a child for each kernel
    results = run_cases(lib_dir, folder, [case | {"env": case["env"] | extra} for case in cases], env=extra)
    assert served(results[0].info["kernels"]) == [kernel, kernel], f"{kernel} did not serve"
    return results


@pytest.mark.parametrize("mode", ["exact", "paged"])
def test_kernel_equals_plain_path(
    patched_bin: Path, stock_bin: Path, folder: Path, cases: list[dict], kernel: str, mode: str
) -> None:
    """paged with a budget for all pages: the order of attending differs, the result must not."""
    plain = run_kernel(patched_bin, folder, cases, "plain", mode=mode)
    fast = run_kernel(patched_bin, folder, cases, kernel, mode=mode)
    stock = run_cases(stock_bin, folder, [{k: v for k, v in case.items() if k != "env"} for case in cases])
    for shape, got, want, truth in zip(SHAPES, fast, plain, stock, strict=True):
        assert not np.array_equal(got.logits, want.logits), shape
        assert nmse(got.logits, want.logits) <= 0.02 * nmse(want.logits, truth.logits), shape
        assert got.info["stats"] == want.info["stats"], shape


@pytest.mark.parametrize("hot_type", ["f16", "bf16", "q8_0"])
def test_hot_window_alone_is_f32(
    patched_bin: Path, folder: Path, cases: list[dict], kernel: str, hot_type: str
) -> None:
    types = {"type_k": hot_type, "type_v": hot_type, "flash_attn": hot_type == "q8_0"}
    cases = [case | types for case in cases]
    if hot_type == "q8_0":
        cases = [case for case, shape in zip(cases, SHAPES, strict=True) if shape[0] % 32 == 0]
    plain = run_kernel(patched_bin, folder, cases, "plain", mode="window")
    fast = run_kernel(patched_bin, folder, cases, kernel, mode="window")
    assert len(fast) >= len(SHAPES) - 1
    limit = 1e-7 if hot_type == "q8_0" else 1e-9  # a last bit can change a value's code in the layer above
    for case, got, want in zip(cases, fast, plain, strict=True):
        assert nmse(got.logits, want.logits) <= limit, case["model"]


@pytest.mark.parametrize("scorer", ["minmax", "meanstd", "parts"])
def test_scores_choose_the_same_pages(
    patched_bin: Path, folder: Path, cases: list[dict], kernel: str, scorer: str
) -> None:
    """With few pages promoted, the 8-bit scores choose nearly as the plain ones do."""
    env = {"mode": "paged", "scorer": scorer, "promote_tokens": "96", "dense_layers": "0", "sticky_threshold": "0"}
    plain = run_kernel(patched_bin, folder, cases, "plain", **env)
    fast = run_kernel(patched_bin, folder, cases, kernel, **env)
    window = run_kernel(patched_bin, folder, cases, kernel, mode="window")
    for shape, got, want, none in zip(SHAPES, fast, plain, window, strict=True):
        assert nmse(got.logits, want.logits) <= 0.1 * nmse(none.logits, want.logits), shape
