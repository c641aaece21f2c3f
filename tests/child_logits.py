"""Runs in a child process on one library (LLAMA_CPP_LIB_PATH): decodes token sequences and saves every logit.

Standard input: a JSON list of cases; argument: the .npz to write. A case:
  model, or metadata of one with random tensors (metadata_model.py)
  n_ctx, n_ubatch, type_k, type_v, flash_attn   the context
  n_gpu_layers   on the device that the environment names (devices.py)
  env      MONARCH_* variables
  seed     order of physical pages (patched library)
  hooks    whether page-ins are counted by a hook (patched library)
  steps    ["decode", n] in one llama_decode; ["rm", p0] removes the tail, ["rm", p0, p1] what lies between; ["clear"];
           ["abort", n] aborts a decode of n tokens at every node in turn, then decodes them; ["stop", n] likewise
           stops it by cb_eval, which upstream calls a success, and takes its tokens back; ["save", file] and
           ["load", file, bytes] of a sequence state; ["damage", file, offsets, bits] loads it cut at each offset
           and with each bit flipped, and reports those that were accepted
  tokens   the tokens that decode steps take in order, position after position
Saved per case: logits<i> [n_decoded, n_vocab] and info<i>, a JSON string, with "stats" only where paging is on.
"""

import ctypes
import itertools
import json
import os
import re
import sys

import llama_cpp
import numpy as np
from devices import register
from gguf import GGMLQuantizationType
from metadata_model import init_model

from monarch_llamacpp import stats as monarch_stats

C_TYPES = {"U32": ctypes.c_uint32, "MODE": ctypes.c_int32, "U64": ctypes.c_uint64, "F64": ctypes.c_double}


class Aborter:
    """Stops a graph after a number of nodes; counts the nodes it was asked about."""

    status = 2  # of llama_decode

    def __init__(self) -> None:
        self.limit = -1
        self.count = 0
        self.callback = llama_cpp.ggml_abort_callback(self.check)

    def check(self, _data: object) -> bool:
        self.count += 1
        return self.count == self.limit


class Log:
    """Where it says that the cold store lies, and how many MiB of it; and its one line about kernels."""

    def __init__(self) -> None:
        self.sizes: dict[str, float] = {}
        self.kernels = ""
        self.callback = llama_cpp.llama_log_callback(self.add)
        llama_cpp.llama_log_set(self.callback, None)

    def add(self, _level: int, text: bytes, _data: object) -> None:
        line = text.decode(errors="replace")
        sys.stderr.write(line)
        if found := re.match(r"alloc_cold_buf: +(\S+) cold store = +(\S+) MiB", line):
            self.sizes[found[1]] = float(found[2])
        if line.startswith("monarch_attend_say_kernels: "):
            self.kernels = line


class Stopper:
    """Stops a graph after a number of nodes, by cb_eval."""

    status = 0

    def __init__(self) -> None:
        self.limit = -1
        self.count = 0
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self.check)

    def check(self, _tensor: object, is_asked: bool, _data: object) -> bool:
        self.count += is_asked
        return is_asked and self.count == self.limit


class Hooks(ctypes.Structure):
    """struct monarch_hooks; counts the pages that came to a frame."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("on_page_out", "on_promote", "on_sticky", "on_page_in", "user_data")),
    ]

    def __init__(self) -> None:
        self.count = 0
        self.callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(self.add)
        super().__init__(ctypes.sizeof(Hooks), on_page_in=ctypes.cast(self.callback, ctypes.c_void_p))

    def add(self, _event: int, _data: int) -> None:
        self.count += 1


class Context:
    def __init__(self, case: dict) -> None:
        for name in [name for name in os.environ if name.startswith("MONARCH")]:
            if name not in ("MONARCH_CACHE",):
                del os.environ[name]
        os.environ.update(case.get("env", {}))
        if case.get("seed"):
            llama_cpp.llama_cpp._lib.monarch_test_shuffle_pages(ctypes.c_uint32(case["seed"]))
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = case.get("n_gpu_layers", 0)
        if "metadata" in case:
            self.model = init_model(case["metadata"], params)
        else:
            self.model = llama_cpp.llama_model_load_from_file(case["model"].encode(), params)
        cparams = llama_cpp.llama_context_default_params()
        cparams.n_ctx = case["n_ctx"]
        cparams.n_batch = max(case["n_ctx"], case["n_ubatch"])
        cparams.n_ubatch = case["n_ubatch"]
        cparams.n_seq_max = case.get("n_seq_max", 1)
        cparams.kv_unified = case.get("kv_unified", False)
        cparams.n_threads = cparams.n_threads_batch = case.get("n_threads", 2)
        cparams.flash_attn_type = 1 if case.get("flash_attn") else 0
        cparams.type_k = GGMLQuantizationType[case.get("type_k", "f16").upper()]
        cparams.type_v = GGMLQuantizationType[case.get("type_v", "f16").upper()]
        cparams.no_perf = False
        cparams.offload_kqv = case.get("offload_kqv", True)
        self.stopper = Stopper()
        if any(name == "stop" for name, *_ in case.get("steps", [])):
            cparams.cb_eval = self.stopper.callback
        self.ctx = llama_cpp.llama_init_from_model(self.model, cparams)
        if not self.ctx:
            raise SystemExit("no context")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.aborter = Aborter()
        llama_cpp.llama_set_abort_callback(self.ctx, self.aborter.callback, None)

    def decode(self, tokens: list[int], pos: int) -> tuple[int, np.ndarray]:
        n = len(tokens)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = pos + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = True
        status = llama_cpp.llama_decode(self.ctx, batch)
        logits = np.empty((0, self.n_vocab), np.float32)
        if status == 0:
            data = llama_cpp.llama_get_logits(self.ctx)
            logits = np.ctypeslib.as_array(data, shape=(n, self.n_vocab)).copy()
        llama_cpp.llama_batch_free(batch)
        return status, logits

    def interrupt_everywhere(
        self, limiter: Aborter | Stopper, tokens: list[int], pos: int
    ) -> tuple[int, np.ndarray, int]:
        """Interrupts the decode after node 1, 2, ... until it runs through."""
        for limit in itertools.count(1):
            limiter.limit, limiter.count = limit, 0
            status, logits = self.decode(tokens, pos)
            limiter.limit = -1
            if status != limiter.status or limiter.count < limit:
                return status, logits, limit - 1
            if limiter is self.stopper:  # upstream keeps its tokens
                llama_cpp.llama_memory_seq_rm(self.memory, 0, pos, -1)

    def save(self, path: str) -> int:
        data = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self.ctx, 0))()
        size = llama_cpp.llama_state_seq_get_data(self.ctx, data, len(data), 0)
        with open(path, "wb") as file:
            file.write(bytes(data[:size]))
        return size

    def load(self, path: str, n_bytes: int) -> int:
        """Of the file's first n_bytes (all: -1); returns what the library took."""
        with open(path, "rb") as file:
            return self.set_state(file.read(n_bytes))

    def damage(self, path: str, cuts: list[int], bits: list[int]) -> list[str]:
        """What the library took although it is damaged."""
        with open(path, "rb") as file:
            content = file.read()
        taken = [f"cut at {cut}" for cut in cuts if self.set_state(content[:cut])]
        for bit in bits:
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            if self.set_state(bytes(flipped)):
                taken.append(f"bit {bit % 8} of byte {bit // 8}")
        return taken

    def set_state(self, content: bytes) -> int:
        data = (ctypes.c_uint8 * len(content)).from_buffer_copy(content)
        return llama_cpp.llama_state_seq_set_data(self.ctx, data, len(data), 0)

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)


