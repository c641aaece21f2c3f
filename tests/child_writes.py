"""Runs in a child process on the patched library: saves states where the disk takes only some of the bytes.

Arguments: model, file, tokens in the state. Prints the sizes tried, what was taken although it did not fit, and whether
each kind of file is saved whole, and restored, once it fits.
"""

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable

import child_logits
import llama_cpp
from logits import random_tokens

PAGE = 4096  # the C library writes as many bytes at a time


def limited(n_bytes: int, save: Callable[[], int]) -> int:
    """Files end at n_bytes: a write that crosses it is short, one beyond it fails. Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        return save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def main() -> None:
    model, path, n_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    ctx = child_logits.Context({"model": model, "n_ctx": 640, "n_ubatch": 64, "env": dict(os.environ)})
    tokens = random_tokens(n_tokens)
    assert ctx.decode(tokens, 0)[0] == 0
    array = (llama_cpp.llama_token * n_tokens)(*tokens)
    saves = [
        lambda name: llama_cpp.llama_state_seq_save_file(ctx.ctx, name, 0, array, n_tokens),
        lambda name: llama_cpp.llama_state_save_file(ctx.ctx, name, array, n_tokens),
    ]
    sizes, taken, whole = [], [], []
    for save in saves:
        assert save(path.encode())
        size = os.path.getsize(path)
        tried = sorted({0, 1, 11, 12, *range(PAGE, size, PAGE), *range(PAGE + 1, size, PAGE), size // 2, size - 1})
        taken += [n for n in tried if limited(n, lambda save=save: save(path.encode()))]
        taken += ["/dev/full"] if save(b"/dev/full") else []
        sizes += tried
        whole.append(bool(limited(size, lambda save=save: save(path.encode()))) and os.path.getsize(path) == size)
    out = (llama_cpp.llama_token * n_tokens)()
    n_out = ctypes.c_size_t()
    whole[-1] &= llama_cpp.llama_state_load_file(ctx.ctx, path.encode(), out, n_tokens, ctypes.byref(n_out))
    assert list(out) == tokens and ctx.decode(tokens[:1], n_tokens)[0] == 0
    print(json.dumps({"sizes": sizes, "taken": taken, "whole": whole}))


if __name__ == "__main__":
    main()
