"""One arm in a process of its own: how far its output is from the reference, and what it finds. Prints a line of JSON.

Every token of the text is given, whatever the arm would have written. The log-probabilities of the reference lie in two
.npy files: one for tokens read as a prompt, one for tokens read one at a time, which upstream and the paged cache
compute by different kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .ab_child import Report, kv_bytes, make_parser, open_model, read_stats, run_main
from .ab_text import ROOM, is_found
from .errors import MonarchError

if TYPE_CHECKING:
    import llama_cpp

    from .shim import Event

WAYS = ("prefill", "decode")


class Runner:
    """Decodes tokens at the positions that follow."""

    def __init__(self, llm: llama_cpp.Llama, n_ubatch: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._ctx = llm.ctx
        self._memory = llama_cpp.llama_get_memory(llm.ctx)
        self._n_vocab = llm.n_vocab()
        self._n_ubatch = n_ubatch
        self.pos = 0

    def clear(self) -> None:
        self._api.llama_memory_clear(self._memory, True)
        self.pos = 0

    def rewind(self, pos: int) -> None:
        if not self._api.llama_memory_seq_rm(self._memory, 0, pos, -1):
            raise MonarchError(f"the cache cannot go back to position {pos}")
        self.pos = pos

    def read(self, tokens: list[int], first_scored: int = -1) -> Iterator[np.ndarray]:
        """Logits of the tokens from first_scored on, ubatch by ubatch; -1: of the last one."""
        first = len(tokens) - 1 if first_scored < 0 else first_scored
        for i in range(0, len(tokens), self._n_ubatch):
            logits = self.step(tokens[i : i + self._n_ubatch], max(0, first - i))
            if len(logits):
                yield logits

    def step(self, tokens: list[int], first_scored: int = 0) -> np.ndarray:
        """One ubatch."""
        api, n = self._api, len(tokens)
        batch = api.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self.pos + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i >= first_scored
            status = api.llama_decode(self._ctx, batch)
        finally:
            api.llama_batch_free(batch)
        if status != 0:
            raise MonarchError(f"llama_decode at position {self.pos} ended with status {status}")
        self.pos += n
        n_scored = max(0, n - first_scored)
        if not n_scored:
            return np.empty((0, self._n_vocab), np.float32)
        data = ctypes.cast(api.llama_get_logits(self._ctx), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(data, shape=(n_scored, self._n_vocab)).copy()

    def write(self, logits: np.ndarray, n: int, after: Callable[[], None] = lambda: None) -> list[int]:
        """n tokens, greedily, after those logits."""
        written = []
        for _ in range(n):
            written.append(int(logits.argmax()))
            logits = self.step(written[-1:])[-1]
            after()
        return written


class MassTrace:
    """Share of attention that went to promoted and to sticky pages, token by token: a mean over layers and heads."""

    def __init__(self, llm: Any) -> None:
        self.tokens: list[list[float]] = []
        self._sticky: set[tuple[int, int, int]] = set()
        self._mass = [0.0, 0.0]
        stats = read_stats(llm)
        # exact reads every page and tells no hook of it
        is_told = stats is not None and stats["mode"] == "paged"
        self._n_places = stats["n_places"] if is_told else 0
        if is_told:
            llm.set_hooks(on_promote=self._add, on_sticky=lambda event: self._sticky.add(_place(event)))

    def _add(self, event: Event) -> None:
        self._mass[_place(event) in self._sticky] += event.measured

    def end_token(self) -> None:
        if self._n_places:
            self.tokens.append([round(mass / self._n_places, 5) for mass in self._mass])
            self._mass = [0.0, 0.0]


def _place(event: Event) -> tuple[int, int, int]:
    return event.layer, event.head_kv, event.first_pos


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


class Comparison:
    """Of log-probabilities with those of the reference, row by row; without a reference, the file is written.

    The change of perplexity comes from each token's own; its standard error takes tokens as independent of each other,
    as llama-perplexity's does.
    """

    def __init__(self, file: Path, targets: list[int], n_vocab: int, is_reference: bool) -> None:
        self._is_reference = is_reference
        self._base = _create(file, (len(targets), n_vocab)) if is_reference else np.load(file, "r")
        self._targets = targets
        self._done = 0
        self._loss: list[np.ndarray] = []
        self._change: list[np.ndarray] = []
        self._divergence: list[np.ndarray] = []
        self._same: list[np.ndarray] = []

    def add(self, logits: np.ndarray) -> None:
        rows = slice(self._done, self._done + len(logits))
        self._done = rows.stop
        if not np.isfinite(logits).all():
            raise MonarchError("the model's output is not a number")
        log_p = log_softmax(logits)
        if self._is_reference:
            self._base[rows] = log_p
        base = self._base[rows].astype(np.float64)
        target = np.arange(len(log_p)), self._targets[rows]
        self._loss.append(-log_p[target])
        self._change.append(base[target] - log_p[target])
        self._divergence.append((np.exp(base) * (base - log_p)).sum(axis=1))
        self._same.append(base.argmax(axis=1) == log_p.argmax(axis=1))

    def metrics(self) -> dict[str, float]:
        loss, change, same = map(np.concatenate, (self._loss, self._change, self._same))
        divergence = np.maximum(np.concatenate(self._divergence), 0.0)  # f32 rounding of the reference
        values = {
            "perplexity": np.exp(loss.mean()),
            "perplexity_change": np.expm1(change.mean()),
            "perplexity_change_stderr": change.std() / np.sqrt(len(change)),
            "kl_mean": divergence.mean(),
            "kl_median": np.median(divergence),
            "kl_p99": np.percentile(divergence, 99),
            "kl_max": divergence.max(),
            "same_top": same.mean(),
        }
        return {name: float(value) for name, value in values.items()}


def _create(file: Path, shape: tuple[int, int]) -> np.memmap:
    """With room on the disk: a mapped file that finds none ends the process by a signal."""
    res = np.lib.format.open_memmap(file, "w+", np.float32, shape)
    if not hasattr(os, "posix_fallocate"):  # macOS
        return res
    try:
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    except OSError as error:
        needed = f"{file.parent}: {error.strerror}, {res.nbytes >> 20} MiB are needed"
        raise MonarchError(f"{needed}: point TMPDIR to another disk, or ask for fewer --text-tokens") from error
    return res


def _compare(runner: Runner, way: str, plan: Report, args: argparse.Namespace) -> dict[str, float]:
    n_scored = plan["n_scored"] if way == "prefill" else plan["n_decode"]
    targets = [token for chunk in plan["chunks"] for token in chunk[-n_scored:]]
    comparison = Comparison(args.reference / f"{way}.npy", targets, plan["n_vocab"], args.is_reference)
    for chunk in plan["chunks"]:
        for logits in _predict(runner, way, chunk[:-1], len(chunk) - 1 - n_scored):
            comparison.add(logits)
    return comparison.metrics()


def _predict(runner: Runner, way: str, tokens: list[int], first: int) -> Iterator[np.ndarray]:
    """Logits of the tokens from the first scored one on."""
    runner.clear()
    if way == "prefill":
        yield from runner.read(tokens, first)
    else:
        _exhaust(runner.read(tokens[:first]))
        for token in tokens[first:]:
            yield runner.step([token])


def _exhaust(rows: Iterator[np.ndarray]) -> np.ndarray:
    """The last logits."""
    *_, logits = rows
    return logits[-1]


def _ask(runner: Runner, haystack: Report, detokenize: Callable[[list[int]], str]) -> list[bool]:
    """Every question from the same text, which is read once."""
    runner.clear()
    _exhaust(runner.read(haystack["tokens"]))
    end, found = runner.pos, []
    for question in haystack["questions"]:
        logits = _exhaust(runner.read(question["tokens"]))
        answer = detokenize(runner.write(logits, question["n_answer"]))
        found.append(is_found(answer, question["expected"]))
        runner.rewind(end)
    return found


def _attended(llm: Any, stats: Report | None) -> float:
    """Share of the tokens held that the last step attended to, a mean over layers and KV heads."""
    if stats is None:
        return 1.0
    n_attended = stats["n_hot"] + stats["n_promoted"] * llm.knobs().page_size / stats["n_places"]
    return min(1.0, n_attended / stats["n_tokens"])


def _sizes(llm: Any, stats: Report | None, n_tokens: int) -> dict[str, float]:
    """Bytes for each token held, and for each further one: of a cold token, the hot window's do not change."""
    held = kv_bytes(llm, stats) / n_tokens
    if stats is None or stats["n_cold"] == 0:
        return {"bytes_per_token": held, "bytes_per_further_token": held}
    further = (stats["cold_bytes"] + stats["summary_bytes"]) / stats["n_cold"]
    return {"bytes_per_token": held, "bytes_per_further_token": further}


