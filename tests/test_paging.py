"""The paged cache against the stock library: same logits where nothing is lost, refusals, and bookkeeping."""

from pathlib import Path

import crafted
import numpy as np
import pytest
from logits import EXACT_CODEC, Result, nmse, random_tokens, run_cases

from models import write_random_model
from monarch_llamacpp import recall
from monarch_llamacpp.codec import Codec

SHAPES = [  # head size, query heads, KV heads, architecture, tokens per ubatch
    (32, 4, 4, "llama", 1),
    (64, 8, 2, "llama", 17),
    (80, 4, 1, "qwen2", 128),
    (96, 8, 1, "llama", 512),
    (128, 2, 2, "qwen3", 64),
    (192, 4, 2, "llama", 33),
    (256, 2, 1, "llama", 100),
]

N_PREFILL, N_DECODE = 300, 60

FEW_STICKY = {"MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": "48", "MONARCH_STICKY_THRESHOLD": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paging")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[dict]:
    res = []
    for head_dim, n_head, n_head_kv, arch, n_ubatch in SHAPES:
        model = folder / f"{arch}-{head_dim}.gguf"
        write_random_model(model, arch=arch, head_dim=head_dim, n_head=n_head, n_head_kv=n_head_kv)
        steps = [["decode", N_PREFILL]] + [["decode", 1]] * N_DECODE
        tokens = random_tokens(N_PREFILL + N_DECODE, seed=head_dim)
        res.append({"model": str(model), "n_ctx": 640, "n_ubatch": n_ubatch, "tokens": tokens, "steps": steps})
    return res


@pytest.fixture(scope="module")
def stock(stock_bin: Path, folder: Path, cases: list[dict]) -> list[Result]:
    return run_cases(stock_bin, folder, cases)


def run_patched(patched_bin: Path, folder: Path, cases: list[dict], env: dict[str, str], seed: int = 0) -> list[Result]:
    return run_cases(patched_bin, folder, [case | {"env": env, "seed": seed} for case in cases])


@pytest.fixture
def same_flags(sanitizer: str) -> None:
    if sanitizer:
        pytest.skip("stock was compiled with other flags, which round otherwise")


@pytest.mark.usefixtures("same_flags")
def test_paging_off_is_bit_identical(patched_bin: Path, folder: Path, cases: list[dict], stock: list[Result]) -> None:
    for got, want in zip(run_patched(patched_bin, folder, cases, {}), stock, strict=True):
        assert np.array_equal(got.logits, want.logits)
        assert "stats" not in got.info


@pytest.mark.usefixtures("same_flags")
def test_paging_off_is_bit_identical_on_the_recall_model(patched_bin: Path, stock_bin: Path, folder: Path) -> None:
    recall.write_recall_model(folder / "recall.gguf")
    steps = [["decode", N_PREFILL]] + [["decode", 1]] * N_DECODE
    case = {"model": str(folder / "recall.gguf"), "n_ctx": 640, "n_ubatch": 128, "steps": steps}
    case["tokens"] = random_tokens(N_PREFILL + N_DECODE)
    (want,), (got,) = run_cases(stock_bin, folder, [case]), run_cases(patched_bin, folder, [case])
    assert np.array_equal(got.logits, want.logits)


@pytest.mark.parametrize("seed", [0, 7])
def test_exact_equals_stock_when_nothing_is_lost(
    patched_bin: Path, folder: Path, cases: list[dict], stock: list[Result], seed: int
) -> None:
    env = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "32"}
    for got, want in zip(run_patched(patched_bin, folder, cases, env, seed), stock, strict=True):
        assert nmse(got.logits, want.logits) <= 1e-7
        assert got.info["stats"]["n_cold"] >= 0.8 * (N_PREFILL + N_DECODE)
        assert got.info["stats"]["n_promoted"] > 0


def test_paged_equals_stock_when_the_budget_covers_all(
    patched_bin: Path, folder: Path, cases: list[dict], stock: list[Result]
) -> None:
    env = EXACT_CODEC | {"MONARCH_MODE": "paged", "MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": "4096"}
    for got, want in zip(run_patched(patched_bin, folder, cases, env, 3), stock, strict=True):
        assert nmse(got.logits, want.logits) <= 1e-7
        assert got.info["stats"]["n_promotions"] == got.info["stats"]["n_scored"] > 0


def test_the_oracle_sees_a_lost_page(
    patched_bin: Path, folder: Path, cases: list[dict], stock: list[Result]
) -> None:
    env = EXACT_CODEC | {"MONARCH_MODE": "window", "MONARCH_HOT_WINDOW": "304"}
    for got, want in zip(run_patched(patched_bin, folder, cases, env), stock, strict=True):
        assert got.info["stats"]["n_pages"] == 2  # of 360 tokens
        assert nmse(got.logits[-1], want.logits[-1]) > 1e-5


