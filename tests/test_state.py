"""States of a paged context: its own, and stock ones restored into it. What is damaged or foreign changes nothing."""

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


#
# states of its own
#

PAGED = {
    "MONARCH_MODE": "paged", "MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": "64", "MONARCH_DENSE_LAYERS": "0",
}  # fmt: skip
UPSTREAM_HEADER, HEADER = 8, 80
RECORDS = 16 * 2 * 2 * 34 * 2  # a page of 2 layers and 2 KV heads of 64 values


@pytest.fixture
def saved(patched_bin: Path, tmp_path: Path, case: dict) -> Path:
    """A state with cold pages, some cut, and sticky ones among them."""
    file = tmp_path / "own"
    steps = [["decode", 200], *decode(40), ["rm", 100, 120], ["rm", 230], *decode(20), ["save", str(file)]]
    (got,) = run_cases(patched_bin, tmp_path, [case | {"env": PAGED, "steps": steps}])
    assert got.info["status"][-1] == file.stat().st_size > 0 and got.info["stats"]["n_sticky"] > 0
    return file


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("mode", ["paged", "exact", "window"])
def test_a_restored_state_goes_on_as_if_nothing_had_happened(
    patched_bin: Path, sanitizer: str, tmp_path: Path, case: dict, mode: str, seed: int
) -> None:
    """The ring starts anew, so sums may round differently; choices, counters and tokens may not."""
    env, file = PAGED | {"MONARCH_MODE": mode}, str(tmp_path / "own")
    before = [["decode", 200], *decode(40), ["rm", 100, 120], ["rm", 230], *decode(20), ["save", file]]
    case = case | {"env": env, "tokens": random_tokens(400)}
    whole = case | {"steps": before + decode(40)}
    rest = case | {"seed": seed, "tokens": case["tokens"][260:], "steps": [["load", file, -1], *decode(40)]}
    (want,) = run_cases(patched_bin, tmp_path, [whole])
    (got,) = run_cases(patched_bin, tmp_path, [rest])
    assert got.info["status"][0] == Path(file).stat().st_size
    # as sanitizers compile it a last bit makes another 4-bit code: 3.8e-9 was seen
    assert nmse(got.logits, want.logits[260:]) <= (1e-8 if sanitizer else 1e-9)
    assert np.array_equal(got.logits.argmax(1), want.logits[260:].argmax(1))
    assert got.info["stats"] == want.info["stats"]
    assert (got.info["pos_min"], got.info["pos_max"]) == (want.info["pos_min"], want.info["pos_max"])


def test_a_state_is_as_small_as_its_pages(patched_bin: Path, stock_bin: Path, tmp_path: Path, case: dict) -> None:
    steps = [["decode", 4000], ["save", ""]]
    case = case | {"n_ctx": 4352, "n_ubatch": 512, "tokens": random_tokens(4000)}
    sizes = []
    for lib_dir, env in ((stock_bin, {}), (patched_bin, PAGED)):
        file = tmp_path / str(len(sizes))
        run_cases(lib_dir, tmp_path, [case | {"env": env, "steps": [steps[0], ["save", str(file)]]}])
        sizes.append(file.stat().st_size)
    assert sizes[1] <= 0.30 * sizes[0]  # 62 of 4000 tokens are hot


def test_a_damaged_state_is_refused_and_changes_nothing(
    patched_bin: Path, tmp_path: Path, case: dict, saved: Path
) -> None:
    """Cut at every byte of the header and at every page's border, every bit of the header, many of the body."""
    data = saved.read_bytes()
    size, rng = len(data), np.random.default_rng(3)
    n_pages, n_hot = (int.from_bytes(data[at : at + 4], "little") for at in (72, 76))
    tables = UPSTREAM_HEADER + HEADER + 12 + 12 * n_pages + 8 * n_hot + 4
    pages = tables + n_hot * 2 * 2 * 2 * 64 * 2 + 4
    cuts = [*range(tables + 1), *range(pages, size, RECORDS + 4), *range(pages - 4, pages), *range(size - 9, size)]
    bits = [*range(8 * UPSTREAM_HEADER, 8 * tables), *map(int, rng.integers(8 * tables, 8 * size, 300)), 8 * size - 1]
    live = [["decode", 200]]
    rough = case | {"env": PAGED, "steps": [*live, ["damage", str(saved), cuts, bits], *decode(20)]}
    calm = case | {"env": PAGED, "steps": [*live, *decode(20)]}
    got, want = run_cases(patched_bin, tmp_path, [rough, calm])
    assert got.info["status"][1] == []
    assert np.array_equal(got.logits, want.logits) and got.info["stats"] == want.info["stats"]