def _measure(args: argparse.Namespace) -> Report:
    plan = json.loads(args.plan.read_text(encoding="utf-8"))
    text = plan["chunks"][0]
    longest = max([len(text) + plan["n_continue"], *(len(h["tokens"]) + ROOM for h in plan["haystacks"])])
    llm = open_model(args, longest + ROOM, plan["n_ubatch"])
    runner = Runner(llm, plan["n_ubatch"])

    def detokenize(tokens: list[int]) -> str:
        return llm.detokenize(tokens).decode("utf-8", "replace")

    report: Report = {"stats": {}}
    for way in WAYS:
        report[way] = _compare(runner, way, plan, args)
        stats = report["stats"][way] = read_stats(llm)
        report[way] |= {"attended": _attended(llm, stats), **_sizes(llm, stats, runner.pos)}
    report["found"] = [_ask(runner, haystack, detokenize) for haystack in plan["haystacks"]]
    report["stats"]["needles"] = read_stats(llm)
    report["written"] = []
    for cut in plan["cuts"]:
        runner.clear()
        logits = _exhaust(runner.read(text[:cut]))
        trace = MassTrace(llm)
        report["written"].append(runner.write(logits, plan["n_continue"], trace.end_token))
    report["mass"] = trace.tokens
    report["texts"] = [detokenize(tokens) for tokens in report["written"]]
    return report


def main() -> int:
    parser = make_parser()
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True, help="folder")
    parser.add_argument("--is-reference", action="store_true")
    return run_main(_measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
