"""What every arm's quality is measured on, in tokens: made once, in a process with the stock library."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import ab_text
from .ab_arms import stock_arm
from .ab_child import Report, make_parser, open_model, run_child, run_main
from .ab_settings import Settings

N_UBATCH = 64  # the last query of a ubatch sees up to hot_window + n_ubatch - 1 exact tokens
MOST_LOGITS = 1 << 27  # of one reference: 512 MiB


def make_plan(settings: Settings, file: Path) -> Report:
    """Writes the plan to the file."""
    options = ["--text-tokens", settings.text_tokens, "--decode-tokens", settings.decode_tokens]
    options += ["--chunks", settings.chunks]
    options += ["--lengths", ",".join(map(str, settings.lengths)), "--haystacks", settings.haystacks]
    options += ["--text", settings.text] if settings.text else []
    plan = run_child(stock_arm(), __name__, [settings.model, *options], 0, settings)
    n_tokens = len(plan["chunks"][0])
    parts = range(1, settings.continuations + 1)
    plan["cuts"] = sorted({n_tokens * i // settings.continuations for i in parts})
    plan["n_continue"] = settings.continue_tokens
    file.write_text(json.dumps(plan), encoding="utf-8")
    return plan


def _measure(args: argparse.Namespace) -> Report:
    llm = open_model(args, 64, N_UBATCH)
    trained = llm._model.n_ctx_train()
    given = args.text.read_text(encoding="utf-8", errors="replace") if args.text else None
    name = llm.metadata.get("general.name", "")

    def tokenize(text: str) -> list[int]:
        return llm.tokenize(text.encode(), add_bos=False, special=True)

    n_tokens = min(args.text_tokens, trained)
    chunks = ab_text.make_chunks(tokenize, llm.token_bos(), name, args.chunks, n_tokens, given)
    lengths = [n for n in args.lengths if n <= trained] or [trained]
    haystacks = ab_text.make_haystacks(tokenize, llm.token_bos(), name, lengths, args.haystacks, given)
    # the tokens that llama-perplexity scores of a chunk, unless that is too many
    n_scored = max(1, min(n_tokens // 2 - 1, MOST_LOGITS // llm.n_vocab() // args.chunks))
    decode = {"n_scored": n_scored, "n_decode": min(args.decode_tokens, n_scored), "n_ubatch": N_UBATCH}
    model = {"n_ctx_train": trained, "n_vocab": llm.n_vocab(), "name": name}
    return model | decode | {"chunks": chunks, "haystacks": ab_text.describe(haystacks)}


def main() -> int:
    parser = make_parser()
    parser.add_argument("--text", type=Path)
    parser.add_argument("--text-tokens", type=int, required=True)
    parser.add_argument("--decode-tokens", type=int, required=True)
    parser.add_argument("--chunks", type=int, required=True)
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], required=True)
    parser.add_argument("--haystacks", type=int, required=True)
    return run_main(_measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