class StatsStruct(ctypes.Structure):
    """struct monarch_stats"""

    _fields_ = [("struct_size", ctypes.c_uint32), *((stat.name, C_TYPES[stat.kind]) for stat in monarch_stats.stats())]


def stats(ctx: Context) -> dict | None:
    """All but the times; None where paging is off."""
    lib = llama_cpp.llama_cpp._lib
    if not hasattr(lib, "monarch_get_stats"):
        return None
    struct = StatsStruct(struct_size=ctypes.sizeof(StatsStruct))
    lib.monarch_last_error.restype = ctypes.c_char_p
    if lib.monarch_get_stats(ctypes.c_void_p(ctx.ctx), ctypes.byref(struct)) != 0:
        error = lib.monarch_last_error().decode()
        if error.startswith("the context is not paged"):
            return None
        raise RuntimeError(error)
    names = [stat.name for stat in monarch_stats.stats() if not stat.name.endswith("_us")]
    return {name: getattr(struct, name) for name in names}


def run(case: dict) -> tuple[np.ndarray, dict]:
    ctx = Context(case)
    tokens = case["tokens"]
    hooks = Hooks()
    if case.get("hooks"):
        llama_cpp.llama_cpp._lib.monarch_set_hooks(ctypes.c_void_p(ctx.ctx), ctypes.byref(hooks))
    pos, taken, logits, info = 0, 0, [], {"status": [], "aborts": []}
    for name, *args in case["steps"]:
        if name in ("decode", "abort", "stop"):
            chunk = tokens[taken : taken + args[0]]
            if name == "decode":
                status, rows = ctx.decode(chunk, pos)
            else:
                limiter = ctx.aborter if name == "abort" else ctx.stopper
                status, rows, aborts = ctx.interrupt_everywhere(limiter, chunk, pos)
                info["aborts"].append(aborts)
            info["status"].append(status)
            logits.append(rows)
            if status == 0:
                taken += len(chunk)
                pos += len(chunk)
        elif name == "rm":
            p0, p1 = args if len(args) == 2 else (args[0], -1)
            info["status"].append(int(llama_cpp.llama_memory_seq_rm(ctx.memory, 0, p0, p1)))
            pos = llama_cpp.llama_memory_seq_pos_max(ctx.memory, 0) + 1
        elif name == "clear":
            llama_cpp.llama_memory_clear(ctx.memory, True)
            pos = 0
        elif name == "save":
            info["status"].append(ctx.save(*args))
        elif name == "damage":
            info["status"].append(ctx.damage(*args))
        elif name == "load":
            info["status"].append(ctx.load(*args))
            pos = llama_cpp.llama_memory_seq_pos_max(ctx.memory, 0) + 1
    info["n_reused"] = llama_cpp.llama_perf_context(ctx.ctx).n_reused
    info["pos_min"] = llama_cpp.llama_memory_seq_pos_min(ctx.memory, 0)
    info["pos_max"] = llama_cpp.llama_memory_seq_pos_max(ctx.memory, 0)
    if found := stats(ctx):
        info["stats"] = found
    info["n_page_in_events"] = hooks.count
    ctx.close()
    return np.concatenate(logits), info


def main() -> None:
    register()
    log = Log()
    cases = json.load(sys.stdin)
    arrays = {}
    for i, case in enumerate(cases):
        log.sizes.clear()
        logits, info = run(case)
        info["stores"], info["kernels"] = log.sizes, log.kernels
        arrays[f"logits{i}"] = logits
        arrays[f"info{i}"] = np.array(json.dumps(info))
    np.savez(sys.argv[1], **arrays)


if __name__ == "__main__":
    main()
