"""Needles in the paged cache: what is cold is found again, in a memory that is what the arithmetic says."""

from pathlib import Path

import pytest
from child import run_child_json

from monarch_llamacpp.knobs import Knobs, specs
from monarch_llamacpp.recall import HEAD_DIM, write_recall_model
from monarch_llamacpp.recall_text import VALUE_WORDS

N_LAYER, N_HEAD_KV, N_UBATCH = 2, 1, 512
N_PLACES = N_LAYER * N_HEAD_KV
LENGTHS = [4096, 16384, pytest.param(65536, marks=pytest.mark.long)]

# without dense layers, which would promote nearly everything here
KNOBS = Knobs(hot_window=256, promote_tokens=512, dense_layers=0)

RECORD = HEAD_DIM // 2 + 2  # 4 bits a value and an f16 scale: 66 bytes for 128 values, 34 for 64
SUMMARY = 2 * HEAD_DIM + 8  # eight means of 2 bits a value, and their scales


@pytest.fixture(scope="module")
def reports(patched_bin: Path, tmp_path_factory: pytest.TempPathFactory):
    """The report of one mode and length; each is made once."""
    model = tmp_path_factory.mktemp("recall") / "recall.gguf"
    write_recall_model(model)
    made: dict[tuple[str, int], dict] = {}

    def report(mode: str, n_tokens: int) -> dict:
        if (mode, n_tokens) not in made:
            env = {specs()[name].env: str(value) for name, value in KNOBS.replace(mode=mode).items()}
            args = [model, "--tokens", n_tokens, "--ubatch", N_UBATCH]
            made[mode, n_tokens] = run_child_json(patched_bin, "child_recall.py", args, env=env)
        return made[mode, n_tokens]

    return report


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_window_recalls_what_is_hot_and_nothing_else(reports, n_tokens):
    report = reports("window", n_tokens)
    first_hot = n_tokens - (report["prefilled"]["n_hot"] - KNOBS.sink_tokens)
    cold = [needle for needle in report["needles"] if needle["position"] + VALUE_WORDS < first_hot]
    hot = [needle for needle in report["needles"] if needle["position"] >= first_hot]
    assert len(cold) >= 9 and len(cold) + len(hot) == 10
    assert [needle["written"] for needle in cold] == [" unknown"] * len(cold)
    assert all(needle["correct"] for needle in hot)
    assert report["stats"]["n_promotions"] == 0 < report["stats"]["n_cold"]


@pytest.mark.parametrize("n_tokens", LENGTHS)
@pytest.mark.parametrize("mode", ["paged", "exact"])
def test_every_needle_is_recalled(reports, mode, n_tokens):
    report = reports(mode, n_tokens)
    assert len(report["needles"]) == 10
    assert [needle["key"] for needle in report["needles"] if not needle["correct"]] == []
    assert report["stats"]["mode"] == mode
    assert report["stats"]["n_cold"] > 0.9 * n_tokens


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_paged_promotes_within_its_budget(reports, n_tokens):
    """The last step is a single token: every layer and KV head promotes its budget's worth of pages."""
    paged, exact = reports("paged", n_tokens)["stats"], reports("exact", n_tokens)["stats"]
    assert paged["n_promoted"] == N_PLACES * KNOBS.promote_tokens // KNOBS.page_size < exact["n_promoted"]
    assert 0 < paged["n_promotions"] < paged["n_scored"]
    assert 0 < paged["n_sticky"] <= paged["n_promoted"]
    assert exact["n_promoted"] == N_PLACES * exact["n_pages"]


@pytest.mark.parametrize("n_tokens", LENGTHS)
@pytest.mark.parametrize("mode", ["window", "paged", "exact"])
def test_memory_is_as_computed(reports, mode, n_tokens):
    stats = reports(mode, n_tokens)["stats"]
    n_slots = KNOBS.sink_tokens + KNOBS.hot_window + N_UBATCH + KNOBS.page_size
    assert stats["hot_bytes"] == N_PLACES * n_slots * 2 * HEAD_DIM * 2  # K and V in f16, whatever the length
    assert stats["n_cold"] == stats["n_pages"] * KNOBS.page_size
    assert stats["cold_bytes"] == stats["n_pages"] * N_PLACES * KNOBS.page_size * 2 * RECORD
    assert stats["cold_bytes_per_token"] == N_PLACES * 2 * RECORD
    assert stats["summary_bytes"] == stats["n_pages"] * N_PLACES * SUMMARY
    assert stats["frame_bytes"] == 0