OTHERS = {
    "page_size": {"MONARCH_PAGE_SIZE": "32"},
    "bits": {"MONARCH_COLD_BITS_V": "3"},
    "hot window": {"MONARCH_HOT_WINDOW": "48"},
    "sink tokens": {"MONARCH_SINK_TOKENS": "4"},
    "scorer": {"MONARCH_SCORER": "meanstd"},
    "residual": {"MONARCH_RESIDUAL_K": "on"},
}


def test_a_state_of_another_geometry_or_model_is_refused(
    patched_bin: Path, stock_bin: Path, tmp_path: Path, case: dict, saved: Path
) -> None:
    load = ["load", str(saved), -1]
    other = write_random_model(tmp_path / "other.gguf", head_dim=64, n_head=4, n_head_kv=2, seed=9)
    wider = write_random_model(tmp_path / "wider.gguf", head_dim=64, n_head=4, n_head_kv=4)
    cases = [case | {"env": PAGED | env, "steps": [load, *decode(2)]} for env in OTHERS.values()]
    cases += [case | {"env": PAGED, "model": str(model), "steps": [load, *decode(2)]} for model in (other, wider)]
    cases += [case | {"env": PAGED, "type_k": "bf16", "steps": [load, *decode(2)]}]
    cases += [case | {"env": PAGED, "n_ctx": 256, "steps": [load, *decode(2)]}]  # 256 tokens, of which it holds 230
    got = run_cases(patched_bin, tmp_path, cases)
    assert [result.info["status"][0] for result in got[:-1]] == [0] * (len(cases) - 1)
    assert got[-1].info["status"][0] == saved.stat().st_size
    (stock,) = run_cases(stock_bin, tmp_path, [case | {"steps": [load, *decode(2)]}])
    assert stock.info["status"][0] == 0


#
# any order of operations
#


def random_steps(seed: int, n_steps: int, file: str, n_ctx: int) -> list[list]:
    rng = np.random.default_rng(seed)
    steps, end, start, kept = [], 0, 0, None
    for _ in range(n_steps):
        kind = rng.random()
        if kind < 0.6 or end == 0:
            n = min(int(rng.choice([1, 1, 1, 7, 33, 90])), n_ctx - end - 1)
            if n > 0:
                steps.append(["decode", n])
                end += n
        elif kind < 0.75:
            end = int(rng.integers(max(start, end // 2), end + 1)) or 1
            steps.append(["rm", end])
        elif kind < 0.85 and end > 8:
            p0, p1 = sorted(int(p) for p in rng.integers(1, end - 2, 2))
            steps.append(["rm", p0, p1])
        elif kind < 0.92:
            steps.append(["save", file])
            kept = end
        elif kind < 0.98 and kept is not None:
            steps.append(["load", file, -1])
            end = kept
        elif kind >= 0.98:
            steps.append(["clear"])
            end = 0
    return steps


@pytest.mark.parametrize("n_sequences", [12, pytest.param(250, marks=pytest.mark.long)])
def test_any_order_of_operations_agrees_with_stock(
    patched_bin: Path, stock_bin: Path, tmp_path: Path, case: dict, n_sequences: int
) -> None:
    """500 steps (10,000 in the long run) of decoding, removing, saving, restoring, clearing; the codec is lossless."""
    ends = {"stock": [], "paged": []}
    for seed in range(n_sequences):
        for arm, cases in ends.items():
            steps = random_steps(seed, 42, str(tmp_path / f"{arm}-{seed}"), 640)
            tokens = random_tokens(sum(step[1] for step in steps if step[0] == "decode"), seed)
            cases.append(case | {"steps": steps, "tokens": tokens, "seed": seed})
    env = ENV | {"MONARCH_HOT_WINDOW": "24"}
    want = run_cases(stock_bin, tmp_path, [case | {"seed": 0} for case in ends["stock"]])
    got = run_cases(patched_bin, tmp_path, [case | {"env": env} for case in ends["paged"]])
    for seed, (a, b) in enumerate(zip(got, want, strict=True)):
        assert nmse(a.logits, b.logits) <= 1e-7, (seed, ends["paged"][seed]["steps"])
        assert (a.info["pos_min"], a.info["pos_max"]) == (b.info["pos_min"], b.info["pos_max"]), seed
