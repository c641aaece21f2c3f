"""What 4-bit pages cost a real model: perplexity and KL divergence against f16, beside upstream's 4-bit KV types."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from child import TESTS, run_child_json
from logits import run_cases

from monarch_llamacpp.ab_quality_child import log_softmax
from monarch_llamacpp.ab_text import make_chunks

SHARED = TESTS.parents[1] / "shared"

N_CTX = 512
EXACT = {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "64"}


class Subject(NamedTuple):
    model: Path
    text: Path | None  # None: one as `ab` makes it
    n_chunks: dict[str, int]  # of N_CTX tokens
    perplexity_change: float  # at most, of exact against f16
    control: float  # KL divergence, at most, of f16 with flash attention
    paged: float  # KL divergence, at most, as a share of the window's


# Measured, through a prompt and token by token. Shipped: exact changes perplexity by +0.19 % and -0.14 %, its
# divergence is 0.0019 both ways, q4_0's 0.018 and 0.017, the control's 0.00015; paged has 0.09 of the window's.
# TinyStories: -0.09 % and -0.13 %, 0.0002, 0.003, 5e-7; 0.33.
SUBJECTS = {
    "shipped": Subject(
        TESTS.parent / "models" / "monarch-small.gguf", None,
        {"prefill": 6, "decode": 3}, perplexity_change=0.003, control=3e-4, paged=0.15,
    ),
    "tinystories": Subject(
        SHARED / "models" / "tinystories-3m-f32.gguf", SHARED / "data" / "tinystories-1000.txt",
        {"prefill": 12, "decode": 4}, perplexity_change=0.005, control=1e-4, paged=0.45,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    res = SUBJECTS[request.param]
    for file in filter(None, (res.model, res.text)):
        if not file.exists():
            pytest.skip(f"needs {file.name}, which is not shipped")
    return res


@pytest.fixture(scope="module")
def text(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if subject.text:
        return subject.text
    res = tmp_path_factory.mktemp("quality") / "text"
    sentences: list[str] = []
    make_chunks(lambda sentence: sentences.append(sentence) or sentence.split(), 0, "any", 1, 3000, None)
    res.write_text("".join(sentences))
    return res


@pytest.fixture(scope="module")
def chunks(stock_bin: Path, subject: Subject, text: Path) -> list[list[int]]:
    res = run_child_json(stock_bin, "child_tokens.py", [subject.model, text, 60000])
    n = N_CTX - 1
    return [[res["bos"], *res["tokens"][i : i + n]] for i in range(0, len(res["tokens"]) - n, n)]


def run_arm(
    lib_dir: Path, folder: Path, model: Path, chunks: list[list[int]], steps: list, **case: object
) -> tuple[np.ndarray, list[dict]]:
    """Log-probabilities of the second half of every chunk, as upstream's perplexity counts them."""
    base = {"model": str(model), "n_ctx": N_CTX, "n_ubatch": 16, "n_threads": 1, "steps": steps} | case
    results = run_cases(lib_dir, folder, [base | {"tokens": chunk} for chunk in chunks])
    return np.concatenate([log_softmax(got.logits[N_CTX // 2 :]) for got in results]), [got.info for got in results]


def targets(chunks: list[list[int]]) -> np.ndarray:
    return np.concatenate([[*chunk[N_CTX // 2 + 1 :], 0] for chunk in chunks])


def perplexity(log_p: np.ndarray, chunks: list[list[int]]) -> float:
    scored = np.arange(len(log_p)) % (N_CTX // 2) != N_CTX // 2 - 1  # the last token of a chunk has no successor
    return float(np.exp(-log_p[np.arange(len(log_p)), targets(chunks)][scored].mean()))


def divergence(base: np.ndarray, log_p: np.ndarray) -> float:
    return float((np.exp(base) * (base - log_p)).sum(axis=1).mean())


@pytest.mark.parametrize("way", ["prefill", "decode"])
def test_exact_at_4_bits(
    stock_bin: Path, patched_bin: Path, subject: Subject, chunks: list[list[int]], tmp_path: Path, way: str
) -> None:
    chunks = chunks[: subject.n_chunks[way]]
    assert len(chunks) == subject.n_chunks[way]
    steps = [["decode", N_CTX]] if way == "prefill" else [["decode", 1]] * N_CTX
    arm = (tmp_path, subject.model, chunks, steps)
    base, _ = run_arm(stock_bin, *arm)
    arms = {name: run_arm(stock_bin, *arm, type_k=name, type_v=name, flash_attn=True)[0]
            for name in ("f16", "q4_0", "iq4_nl")}  # fmt: skip
    arms["exact"], infos = run_arm(patched_bin, *arm, env=EXACT)

    for name, log_p in arms.items():
        print(f"{way} {name}: perplexity {perplexity(log_p, chunks):.4f}, mean KL {divergence(base, log_p):.2e}")
    print(f"{way} f16 -fa 0: perplexity {perplexity(base, chunks):.4f}")

    assert all(info["stats"]["n_cold"] >= 0.8 * N_CTX for info in infos)
    assert divergence(base, arms["f16"]) < subject.control  # the control: the yardstick itself is exact
    assert abs(perplexity(arms["exact"], chunks) / perplexity(base, chunks) - 1) <= subject.perplexity_change
    assert divergence(base, arms["exact"]) <= divergence(base, arms["q4_0"])
    assert divergence(base, arms["exact"]) > divergence(base, arms["f16"])  # pages were really coded


def test_paged_reads_what_matters(
    stock_bin: Path, patched_bin: Path, subject: Subject, chunks: list[list[int]], tmp_path: Path
) -> None:
    """A quarter of the tokens is read: most of what the window alone loses comes back."""
    arm = (tmp_path, subject.model, chunks[: subject.n_chunks["decode"]], [["decode", 1]] * N_CTX)
    base, _ = run_arm(stock_bin, *arm)
    lost = {}
    for mode in ("window", "paged"):
        env = EXACT | {"MONARCH_MODE": mode, "MONARCH_PROMOTE_TOKENS": "64"}
        log_p, infos = run_arm(patched_bin, *arm, env=env)
        lost[mode] = divergence(base, log_p)
        print(f"{mode}: perplexity {perplexity(log_p, arm[2]):.4f}, mean KL {lost[mode]:.2e}")
        assert all(info["stats"]["n_cold"] >= 0.8 * N_CTX for info in infos)
    assert lost["paged"] <= subject.paged * lost["window"]


@pytest.mark.parametrize("subject", ["shipped"], indirect=True)  # the other's context is too short
def test_pages_get_what_is_estimated(patched_bin: Path, subject: Subject, text: Path) -> None:
    """On average: what the weights of estimates are for."""
    got = run_child_json(patched_bin, "child_estimates.py", [subject.model, text])
    ratio = sum(got["measured"]) / sum(got["estimated"])
    print(f"{len(got['measured'])} promotions, measured / estimated {ratio:.2f}")
    assert len(got["measured"]) > 1000
    assert 0.7 <= ratio <= 1.5
