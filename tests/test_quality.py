"""What 4-bit pages cost a real model: perplexity and KL divergence against f16, beside upstream's 4-bit KV types."""

from pathlib import Path

import numpy as np
import pytest
from child import run_child_json
from logits import run_cases

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "tinystories-3m-f32.gguf"
TEXT = SHARED / "data" / "tinystories-1000.txt"

N_CTX = 512
EXACT = {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "64"}

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason=f"needs the real model {MODEL.name}, which is not shipped")


@pytest.fixture(scope="module")
def chunks(stock_bin: Path) -> list[list[int]]:
    res = run_child_json(stock_bin, "child_tokens.py", [MODEL, TEXT, 60000])
    n = N_CTX - 1
    return [[res["bos"], *res["tokens"][i : i + n]] for i in range(0, len(res["tokens"]) - n, n)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def run_arm(
    lib_dir: Path, folder: Path, chunks: list[list[int]], steps: list, **case: object
) -> tuple[np.ndarray, list[dict]]:
    """Log-probabilities of the second half of every chunk, as upstream's perplexity counts them."""
    base = {"model": str(MODEL), "n_ctx": N_CTX, "n_ubatch": 16, "steps": steps} | case
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
    stock_bin: Path, patched_bin: Path, chunks: list[list[int]], tmp_path: Path, way: str
) -> None:
    chunks = chunks[:12] if way == "prefill" else chunks[:4]
    steps = [["decode", N_CTX]] if way == "prefill" else [["decode", 1]] * N_CTX
    base, _ = run_arm(stock_bin, tmp_path, chunks, steps)
    arms = {name: run_arm(stock_bin, tmp_path, chunks, steps, type_k=name, type_v=name, flash_attn=True)[0]
            for name in ("f16", "q4_0", "iq4_nl")}  # fmt: skip
    arms["exact"], infos = run_arm(patched_bin, tmp_path, chunks, steps, env=EXACT)

    for name, log_p in arms.items():
        print(f"{way} {name}: perplexity {perplexity(log_p, chunks):.4f}, mean KL {divergence(base, log_p):.2e}")
    print(f"{way} f16 -fa 0: perplexity {perplexity(base, chunks):.4f}")

    assert all(info["stats"]["n_cold"] >= 0.8 * N_CTX for info in infos)
    assert divergence(base, arms["f16"]) < 1e-4  # the control: the yardstick itself is exact
    assert abs(perplexity(arms["exact"], chunks) / perplexity(base, chunks) - 1) <= 0.005
    assert divergence(base, arms["exact"]) <= divergence(base, arms["q4_0"])
    assert divergence(base, arms["exact"]) > divergence(base, arms["f16"])  # pages were really coded
