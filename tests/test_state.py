"""Stock sequence states restored into a paged context."""

from pathlib import Path

import numpy as np
import pytest
from logits import EXACT_CODEC, nmse, random_tokens, run_cases

from models import write_random_model

N_STATE, N_MORE = 300, 30
ENV = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "32"}


@pytest.fixture
def case(tmp_path: Path) -> dict:
    model = write_random_model(tmp_path / "model.gguf", head_dim=64, n_head=4, n_head_kv=2)
    return {"model": str(model), "n_ctx": 640, "n_ubatch": 64, "tokens": random_tokens(N_STATE + N_MORE)}


def decode(n: int) -> list:
    return [["decode", 1]] * n


@pytest.mark.parametrize(("flash_attn", "limit"), [(False, 1e-7), (True, 1e-5)])
def test_stock_state_goes_on_in_a_paged_context(
    stock_bin: Path, patched_bin: Path, tmp_path: Path, case: dict, flash_attn: bool, limit: float
) -> None:
    """Stock stores V by value, or by token with flash attention, which itself sums in f16."""
    file = str(tmp_path / "state")
    saved = case | {"flash_attn": flash_attn, "steps": [["decode", N_STATE], ["save", file], *decode(N_MORE)]}
    (want,) = run_cases(stock_bin, tmp_path, [saved])
    tokens = case["tokens"][N_STATE:]
    loaded = case | {"env": ENV, "tokens": tokens, "steps": [["load", file, -1], *decode(N_MORE)]}
    (got,) = run_cases(patched_bin, tmp_path, [loaded])
    assert got.info["status"][0] == want.info["status"][1] > 0
    assert got.info["stats"]["n_tokens"] == N_STATE + N_MORE
    assert got.info["stats"]["n_cold"] >= 0.8 * (N_STATE + N_MORE)
    assert nmse(got.logits, want.logits[N_STATE:]) <= limit


def test_a_state_that_does_not_fit_changes_nothing(
    stock_bin: Path, patched_bin: Path, tmp_path: Path, case: dict
) -> None:
    """Truncated anywhere, or of another K/V type: refused, and the live sequence goes on."""
    good, other = str(tmp_path / "good"), str(tmp_path / "other")
    save = [["decode", N_STATE]]
    run_cases(stock_bin, tmp_path, [case | {"steps": [*save, ["save", good]]}])
    run_cases(stock_bin, tmp_path, [case | {"type_k": "q8_0", "steps": [*save, ["save", other]]}])
    size = (tmp_path / "good").stat().st_size
    cuts = [0, 3, 4, 8, 12, 16, 20, 100, 16 + 12 * N_STATE, 16 + 12 * N_STATE + 9, size // 2, size - 1]
    live = [["decode", 200]]
    rough = case | {"env": ENV, "steps": [*live, *(["load", good, n] for n in cuts), ["load", other, -1], *decode(20)]}
    calm = case | {"env": ENV, "steps": [*live, *decode(20)]}
    got, want = run_cases(patched_bin, tmp_path, [rough, calm])
    assert got.info["status"][1 : 2 + len(cuts)] == [0] * (len(cuts) + 1)
    assert np.array_equal(got.logits, want.logits)


def test_saving_is_refused_until_it_is_there(patched_bin: Path, tmp_path: Path, case: dict) -> None:
    file = str(tmp_path / "state")
    (got,) = run_cases(patched_bin, tmp_path, [case | {"env": ENV, "steps": [["decode", 200], ["save", file]]}])
    assert got.info["status"] == [0, 0]
