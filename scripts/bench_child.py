"""One arm of bench_cpu.py or bench_cuda.py: a process of its own on the library that LLAMA_CPP_LIB_PATH names.

Argument: a JSON object with patched, model, depth, n_gen, n_prompt, n_threads, n_gpu_layers, type, flash_attn, v_trans,
fill, and logits: a file for those of the timed tokens, or null. The context is filled to the depth, then single tokens
and one prompt batch are timed there. fill is "state" (a synthetic sequence state in stock's format is restored, the
same values in every arm) or "prefill" (random tokens are decoded).
Prints one JSON object.
"""

import ctypes
import json
import re
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from monarch_llamacpp.device import free_vram  # noqa: E402

MAGIC = 0xAF143CD8  # of a sequence state, pinned llama.cpp
BLOCK = {"q4_0": (32, 18), "q8_0": (32, 34)}


def type_number(kind: str) -> int:
    return getattr(llama_cpp, f"GGML_TYPE_{kind.upper()}")


def random_rows(rng: np.random.Generator, n: int, width: int, kind: str) -> np.ndarray:
    """n rows of a K or V cache as bytes, values of unit variance."""
    drawn = min(n, 4096)
    if kind == "f16":
        rows = rng.standard_normal((drawn, width), np.float32).astype(np.float16).view(np.uint8)
    else:
        block, size = BLOCK[kind]
        rows = rng.integers(0, 256, (drawn, width // block, size), np.uint8)
        rows[:, :, :2] = np.array([1 / 4.6 if kind == "q4_0" else 1 / 74], np.float16).view(np.uint8)
        rows = rows.reshape(drawn, -1)
    return np.resize(rows, (n, rows.shape[1]))


def synthetic_state(depth: int, n_layer: int, width: int, kind: str, v_trans: bool) -> np.ndarray:
    """A stock state of one sequence with depth tokens; one layer's random rows serve for all."""
    rng = np.random.default_rng(1)
    cells = np.zeros((depth, 3), np.int32)
    cells[:, 0] = np.arange(depth)
    cells[:, 1] = 1
    head = np.array([MAGIC, 0, 1, depth], np.uint32).tobytes() + cells.tobytes()
    head += np.array([v_trans, n_layer], np.uint32).tobytes()
    k, v = random_rows(rng, depth, width, kind), random_rows(rng, depth, width, kind)
    row_head = np.array([type_number(kind)], np.int32).tobytes() + np.array([k.shape[1]], np.uint64).tobytes()
    v_head = np.array([type_number(kind), 2, width], np.int32).tobytes() if v_trans else row_head
    if v_trans:
        v = np.ascontiguousarray(v.view(np.float16).T).view(np.uint8)
    res = np.empty(len(head) + n_layer * (len(row_head) + k.size + len(v_head) + v.size), np.uint8)
    at = 0

    def put(data: bytes | np.ndarray) -> None:
        nonlocal at
        part = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1)
        res[at : at + part.size] = part
        at += part.size

    put(head)
    for _ in range(n_layer):
        put(row_head)
        put(k)
    for _ in range(n_layer):
        put(v_head)
        put(v)
    assert at == res.size
    return res


class Context:
    def __init__(self, config: dict) -> None:
        self.config = config
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = config["n_gpu_layers"]
        self.model = llama_cpp.llama_model_load_from_file(config["model"].encode(), model_params)
        self.model_bytes = memory_bytes("VmRSS")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-(config["depth"] + config["n_gen"] + config["n_prompt"] + 16) // 256) * 256
        params.n_batch = 2048
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = config["n_threads"]
        params.flash_attn_type = int(config["flash_attn"])
        params.type_k = params.type_v = type_number(config["type"])
        free = free_vram()
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise SystemExit("no context: see the messages above")
        self.device_bytes = free - free_vram()
        self.logits: list[np.ndarray] = []
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.rng = np.random.default_rng(2)

    def fill(self) -> None:
        if self.config["fill"] == "prefill":
            self.decode(self.config["depth"], 0)
            return
        n_layer = llama_cpp.llama_model_n_layer(self.model)
        head_dim = llama_cpp.llama_model_n_embd(self.model) // llama_cpp.llama_model_n_head(self.model)
        width = head_dim * llama_cpp.llama_model_n_head_kv(self.model)
        v_trans = not self.config["flash_attn"] and self.config["v_trans"]
        state = synthetic_state(self.config["depth"], n_layer, width, self.config["type"], v_trans)
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama_cpp.llama_state_seq_set_data(self.ctx, data, state.size, 0) != state.size:
            raise SystemExit("the synthetic state was refused: see the messages above")

    def decode(self, n: int, pos: int, size: int = 2048) -> None:
        for i in range(0, n, size):
            chunk = min(size, n - i)
            batch = llama_cpp.llama_batch_init(chunk, 0, 1)
            batch.n_tokens = chunk
            for j in range(chunk):
                batch.token[j] = int(self.rng.integers(self.n_vocab))
                batch.pos[j] = pos + i + j
                batch.n_seq_id[j] = 1
                batch.seq_id[j][0] = 0
                batch.logits[j] = j == chunk - 1
            if llama_cpp.llama_decode(self.ctx, batch) != 0:
                raise SystemExit(f"llama_decode failed at {pos + i}")
            llama_cpp.llama_synchronize(self.ctx)
            llama_cpp.llama_batch_free(batch)

    def time_tokens(self, n: int, pos: int) -> list[float]:
        """Milliseconds of each token."""
        res = []
        for i in range(n):
            start = time.perf_counter()
            self.decode(1, pos + i)
            res.append(1e3 * (time.perf_counter() - start))
            if self.config["logits"]:
                data = llama_cpp.llama_get_logits_ith(self.ctx, -1)
                self.logits.append(np.ctypeslib.as_array(data, shape=(self.n_vocab,)).copy())
        return res


def memory_bytes(name: str) -> int | None:
    """VmRSS: resident now, VmHWM: at most since forget_peak(); None where the system does not say."""
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


def forget_peak() -> None:
    """The synthetic state that filled the context is no part of what is measured."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def paging_stats(ctx: int) -> dict:
    from monarch_llamacpp.llama import SHIM

    return SHIM.stats(ctx).with_sums()


def main() -> None:
    config = json.loads(sys.argv[1])
    ctx = Context(config)
    if config["depth"]:
        ctx.fill()
    forget_peak()
    depth, memory = config["depth"], llama_cpp.llama_get_memory(ctx.ctx)
    ctx.time_tokens(2, depth)  # warm-up
    tokens_ms = ctx.time_tokens(config["n_gen"], depth + 2)
    prompt_ms = None
    if config["n_prompt"]:
        llama_cpp.llama_memory_seq_rm(memory, 0, depth, -1)
        start = time.perf_counter()
        ctx.decode(config["n_prompt"], depth)
        prompt_ms = 1e3 * (time.perf_counter() - start)
    res = {"tokens_ms": tokens_ms, "prompt_ms": prompt_ms, "model_bytes": ctx.model_bytes}
    res["peak_bytes"] = memory_bytes("VmHWM")
    res["device_bytes"] = ctx.device_bytes
    if config["logits"]:
        np.save(config["logits"], np.stack(ctx.logits))
    if config["patched"]:
        res["stats"] = paging_stats(ctx.ctx)
    print(json.dumps(res))


if __name__ == "__main__":
    main()
