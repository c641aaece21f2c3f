#!/usr/bin/env python3
"""A long session: how long it took to read, to save and to restore, and how large its file is beside upstream's.

    python scripts/bench_restore.py MODEL.gguf [--tokens 65536] [--mode paged]

Needs `python -m monarch_llamacpp build`. Reading and restoring are processes of their own.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from monarch_llamacpp import library  # noqa: E402


def run(what: str, lib_dir: Path, file: Path, args: argparse.Namespace) -> dict:
    config = {
        "model": str(args.model), "depth": args.tokens, "n_gen": 0, "n_prompt": 0, "n_threads": args.threads,
        "type": "f16", "flash_attn": True, "v_trans": False, "fill": "state" if what == "size" else "prefill",
        "n_gpu_layers": 0, "logits": None,
    }  # fmt: skip
    env = os.environ | {"LLAMA_CPP_LIB_PATH": str(lib_dir), "MONARCH_MODE": args.mode}
    command = [sys.executable, __file__, "--child", what, json.dumps(config), str(file)]
    result = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{what}: ended with status {result.returncode}, see above")
    return json.loads(result.stdout)


def child(what: str, config: dict, file: Path) -> dict[str, float]:
    """One process: "save" reads the tokens and saves, "restore" loads that, "size" asks how large a state would be."""
    import llama_cpp
    from bench_child import Context

    ctx = Context(config)
    start = time.perf_counter()
    if what == "restore":
        tokens, n_tokens = (ctypes.c_int32 * 1)(), ctypes.c_size_t()
        size = llama_cpp.llama_state_seq_load_file(ctx.ctx, str(file).encode(), 0, tokens, 1, ctypes.byref(n_tokens))
        if not size:
            raise SystemExit("the state was refused: see the messages above")
        return {"seconds": time.perf_counter() - start, "bytes": size}
    ctx.fill()
    filled = time.perf_counter()
    if what == "size":
        return {"bytes": llama_cpp.llama_state_seq_get_size(ctx.ctx, 0)}
    size = llama_cpp.llama_state_seq_save_file(ctx.ctx, str(file).encode(), 0, None, 0)
    return {"seconds": filled - start, "save_seconds": time.perf_counter() - filled, "bytes": size}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--mode", default="paged", help="of the patched library")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "session"
        saved = run("save", library.patched_dir(), file, args)
        restored = run("restore", library.patched_dir(), file, args)
        stock = run("size", library.stock_dir(), file, args)
    print(
        f"{args.tokens} tokens, mode {args.mode}: read in {saved['seconds']:.1f} s,"
        f" saved in {saved['save_seconds']:.2f} s"
        f" ({saved['bytes'] / 2**20:.0f} MiB, {saved['bytes'] / stock['bytes']:.3f} of upstream's f16),"
        f" restored in {restored['seconds']:.2f} s: {100 * restored['seconds'] / saved['seconds']:.2f} % of reading"
    )


if __name__ == "__main__":
    main()