def test_flash_attention_mask_and_hot_types(
    patched_bin: Path, folder: Path, cases: list[dict], stock: list[Result]
) -> None:
    """F16 masks (flash attention on) and every hot type; bf16 and q8_0 cost what their precision costs."""
    env = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "32"}
    case = cases[1] | {"env": env, "flash_attn": True}
    limits = {"f16": 1e-7, "f32": 1e-7, "bf16": 1e-4, "q8_0": 1e-3}
    typed = [case | {"type_k": name, "type_v": name} for name in limits]
    for (name, limit), got in zip(limits.items(), run_cases(patched_bin, folder, typed), strict=True):
        assert nmse(got.logits, stock[1].logits) <= limit, name


def test_graph_is_reused(patched_bin: Path, folder: Path, cases: list[dict]) -> None:
    """From token to token the graph stays, page-outs included, in every mode; the ring grows it once past 256 slots."""
    case = cases[1] | {"n_ubatch": 64}
    for mode in ("window", "paged", "exact", "auto"):
        env = {"MONARCH_MODE": mode, "MONARCH_HOT_WINDOW": "32"}
        (got,) = run_cases(patched_bin, folder, [case | {"env": env}])
        assert got.info["stats"]["n_page_outs"] > 10
        assert got.info["n_reused"] >= N_DECODE - 1, mode


def test_ubatch_size_does_not_matter_when_nothing_is_lost(patched_bin: Path, folder: Path, cases: list[dict]) -> None:
    env = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "16", "MONARCH_PAGE_SIZE": "8"}
    sizes = [1, 7, 64, 512]
    results = run_cases(patched_bin, folder, [cases[1] | {"env": env, "n_ubatch": n} for n in sizes])
    for got in results[1:]:
        assert nmse(got.logits, results[0].logits) <= 1e-7


MODES = [  # mode, kernel, tokens promoted
    ("paged", "plain", 64),
    ("paged", None, 4096),
    ("paged", None, 64),
    ("exact", None, 64),
    ("window", None, 64),
]

# numbers of threads that cut a KV head's block into as many parts, by KV heads; with one head no two numbers do
SHARES = {4: [(1, 2, 4), (3, 8)], 2: [(1, 2), (3, 6)], 1: [(2, 2), (3, 3)]}


def mode_env(mode: str, kernel: str | None, promote_tokens: int) -> dict[str, str]:
    env = {"MONARCH_MODE": mode, "MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": str(promote_tokens)}
    return env | ({"MONARCH_KERNEL": kernel} if kernel else {})


@pytest.mark.parametrize(("mode", "kernel", "promote_tokens"), MODES)
def test_threads_that_share_alike_give_the_same_bits(
    patched_bin: Path, folder: Path, cases: list[dict], mode: str, kernel: str | None, promote_tokens: int
) -> None:
    """Which thread does what changes nothing, nor what scratch held before."""
    env = mode_env(mode, kernel, promote_tokens)
    for (_, _, n_head_kv, *_), case in zip(SHAPES, cases, strict=True):
        numbers = [n for share in SHARES[n_head_kv] for n in share]
        results = iter(run_cases(patched_bin, folder, [case | {"env": env, "n_threads": n} for n in numbers], env=env))
        for share in SHARES[n_head_kv]:
            first, *others = [next(results) for _ in share]
            for got in others:
                assert np.array_equal(got.logits, first.logits), share
                assert got.info["stats"] == first.info["stats"], share


CODEC_ERROR = 0.007  # of records of 4 bits: docs/codec.md


def moved_records(got: Path, want: Path, head_dim: int) -> np.ndarray:
    """Of every cold record of two states the square of its move, in squares of its length."""
    codec = Codec(head_dim)
    states = [crafted.parse(path.read_bytes()) for path in (got, want)]
    assert states[0].pages == states[1].pages
    (a, b), size = (b"".join(state.cold) for state in states), sum(codec.sizes())
    moves = []
    for at in range(0, len(a), size):
        blocks = a[at : at + size], b[at : at + size]
        for decode in (codec.decode_page_k, codec.decode_page_v):
            x, y = map(decode, blocks)
            moves.append(np.square(x - y).sum(-1) / np.square(y).sum(-1))
    return np.concatenate(moves)


