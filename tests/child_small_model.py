"""Asks a small model for facts hidden in a text and prints what it answered as one line of JSON.

Runs on the library that LLAMA_CPP_LIB_PATH names, under whatever MONARCH_* knobs are set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import llama_cpp
from small_model.needles import ask, make_needle, tokenize

from monarch_llamacpp import builder_stamp, library
from monarch_llamacpp.ab_text import is_found
from monarch_llamacpp.recall_text import make_haystack
from monarch_llamacpp.shim import Shim

ROOM = 64  # for an answer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--depths", type=lambda text: [float(part) for part in text.split(",")], required=True)
    parser.add_argument("--facts", type=int, default=1)
    return parser.parse_args()


def statistics(llm: llama_cpp.Llama) -> dict | None:
    if not builder_stamp.shim_file(Path(os.environ["LLAMA_CPP_LIB_PATH"])).is_file():
        return None
    module = library.load()
    return dataclasses.asdict(Shim(module.ffi, module.lib).stats(llm.ctx))


def main() -> None:
    args = parse_args()
    llm = llama_cpp.Llama(args.model, n_ctx=args.tokens + ROOM, n_batch=512, n_ubatch=512, n_threads=1, verbose=False)
    text = tokenize(llm, make_haystack(4 * args.tokens, 1).text)
    asked = []
    for i, depth in enumerate(args.depths):
        needle = make_needle(llm, text, args.tokens, depth, args.facts, random.Random(i))
        answer = ask(llm, needle)
        right = is_found(answer, needle.fact.value)
        asked.append({"fact": needle.fact.statement, "answer": answer, "right": right, "position": needle.position})
    print(json.dumps({"asked": asked, "stats": statistics(llm)}))


if __name__ == "__main__":
    main()
