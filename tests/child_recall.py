"""Asks the recall model for every passphrase of one haystack and prints what came back as one line of JSON.

Runs on the library that LLAMA_CPP_LIB_PATH names, under whatever MONARCH_* knobs are set. On the patched one the
report has its statistics: after the haystack ("prefilled") and at the end. All layers are on the device, if the
environment names one (devices.py).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
from pathlib import Path

import llama_cpp
import numpy as np
from devices import register
from gguf import GGMLQuantizationType

from monarch_llamacpp import builder_stamp, library
from monarch_llamacpp.recall_text import Haystack, Needle, make_haystack
from monarch_llamacpp.shim import Shim

ROOM = 64  # for a question and its answer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--needles", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--omit", type=int, action="append", default=[], help="asked for, but not in the haystack")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--flash-attn", type=int, choices=(0, 1), default=0)
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


class Context:
    def __init__(self, args: argparse.Namespace) -> None:
        self.model = llama_cpp.llama_model_load_from_file(args.model.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = args.tokens + ROOM
        params.n_batch = params.n_ubatch = args.ubatch
        params.n_threads = params.n_threads_batch = args.threads
        params.type_k = params.type_v = GGMLQuantizationType[args.kv_type.upper()]
        params.flash_attn_type = args.flash_attn
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise SystemExit("no context")
        self.n_ubatch = args.ubatch
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def decode(self, tokens: list[int]) -> None:
        for start in range(0, len(tokens), self.n_ubatch):
            part = tokens[start : start + self.n_ubatch]
            array = (llama_cpp.llama_token * len(part))(*part)  # the batch only points at it
            status = llama_cpp.llama_decode(self.ctx, llama_cpp.llama_batch_get_one(array, len(part)))
            if status:
                raise SystemExit(f"llama_decode returned {status}")

    def rewind(self, n_tokens: int) -> None:
        if not llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.ctx), 0, n_tokens, -1):
            raise SystemExit(f"the tail after {n_tokens} tokens was not removed")

    def best_tokens(self) -> list[tuple[int, float]]:
        """The two likeliest next tokens with their logits."""
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.ctx, -1), (self.n_vocab,))
        return [(int(token), float(logits[token])) for token in np.argsort(logits)[:-3:-1]]


def ask(context: Context, haystack: Haystack, needle: Needle) -> dict:
    """Greedy, one token at a time, as many as the answer has: its full stop and the end of text included."""
    context.rewind(len(haystack.tokens))
    context.decode(needle.question_tokens())
    written, margin = [], float("inf")
    for expected in needle.answer_tokens():
        (token, first), (_, second) = context.best_tokens()
        written.append(token)
        margin = min(margin, first - second)
        if token != expected:
            break
        context.decode([token])
    return {
        "key": needle.key,
        "position": needle.position,
        "correct": written == needle.answer_tokens(),
        "written": "".join(piece(context, token) for token in written),
        "margin": margin,
    }


def piece(context: Context, token: int) -> str:
    buffer = ctypes.create_string_buffer(64)
    vocab = llama_cpp.llama_model_get_vocab(context.model)
    size = llama_cpp.llama_token_to_piece(vocab, token, buffer, len(buffer), 0, True)
    return buffer.raw[:size].decode("latin-1")


def statistics(context: Context) -> dict | None:
    if not builder_stamp.shim_file(Path(os.environ["LLAMA_CPP_LIB_PATH"])).is_file():
        return None
    module = library.load()
    return dataclasses.asdict(Shim(module.ffi, module.lib).stats(context.ctx))


def tokenized(context: Context, text: str) -> list[int]:
    vocab = llama_cpp.llama_model_get_vocab(context.model)
    data = text.encode()
    out = (llama_cpp.llama_token * (len(data) + 8))()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), out, len(out), True, False)
    return list(out[:n])


def main() -> None:
    args = parse_args()
    register()
    haystack = make_haystack(args.tokens, args.needles, args.seed, args.omit)
    context = Context(args)
    context.decode(haystack.tokens)
    report = {"n_tokens": len(haystack.tokens), "tokenizes": tokenized(context, haystack.text) == haystack.tokens}
    report["prefilled"] = statistics(context)
    report["needles"] = [ask(context, haystack, needle) for needle in haystack.needles]
    report["stats"] = statistics(context)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