# what paged chooses among pages that are as good as each other is compared on the plain path: with rounded scores a
# last bit decides more often
@pytest.mark.parametrize(
    ("mode", "kernel", "promote_tokens", "limit"),
    [(*mode, 1e-2 if mode == ("paged", None, 64) else 1e-7) for mode in MODES],
)
def test_parts_matter_as_far_as_records_move(
    patched_bin: Path, folder: Path, cases: list[dict], mode: str, kernel: str | None, promote_tokens: int, limit: float
) -> None:
    """More threads than KV heads share the ring and the pages of a head. Sums round differently, then a value of K or V
    in f16 may, then the codec takes another scale where two were as good: few records move, none further than its error
    allows, and the logits as far as the records, in proportion to what 4 bits cost."""
    env = mode_env(mode, kernel, promote_tokens)
    exact = {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "32"}
    for (head_dim, *_), case in zip(SHAPES, cases, strict=True):
        lossy, lossless = run_cases(patched_bin, folder, [case | {"env": exact | more} for more in ({}, EXACT_CODEC)])
        loss = nmse(lossy.logits, lossless.logits)

        numbers = (1, 2, 3, 5, 8)
        states = [folder / f"state-{n}" for n in numbers]
        shared = [
            case | {"env": env, "n_threads": n, "steps": [*case["steps"], ["save", str(state)]]}
            for n, state in zip(numbers, states, strict=True)
        ]
        one, *others = run_cases(patched_bin, folder, shared, env=env)
        for got, state in zip(others, states[1:], strict=True):
            apart = {name for name, value in got.info["stats"].items() if value != one.info["stats"][name]}
            assert apart <= ({"n_sticky"} if limit == 1e-2 else set())
            moves = moved_records(state, states[0], head_dim)
            if limit < 1e-2:
                assert (moves > 0).mean() <= 0.01 and moves.max() <= 6 * CODEC_ERROR
                assert nmse(got.logits, one.logits) <= 1e-8 + 4 * loss * moves.mean() / CODEC_ERROR
            assert nmse(got.logits, one.logits) <= limit


def test_budgets_are_hard_caps(patched_bin: Path, folder: Path, cases: list[dict]) -> None:
    """Layer 0 is dense (4 pages), layer 1 promotes 2; sticky pages count within the budget."""
    env = {
        "MONARCH_MODE": "paged", "MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": "32",
        "MONARCH_DENSE_LAYERS": "1", "MONARCH_DENSE_TOKENS": "64", "MONARCH_STICKY_THRESHOLD": "1",
    }  # fmt: skip
    (got,) = run_cases(patched_bin, folder, [cases[1] | {"env": env}])
    n_head_kv = 2
    assert got.info["stats"]["n_promoted"] == n_head_kv * (4 + 2)
    assert 0 < got.info["stats"]["n_sticky"] <= n_head_kv * (4 + 2)


def test_larger_threshold_never_promotes_more(patched_bin: Path, folder: Path, cases: list[dict]) -> None:
    env = {"MONARCH_MODE": "paged", "MONARCH_HOT_WINDOW": "32", "MONARCH_STICKY_THRESHOLD": "0"}
    thresholds = ["0", "0.02", "0.05", "0.2", "1"]
    prefill = cases[1] | {"n_ubatch": 512, "steps": [["decode", N_PREFILL], ["decode", 1]]}
    results = run_cases(
        patched_bin, folder, [prefill | {"env": env | {"MONARCH_PROMOTION_THRESHOLD": t}} for t in thresholds]
    )
    promotions = [got.info["stats"]["n_promotions"] for got in results]
    assert promotions == sorted(promotions, reverse=True)
    assert promotions[0] > promotions[2] > promotions[-1] == 0


def test_context_full_returns_1_and_keeps_what_is_there(patched_bin: Path, folder: Path, cases: list[dict]) -> None:
    env = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "32"}
    tokens = random_tokens(400)
    case = cases[1] | {"env": env, "n_ctx": 256, "n_ubatch": 32, "tokens": tokens}
    full = case | {"steps": [["decode", 250], ["decode", 7], ["decode", 6], ["decode", 1]]}
    plain = case | {"steps": [["decode", 250], ["decode", 6]]}
    got, want = run_cases(patched_bin, folder, [full, plain])
    assert got.info["status"] == [0, 1, 0, 1]
    assert np.array_equal(got.logits, want.logits)
    assert got.info["stats"]["n_tokens"] == 256


