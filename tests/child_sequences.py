"""Runs in a child process on one library (LLAMA_CPP_LIB_PATH): operations on several sequences of one context.

Argument: a model. Each line of standard input is a JSON case, answered by one line of JSON before the next is read.
  n_ctx, n_ubatch, n_seq_max, kv_unified, env, seed   as in child_logits.py
  ops   ["decode", [[sequences], first position, [tokens]], ...]  one llama_decode, the groups' tokens in turn
        ["abort", node, group, ...]  the same, aborted at a node first
        ["rm", sequence, p0, p1]  ["cp", from, to, p0, p1]  ["keep", sequence]  ["clear"]
        ["save", name, sequence or -1]  ["load", name, sequence or -1]
        ["forge", name]  a sequence names a page twice
Answer: per op its status, the least and greatest position of every sequence, and the logits in base64.
"""

import base64
import ctypes
import json
import sys

import llama_cpp
import numpy as np
from child_logits import Context, stats
from crafted import name_a_page_twice


class Sequences(Context):
    def __init__(self, case: dict) -> None:
        super().__init__(case)
        self.n_seqs = case["n_seq_max"]
        self.states: dict[str, bytes] = {}

    def run(self, name: str, *args: object) -> dict:
        status, logits = getattr(self, "op_" + name)(*args)
        return {
            "status": int(status),
            "min": [llama_cpp.llama_memory_seq_pos_min(self.memory, s) for s in range(self.n_seqs)],
            "max": [llama_cpp.llama_memory_seq_pos_max(self.memory, s) for s in range(self.n_seqs)],
            "logits": base64.b64encode(logits.tobytes()).decode(),
        }

    def op_decode(self, *groups: list) -> tuple[int, np.ndarray]:
        """One token of each group after the other, as long as there are any."""
        rows = [(i, token, first + i, seqs) for seqs, first, tokens in groups for i, token in enumerate(tokens)]
        rows.sort(key=lambda row: row[0])
        batch = llama_cpp.llama_batch_init(len(rows), 0, self.n_seqs)
        batch.n_tokens = len(rows)
        for i, (_, token, pos, seqs) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, pos, True
            batch.n_seq_id[i] = len(seqs)
            for j, seq in enumerate(seqs):
                batch.seq_id[i][j] = seq
        status = llama_cpp.llama_decode(self.ctx, batch)
        logits = np.empty((0, self.n_vocab), np.float32)
        if status == 0:
            data = llama_cpp.llama_get_logits(self.ctx)
            logits = np.ctypeslib.as_array(data, shape=(len(rows), self.n_vocab)).copy()
        llama_cpp.llama_batch_free(batch)
        return status, logits

    def op_abort(self, node: int, *groups: list) -> tuple[int, np.ndarray]:
        self.aborter.limit, self.aborter.count = node, 0
        status, logits = self.op_decode(*groups)
        self.aborter.limit = -1
        return self.op_decode(*groups) if status == 2 else (status, logits)

    def op_rm(self, seq: int, p0: int, p1: int) -> tuple[int, np.ndarray]:
        return llama_cpp.llama_memory_seq_rm(self.memory, seq, p0, p1), np.empty(0)

    def op_cp(self, src: int, dst: int, p0: int, p1: int) -> tuple[int, np.ndarray]:
        llama_cpp.llama_memory_seq_cp(self.memory, src, dst, p0, p1)
        return 1, np.empty(0)

    def op_keep(self, seq: int) -> tuple[int, np.ndarray]:
        llama_cpp.llama_memory_seq_keep(self.memory, seq)
        return 1, np.empty(0)

    def op_clear(self) -> tuple[int, np.ndarray]:
        llama_cpp.llama_memory_clear(self.memory, True)
        return 1, np.empty(0)

    def op_save(self, name: str, seq: int) -> tuple[int, np.ndarray]:
        if seq < 0:
            data = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(self.ctx))()
            size = llama_cpp.llama_state_get_data(self.ctx, data, len(data))
        else:
            data = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self.ctx, seq))()
            size = llama_cpp.llama_state_seq_get_data(self.ctx, data, len(data), seq)
        self.states[name] = bytes(data[:size])
        return size > 0, np.empty(0)

    def op_load(self, name: str, seq: int) -> tuple[int, np.ndarray]:
        content = self.states[name]
        data = (ctypes.c_uint8 * len(content)).from_buffer_copy(content)
        if seq < 0:
            return llama_cpp.llama_state_set_data(self.ctx, data, len(data)) == len(data), np.empty(0)
        return llama_cpp.llama_state_seq_set_data(self.ctx, data, len(data), seq) == len(data), np.empty(0)

    def op_forge(self, name: str) -> tuple[int, np.ndarray]:
        self.states[name] = name_a_page_twice(self.states[name])
        return 1, np.empty(0)


def main() -> None:
    for line in sys.stdin:
        case = json.loads(line) | {"model": sys.argv[1]}
        ctx = Sequences(case)
        steps = [ctx.run(*op) for op in case["ops"]]
        print(json.dumps({"steps": steps, "stats": stats(ctx)}), flush=True)
        ctx.close()


if __name__ == "__main__":
    main()
