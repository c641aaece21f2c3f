#!/usr/bin/env python3
"""Measures a small model on unmodified upstream: perplexity and recall, on novels that training left out.

    python scripts/eval_small_model.py MODEL.gguf --novels NOVELS [--json FILE]

NOVELS: a folder or a tar archive of text files; models/README.md says which.

LLAMA_CPP_LIB_PATH, when set, names another library to ask for the needles (with MONARCH_*: its knobs).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from small_model.needles import ask, make_needle, tokenize  # noqa: E402
from small_model.novels import read_novels, split_novels  # noqa: E402

from monarch_llamacpp import library  # noqa: E402
from monarch_llamacpp.ab_text import is_found  # noqa: E402

os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(library.stock_dir()))

import numpy as np  # noqa: E402
from llama_cpp import Llama  # noqa: E402

LENGTHS = (256, 512, 1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTS = (1, 8)
SEED = 7
ROOM = 64  # for the answer


def open_model(path: Path, n_ctx: int, **options: object) -> Llama:
    options |= {"n_batch": 512, "n_ubatch": 512, "n_threads": 1, "n_threads_batch": 1}  # too small for more
    return Llama(str(path), n_ctx=n_ctx, verbose=False, **options)


def measure_perplexity(model: Path, texts: list[str], n_ctx: int, n_chunks: int) -> dict:
    """As llama-perplexity counts it: the second half of every chunk is scored."""
    llm = open_model(model, n_ctx, logits_all=True)
    losses = []
    for novel in texts:
        tokens = tokenize(llm, novel[len(novel) // 2 :][: 8 * n_ctx * n_chunks])
        starts = range(0, n_chunks // len(texts) * (n_ctx - 1), n_ctx - 1)
        losses += [chunk_loss(llm, [llm.token_bos(), *tokens[i : i + n_ctx - 1]]) for i in starts]
    return {"metric": "perplexity", "n_ctx": n_ctx, "n_chunks": len(losses), "value": float(np.exp(np.mean(losses)))}


def chunk_loss(llm: Llama, tokens: list[int]) -> float:
    llm.reset()
    llm.eval(tokens)
    half = len(tokens) // 2
    logits = np.asarray(llm.scores[half : len(tokens) - 1], np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -float(logits[np.arange(len(logits)), tokens[half + 1 :]].mean())


def measure_recall(llm: Llama, text: list[int], n_tokens: int, depth: float, n_facts: int, n_samples: int) -> dict:
    rng = random.Random(f"{SEED} {n_tokens} {depth} {n_facts}")
    wrong = []
    for _ in range(n_samples):
        needle = make_needle(llm, text, n_tokens, depth, n_facts, rng)
        answer = ask(llm, needle)
        if not is_found(answer, needle.fact.value):
            wrong.append([needle.fact.statement, answer])
    row = {"metric": "recall", "n_tokens": n_tokens, "depth": depth, "n_facts": n_facts, "n_samples": n_samples}
    return row | {"value": 1 - len(wrong) / n_samples, "wrong": wrong}


def print_table(rows: list[dict], n_facts: int) -> None:
    """Markdown, as in the model card."""
    print(f"\n| tokens ({n_facts} facts) | " + " | ".join(f"depth {depth:.0%}" for depth in DEPTHS) + " | all |")
    print("|---" * (len(DEPTHS) + 2) + "|")
    for n_tokens in sorted({row["n_tokens"] for row in rows}):
        values = [row["value"] for row in rows if (row["n_tokens"], row["n_facts"]) == (n_tokens, n_facts)]
        cells = [f"{value:.0%}" for value in values] + [f"{sum(values) / len(values):.1%}"]
        print(f"| {n_tokens} | " + " | ".join(cells) + " |")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--novels", type=Path, required=True, help="folder or tar archive of .txt files")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=LENGTHS)
    parser.add_argument("--samples", type=int, default=20, help="questions for each length, depth and number of facts")
    parser.add_argument("--chunks", type=int, default=64, help="of 2048 tokens, for the perplexity; 0: none")
    parser.add_argument("--json", type=Path, help="write all rows there, wrong answers included")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    texts = split_novels(read_novels(args.novels))[1]
    rows = []
    for n_ctx, n_chunks in ((512, 4 * args.chunks), (2048, args.chunks)) if args.chunks else ():
        rows.append(measure_perplexity(args.model, texts, n_ctx, n_chunks))
        print("perplexity of {n_chunks} chunks of {n_ctx} tokens: {value:.2f}".format(**rows[-1]), flush=True)
    llm = open_model(args.model, max(args.lengths) + ROOM)
    text = [token for novel in texts for token in tokenize(llm, novel[len(novel) // 3 :][:200_000])]
    recall = []
    for n_facts in FACTS:
        for n_tokens in args.lengths:
            recall += [measure_recall(llm, text, n_tokens, depth, n_facts, args.samples) for depth in DEPTHS]
            print(".", end="", file=sys.stderr, flush=True)
        print_table([row for row in recall if row["n_facts"] == n_facts], n_facts)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows + recall))
    return 0


if __name__ == "__main__":
    sys.exit(main())