def test_tail_removal_at_any_depth(patched_bin: Path, stock_bin: Path, folder: Path, cases: list[dict]) -> None:
    """Hot, cold at a page's border, cold inside a page, inside the sink tokens, everything."""
    for p0 in (355, 16 + 5 * 16, 16 + 5 * 16 + 9, 17, 16, 7, 0):
        steps = [["decode", 360], ["rm", p0], ["decode", 100], ["rm", p0 + 90], ["decode", 40]]
        case = cases[1] | {"tokens": random_tokens(500, seed=p0), "steps": steps}
        env = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "32"}
        (got,) = run_cases(patched_bin, folder, [case | {"env": env}])
        (want,) = run_cases(stock_bin, folder, [case])
        assert got.info["status"] == [0, 1, 0, 1, 0]
        assert (got.info["pos_min"], got.info["pos_max"]) == (0, p0 + 129)
        assert got.info["stats"]["n_tokens"] == p0 + 130
        assert nmse(got.logits, want.logits) <= 1e-7, p0


def test_clear_forgets(patched_bin: Path, folder: Path, cases: list[dict]) -> None:
    """A cleared cache answers like a new one, promotions included."""
    env = FEW_STICKY | {"MONARCH_MODE": "paged"}
    tokens = random_tokens(320)
    once = [["decode", 300]] + [["decode", 1]] * 20
    fresh = cases[1] | {"env": env, "tokens": tokens, "steps": once}
    again = cases[1] | {"env": env, "tokens": tokens * 2, "steps": once + [["clear"]] + once}
    one, two = run_cases(patched_bin, folder, [fresh, again])
    assert np.array_equal(two.logits[320:], one.logits)


@pytest.mark.parametrize("mode", ["paged", "exact"])
def test_abort_at_every_node_changes_nothing(patched_bin: Path, folder: Path, cases: list[dict], mode: str) -> None:
    """A prefill and some decodes, each aborted after node 1, 2, ...: then the same logits as undisturbed."""
    env = FEW_STICKY | {"MONARCH_MODE": mode}
    case = cases[1] | {"env": env, "n_ubatch": 64, "tokens": random_tokens(240)}
    sizes = [100, 64] + [1] * 40
    calm = case | {"steps": [["decode", n] for n in sizes]}
    # one decode in eight and the second prefill are aborted everywhere: page-outs fall on every 16th token
    rough = case | {"steps": [["abort" if i == 1 or i % 8 < 2 else "decode", n] for i, n in enumerate(sizes)]}
    rough["steps"][0] = ["decode", 100]
    want, got = run_cases(patched_bin, folder, [calm, rough])
    assert min(got.info["aborts"]) > 20
    assert np.array_equal(got.logits, want.logits)
    assert got.info["stats"] == want.info["stats"]


def test_a_graph_that_cb_eval_stops_loses_nothing(patched_bin: Path, folder: Path, cases: list[dict]) -> None:
    """Upstream calls it a success. Taken back and decoded again, as a prefill and where page-outs fall."""
    env = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "32"}
    case = cases[1] | {"env": env, "n_ubatch": 64, "tokens": random_tokens(200)}
    sizes = [100, 64] + [1] * 36
    calm = case | {"steps": [["decode", n] for n in sizes]}
    rough = case | {"steps": [["stop" if i == 1 or 20 < i < 24 else "decode", n] for i, n in enumerate(sizes)]}
    want, got = run_cases(patched_bin, folder, [calm, rough])
    assert min(got.info["aborts"]) > 20
    assert nmse(got.logits, want.logits) <= 1e-7
    # a stop after the last layer's page-outs leaves them done
    assert got.info["stats"]["n_page_outs"] >= want.info["stats"]["n_page_outs"] > 8


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"MONARCH": "yes"}, "MONARCH = yes: must be 0 or 1"),
        ({"MONARCH_MODE": "fast"}, "MONARCH_MODE = fast: must be one of off window paged exact auto"),
        ({"MONARCH": "1", "MONARCH_HOT_WINDOW": "8"}, "MONARCH_HOT_WINDOW = 8: must be from 16 to 1048576"),
        ({"MONARCH": "1", "MONARCH_PAGE_SIZE": "12"}, "page_size = 12: must be 8, 16 or 32"),
        ({"MONARCH": "1", "MONARCH_KERNEL": "avx"}, "MONARCH_KERNEL = avx: must be one of avx512 avx2 neon plain"),
        ({"MONARCH": "1", "MONARCH_FRAMES": "4"}, "frames = 4: frames need cold_tier = ram and a device that"),
    ],
)
def test_bad_knobs_are_refused_by_name(
    patched_bin: Path, folder: Path, cases: list[dict], knobs: dict[str, str], error: str
) -> None:
    with pytest.raises(AssertionError, match=f"failed to initialize the context: monarch: {error}"):
        run_cases(patched_bin, folder, [cases[1] | {"env": knobs}])
