"""Every architecture that can be paged, against the stock library: the same logits where nothing is lost."""

from pathlib import Path

import pytest
from architectures import ARCHITECTURES, listed, write_metadata
from logits import EXACT_CODEC, Result, nmse, random_tokens, run_cases

from monarch_llamacpp import paths

N_PREFILL, N_DECODE = 200, 20

PAGED = {"MONARCH_MODE": "paged", "MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": "4096"}

# what upstream runs and the paged cache does not: keys of the model, and what is said of it
REFUSED = {
    "refact": ({}, "architecture refact is not supported"),  # ALiBi
    "mamba2": ({"ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 128, "ssm.time_step_rank": 4,
                "ssm.group_count": 2}, "architecture mamba2 is not supported"),
    "olmo2": ({"attention.sliding_window": 64}, "sliding windows, ALiBi, soft-capping and MLA are not supported"),
    "glm4": ({"rope.dimension_sections": [8, 8, 8, 8]}, "M-RoPE is not supported"),
    "llama": ({"attention.key_length": 512, "attention.value_length": 512}, "head size 512 is not supported"),
}


def test_the_list_is_the_one_in_native() -> None:
    assert sorted(ARCHITECTURES) == sorted(listed(paths.native_dir()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[dict]:
    steps = [["decode", N_PREFILL]] + [["decode", 1]] * N_DECODE
    tokens = random_tokens(N_PREFILL + N_DECODE)
    common = {"n_ctx": 256, "n_ubatch": 64, "n_threads": 1, "steps": steps, "tokens": tokens}
    files = [write_metadata(folder / f"{arch}.gguf", name or arch.lower(), extra)
             for arch, (name, extra) in ARCHITECTURES.items()]
    return [common | {"metadata": str(file)} for file in files]


@pytest.fixture(scope="module")
def stock(stock_bin: Path, folder: Path, cases: list[dict]) -> list[Result]:
    return run_cases(stock_bin, folder, cases)


def test_pages_of_every_architecture(
    patched_bin: Path, folder: Path, cases: list[dict], stock: list[Result]
) -> None:
    paged = run_cases(patched_bin, folder, [case | {"env": EXACT_CODEC | PAGED} for case in cases])
    window = run_cases(patched_bin, folder, [case | {"env": PAGED | {"MONARCH_MODE": "window"}} for case in cases])
    for arch, got, without, want in zip(ARCHITECTURES, paged, window, stock, strict=True):
        assert got.info["stats"]["n_cold"] >= 0.7 * (N_PREFILL + N_DECODE), arch
        assert got.info["stats"]["n_promotions"] > 0, arch
        assert nmse(got.logits, want.logits) <= 1e-7, arch
        assert nmse(without.logits, want.logits) > 1e-6, arch  # what its pages are worth


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_paged_is_refused_by_its_reason(
    patched_bin: Path, folder: Path, cases: list[dict], name: str
) -> None:
    extra, reason = REFUSED[name]
    case = cases[0] | {"metadata": str(write_metadata(folder / f"{name}-refused.gguf", name, extra))}
    run_cases(patched_bin, folder, [case])  # upstream's own cache
    with pytest.raises(AssertionError, match=f"monarch: {reason}.*use mode off"):
        run_cases(patched_bin, folder, [case | {"env": PAGED}])
