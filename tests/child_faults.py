"""Runs in a child process on the patched library, with fault_alloc.cpp preloaded: fails every allocation once.

Arguments: what to fail, a model, and for `restore` a state. Prints one JSON object. Whatever fails, the context goes on
as if nothing had been asked of it: its state is compared byte by byte, its logits with those of a calm context.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import child_logits
import llama_cpp
import numpy as np
from logits import random_tokens

FAULTS = ctypes.CDLL(os.environ["LD_PRELOAD"])
FAULTS.fault_live.restype = ctypes.c_int64
N_CTX, N_UBATCH = 640, 64
TOKENS = random_tokens(500)
STEPS = [200, 1, 1, 33, 150, 1, 16, 1]  # 200 and 150 take several ubatches; pages leave in many of them


def new_context(model: str, n_seq_max: int = 1) -> child_logits.Context:
    case = {"model": model, "n_ctx": N_CTX, "n_ubatch": N_UBATCH, "n_gpu_layers": 99, "env": dict(os.environ)}
    return child_logits.Context(case | {"n_seq_max": n_seq_max, "kv_unified": True})


def every_fault(
    action: Callable[[], object], check: Callable[[bool], None], is_done: Callable[[object], bool] = bool
) -> int:
    """Runs the action with its 1st, 2nd, ... allocation failing until none is left to fail; returns how many failed."""
    n = 0
    while True:
        n += 1
        print(f"allocation {n}", file=sys.stderr)
        FAULTS.fault_arm(ctypes.c_int64(n))
        result = action()
        fired = FAULTS.fault_disarm()
        ok = is_done(result)
        if not fired:
            assert ok, "failed although nothing was made to fail"
            return n - 1
        check(ok)


def state_of(ctx: child_logits.Context, seq_id: int = 0) -> bytes:
    size = llama_cpp.llama_state_seq_get_size(ctx.ctx, seq_id)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(ctx.ctx, data, size, seq_id) == size
    return bytes(data)


def states_of(ctx: child_logits.Context) -> list[bytes]:
    return [state_of(ctx, seq_id) for seq_id in range(llama_cpp.llama_n_seq_max(ctx.ctx))]


def end_of(ctx: child_logits.Context) -> int:
    return llama_cpp.llama_memory_seq_pos_max(ctx.memory, 0) + 1


def context_params() -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = N_CTX
    params.n_ubatch = N_UBATCH
    return params


def fail_create(model: str) -> dict:
    ctx = new_context(model)
    params = context_params()
    refused = 0

    def create() -> bool:
        made = llama_cpp.llama_init_from_model(ctx.model, params)
        if made:
            llama_cpp.llama_free(made)
        return bool(made)

    assert create()
    if "MONARCH_MODE" in os.environ:
        refuse_once(ctx.model)
    live = FAULTS.fault_live()

    def check(ok: bool) -> None:
        nonlocal refused
        refused += not ok

    n = every_fault(create, check)
    return {"n": n, "refused": refused, "left": FAULTS.fault_live() - live}


def free_in_any_order(model: str) -> dict:
    """Bytes left after each round: two contexts of one model are made, used and freed, the first one first or last."""
    ctx, params = new_context(model), context_params()
    tokens = (ctypes.c_int32 * len(TOKENS))(*TOKENS)
    left = []
    for order in [(0, 1), (0, 1), (1, 0), (0, 1)]:
        both = [llama_cpp.llama_init_from_model(ctx.model, params) for _ in range(2)]
        for each in both:
            assert llama_cpp.llama_decode(each, llama_cpp.llama_batch_get_one(tokens, len(TOKENS))) == 0
        for i in order:
            llama_cpp.llama_free(both[i])
        left.append(FAULTS.fault_live())
    return {"left": [after - left[0] for after in left[1:]]}


def refuse_once(model: ctypes.c_void_p) -> None:
    """The last error keeps room for its longest text: not a leak."""
    window = os.environ["MONARCH_HOT_WINDOW"]
    os.environ["MONARCH_HOT_WINDOW"] = "1"
    assert not llama_cpp.llama_init_from_model(model, llama_cpp.llama_context_default_params())
    os.environ["MONARCH_HOT_WINDOW"] = window


def decode_all(ctx: child_logits.Context, decode: Callable[[int, int], None]) -> Iterator[np.ndarray]:
    """The logits after each step."""
    for n in STEPS:
        end = end_of(ctx) + n
        while end_of(ctx) < end:
            decode(end_of(ctx), end)
        yield np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx.ctx, -1), (ctx.n_vocab,)).copy()


def fail_decode(model: str) -> dict:
    calm, rough = new_context(model), new_context(model)
    n_faults, refused = 0, 0

    def decode(ctx: child_logits.Context, start: int, end: int) -> int:
        return ctx.decode(TOKENS[start:end], start)[0]

    def decode_rough(start: int, end: int) -> None:
        nonlocal n_faults, refused
        n = 0
        while end_of(rough) < end:
            n += 1
            before, start = state_of(rough), end_of(rough)
            print(f"{start}..{end}: allocation {n}", file=sys.stderr)
            FAULTS.fault_arm(ctypes.c_int64(n))
            status = decode(rough, start, end)
            n_faults += FAULTS.fault_disarm()
            assert (status == 0) == (end_of(rough) == end)
            refused += status != 0
            # whole ubatches of a batch may have succeeded before the one that failed
            assert (end_of(rough) - start) % N_UBATCH == 0 or status == 0
            assert end_of(rough) > start or state_of(rough) == before
            if end_of(rough) > start:
                n = 0

    want = list(decode_all(calm, lambda start, end: decode(calm, start, end)))
    got = list(decode_all(rough, decode_rough))
    assert np.array_equal(want, got)
    assert state_of(rough) == state_of(calm)
    return {"n": n_faults, "refused": refused}


def live_context(model: str, n_seq_max: int = 1) -> child_logits.Context:
    """Prompts of several ubatches are tried out on copies of the tables, which must have as much room."""
    ctx = new_context(model, n_seq_max)
    assert ctx.decode(TOKENS[:110], 0)[0] == 0
    assert ctx.decode(TOKENS[110:200], 110)[0] == 0
    for i in range(200, 220):
        assert ctx.decode(TOKENS[i : i + 1], i)[0] == 0
    return ctx


def fail_save(model: str) -> dict:
    ctx = live_context(model)
    want = state_of(ctx)
    data = (ctypes.c_uint8 * (2 * len(want)))()
    file = str(Path(model).with_suffix(".saved")).encode()
    result = {}
    saves = {
        "size": lambda: llama_cpp.llama_state_seq_get_size(ctx.ctx, 0),
        "memory": lambda: llama_cpp.llama_state_seq_get_data(ctx.ctx, data, len(data), 0),
        "whole": lambda: llama_cpp.llama_state_get_data(ctx.ctx, data, len(data)),
        "file": lambda: llama_cpp.llama_state_seq_save_file(ctx.ctx, file, 0, None, 0),
        "whole file": lambda: llama_cpp.llama_state_save_file(ctx.ctx, file, None, 0),
    }

    def check(ok: bool) -> None:
        assert state_of(ctx) == want

    for name, save in saves.items():
        save()
        live = FAULTS.fault_live()
        result[name] = every_fault(lambda save=save: bool(save()), check)
        assert FAULTS.fault_live() == live, name
    return result


def fail_restore(model: str, state: str) -> dict:
    ctx = live_context(model)
    before = state_of(ctx)
    content = Path(state).read_bytes()
    refused = 0

    def check(ok: bool) -> None:
        nonlocal refused
        refused += not ok
        if ok:  # it did without
            assert ctx.set_state(before)
        assert state_of(ctx) == before

    n = every_fault(lambda: ctx.set_state(content) == len(content), check)
    end = end_of(ctx)
    assert end == 260 and ctx.decode(TOKENS[end : end + 30], end)[0] == 0
    return {"n": n, "refused": refused}


def shared_context(model: str) -> child_logits.Context:
    """Three sequences that hold different tokens of the same pages."""
    ctx = live_context(model, n_seq_max=3)
    llama_cpp.llama_memory_seq_cp(ctx.memory, 0, 1, 5, 150)
    llama_cpp.llama_memory_seq_cp(ctx.memory, 0, 2, -1, -1)
    llama_cpp.llama_memory_seq_rm(ctx.memory, 2, 27, 99)
    llama_cpp.llama_memory_seq_rm(ctx.memory, 2, 155, 177)
    return ctx


def compare_next(rough: child_logits.Context, calm: child_logits.Context) -> None:
    """Summaries are in no state: what comes next tells of them."""
    (status, logits), expected = (ctx.decode(TOKENS[:1], end_of(ctx)) for ctx in (rough, calm))
    assert status == 0 and np.array_equal(logits, expected[1])
    for ctx in (rough, calm):
        assert llama_cpp.llama_memory_seq_rm(ctx.memory, 0, end_of(ctx) - 1, -1)
    assert states_of(rough) == states_of(calm)


def fail_change(model: str, change: Callable[[child_logits.Context], object]) -> int:
    """Of a void function only the sequences say whether it failed."""
    calm, rough = shared_context(model), shared_context(model)

    def check(ok: bool) -> None:
        assert not ok
        compare_next(rough, calm)

    n = every_fault(lambda: change(rough), check, lambda _: states_of(rough) != states_of(calm))
    change(calm)
    compare_next(rough, calm)
    return n


def fail_remove(model: str, *names: str) -> dict:
    ranges = {
        "middle": (0, 40, 123), "own": (0, 158, 190), "tail": (0, 66, -1),
        "middle of all": (-1, 50, 127), "tail of all": (-1, 66, -1),
    }  # fmt: skip
    return {
        name: fail_change(model, lambda ctx, where=where: llama_cpp.llama_memory_seq_rm(ctx.memory, *where))
        for name, where in ranges.items()
        if not names or name in names
    }


def fail_copy(model: str) -> dict:
    return {"all": fail_change(model, lambda ctx: llama_cpp.llama_memory_seq_cp(ctx.memory, 2, 1, -1, -1))}


def fail_clear(model: str) -> dict:
    return {"all": fail_change(model, lambda ctx: llama_cpp.llama_memory_clear(ctx.memory, False))}


def main() -> None:
    what, *args = sys.argv[1:]
    actions = {
        "create": fail_create, "decode": fail_decode, "save": fail_save, "restore": fail_restore, "remove": fail_remove,
        "copy": fail_copy, "clear": fail_clear, "free": free_in_any_order,
    }  # fmt: skip
    print(json.dumps(actions[what](*args)))


if __name__ == "__main__":
    main()
