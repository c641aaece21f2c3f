"""Several sequences in one paged context, against stock: any order of operations; what sequences share."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child import TESTS, environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logits import EXACT_CODEC, nmse

from models import N_VOCAB, write_random_model

N_SEQS = 8
ENV = EXACT_CODEC | {"MONARCH_MODE": "exact", "MONARCH_HOT_WINDOW": "24", "MONARCH_SINK_TOKENS": "4"}
# hot K and V in f32, so that what is left of a difference is the pages' 16 bits
CASE = {"n_ctx": 1024, "n_ubatch": 32, "n_seq_max": N_SEQS, "n_threads": 1, "type_k": "f32", "type_v": "f32"}

Op = list[Any]
Group = tuple[list[int], int, list[int]]


class Server:
    """A child that keeps its library loaded; one that died is started again for the next case."""

    def __init__(self, lib_dir: Path, model: Path) -> None:
        self.lib_dir, self.model = lib_dir, model
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(TESTS / "child_sequences.py"), str(self.model)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        env = environment(self.lib_dir, {"GGML_NO_BACKTRACE": "1"})
        self.process = subprocess.Popen(command, text=True, env=env, **pipes)

    def run(self, case: dict) -> dict:
        self.process.stdin.write(json.dumps(case) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.start()
            raise AssertionError(f"the library ended its process with status {status}")
        answer = json.loads(line)
        for step in answer["steps"]:
            step["logits"] = np.frombuffer(base64.b64decode(step["logits"]), np.float32).reshape(-1, N_VOCAB)
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def arms(stock_bin: Path, patched_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    model = write_random_model(tmp_path_factory.mktemp("model") / "model.gguf", head_dim=32, n_head=4, n_head_kv=2)
    servers = {"stock": Server(stock_bin, model), "paged": Server(patched_bin, model)}
    yield servers
    for server in servers.values():
        server.close()


def check_agreement(
    arms: dict[str, Server], ops: list[Op], kv_unified: bool = True, case: dict = CASE, env: dict = ENV
) -> dict:
    """Upstream shares between sequences only in one stream, so that is what it always runs with."""
    want = arms["stock"].run(case | {"ops": ops, "kv_unified": True})
    got = arms["paged"].run(case | {"ops": ops, "kv_unified": kv_unified, "env": env, "seed": len(ops)})
    for i, (a, b) in enumerate(zip(got["steps"], want["steps"], strict=True)):
        assert a["status"] == b["status"], (i, ops[i])
        assert (a["min"], a["max"]) == (b["min"], b["max"]), (i, ops[i])
        if a["logits"].size:
            assert nmse(a["logits"], b["logits"]) <= 1e-6, (i, ops[i])
    a, b = (np.concatenate([step["logits"] for step in arm["steps"]]) for arm in (got, want))
    assert nmse(a, b) <= 1e-7 if a.size else True
    return got


#
# any order of operations
#


class Plan:
    """The plain arrays: positions that each sequence holds. Turns drawn numbers into operations that are allowed."""

    def __init__(self, kv_unified: bool) -> None:
        self.kv_unified = kv_unified
        self.held: list[set[int]] = [set() for _ in range(N_SEQS)]
        self.saved: dict[str, tuple[int, list[set[int]]]] = {}
        self.ops: list[Op] = []
        self.n_tokens = 0

    def end(self, seq: int) -> int:
        return max(self.held[seq], default=-1) + 1

    def tokens(self, n: int) -> list[int]:
        self.n_tokens += n
        return [3 + (7 * i * i + i) % (N_VOCAB - 3) for i in range(self.n_tokens - n, self.n_tokens)]

    def group(self, seqs: list[int], n: int) -> Group | None:
        first = self.end(seqs[0])
        n = min(n, 120 - first)
        if n <= 0:
            return None
        for seq in seqs:
            self.held[seq] |= set(range(first, first + n))
        return seqs, first, self.tokens(n)

    def decode(self, a: int, b: int, c: int) -> None:
        seqs = sorted({a % N_SEQS, b % N_SEQS, c % N_SEQS})
        if a % 5 == 0 and self.kv_unified and not any(self.held[seq] for seq in seqs):
            groups = [self.group(seqs, 1 + b % 40)]  # one prompt for all of them
        else:
            most = 40 if c % 3 else 2
            groups = [self.group([seq], 1 + (b if seq == a % N_SEQS else seq * c) % most) for seq in seqs]
        if groups := [group for group in groups if group]:
            # a batch of several ubatches keeps those that came before the abort; upstream forgets to take back a token
            # from more than the first of its sequences
            one = sum(len(group[2]) for group in groups) <= CASE["n_ubatch"] and (self.kv_unified or len(groups) == 1)
            aborted = c % 4 == 0 and one and all(len(group[0]) == 1 for group in groups)
            self.ops.append(["abort", 1 + b % 60, *groups] if aborted else ["decode", *groups])

    def rm(self, a: int, b: int, c: int) -> None:
        seq = a % (N_SEQS + 1) - 1
        longest = max(self.end(s) for s in range(N_SEQS))
        p0, p1 = sorted((b % (longest + 1), c % (longest + 1)))
        if c % 3:
            p1 = -1
        self.ops.append(["rm", seq, p0, p1])
        for s in range(N_SEQS):
            if seq in (-1, s):
                self.held[s] -= set(range(p0, p1 if p1 >= 0 else 1024))

    def cp(self, a: int, b: int, c: int) -> None:
        src, dst = a % N_SEQS, b % N_SEQS
        p0, p1 = (-1, -1) if c % 2 else sorted((b % 121, c % 121))
        positions = set(range(max(p0, 0), p1 if p1 >= 0 else 1024))
        if src == dst:
            return
        self.ops += [["rm", dst, p0, p1], ["cp", src, dst, p0, p1]]
        self.held[dst] = self.held[dst] - positions | self.held[src] & positions

    def keep(self, a: int, b: int, c: int) -> None:
        if c % 3 == 0:
            self.ops.append(["keep", a % N_SEQS])
            self.held = [held if s == a % N_SEQS else set() for s, held in enumerate(self.held)]

    def clear(self, a: int, b: int, c: int) -> None:
        if c % 3 == 0:
            self.ops.append(["clear"])
            self.held = [set() for _ in range(N_SEQS)]

    def save(self, a: int, b: int, c: int) -> None:
        seq = a % (N_SEQS + 1) - 1
        if seq < 0 or self.held[seq]:
            self.ops.append(["save", f"{b % 3}", seq])
            self.saved[f"{b % 3}"] = seq, [set(held) for held in self.held]

    def load(self, a: int, b: int, c: int) -> None:
        if f"{b % 3}" not in self.saved:
            return
        seq, held = self.saved[f"{b % 3}"]
        if seq < 0:
            self.ops.append(["load", f"{b % 3}", -1])
            self.held = [set(each) for each in held]
        else:
            self.ops.append(["load", f"{b % 3}", a % N_SEQS])
            self.held[a % N_SEQS] = set(held[seq])

    def check(self, answer: dict) -> None:
        assert answer["steps"][-1]["min"] == [min(held, default=-1) for held in self.held]
        assert answer["steps"][-1]["max"] == [max(held, default=-1) for held in self.held]


KINDS = ["decode"] * 6 + ["rm"] * 2 + ["cp"] * 2 + ["save", "load", "keep", "clear"]
NUMBERS = st.integers(0, 1000)
OPERATIONS = st.lists(st.tuples(st.sampled_from(KINDS), NUMBERS, NUMBERS, NUMBERS), min_size=20, max_size=30)
ANY = dict(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check_operations(arms: dict[str, Server], operations: list[tuple], kv_unified: bool) -> None:
    plan = Plan(kv_unified)
    for kind, *numbers in operations:
        getattr(plan, kind)(*numbers)
    if plan.ops:
        plan.check(check_agreement(arms, plan.ops, kv_unified))


@settings(max_examples=40, **ANY)
@given(operations=OPERATIONS, kv_unified=st.booleans())
def test_any_order_of_operations_agrees_with_stock(arms: dict[str, Server], operations: list, kv_unified: bool) -> None:
    check_operations(arms, operations, kv_unified)


@pytest.mark.long
@settings(max_examples=450, **ANY)
@given(operations=OPERATIONS, kv_unified=st.booleans())
def test_any_long_order_of_operations_agrees_with_stock(
    arms: dict[str, Server], operations: list, kv_unified: bool
) -> None:
    """More than 10,000 steps."""
    check_operations(arms, operations, kv_unified)


#
# what sequences share
#


def prompt(n: int, seqs: list[int], first: int = 0) -> Group:
    return seqs, first, [3 + (5 * i) % (N_VOCAB - 3) for i in range(first, first + n)]


def test_copies_share_their_pages(arms: dict[str, Server]) -> None:
    ops = [["decode", prompt(110, [0])], *(["cp", 0, s, -1, -1] for s in range(1, N_SEQS))]
    one = check_agreement(arms, ops[:1])["stats"]
    all_of_them = check_agreement(arms, ops)["stats"]
    assert all_of_them["n_pages"] == one["n_pages"] > 4 and all_of_them["n_hot"] == one["n_hot"]


def test_what_is_decoded_for_all_is_paged_out_once(arms: dict[str, Server]) -> None:
    together = check_agreement(arms, [["decode", prompt(110, list(range(N_SEQS)))]])["stats"]
    alone = check_agreement(arms, [["decode", prompt(110, [0])]])["stats"]
    assert together["n_pages"] == alone["n_pages"] > 4 and together["n_cold"] == alone["n_cold"]


def test_a_prefix_shared_while_hot_is_stored_once(arms: dict[str, Server]) -> None:
    """Each sequence pages it out in a step of its own."""
    ops = [["decode", prompt(36, [0])], *(["cp", 0, s, -1, -1] for s in range(1, N_SEQS))]
    for s in range(N_SEQS):
        ops += [["decode", prompt(40, [s], 36)], ["decode", prompt(20, [s], 76)]]
    stats = check_agreement(arms, ops)["stats"]
    assert stats["n_cold"] == (2 + 2 * N_SEQS) * 16 and stats["n_pages"] == stats["n_page_outs"] == 2 + 2 * N_SEQS


@pytest.mark.parametrize("what_changes", [
    [["rm", 0, -1, -1], ["decode", prompt(100, [2])]],  # the page is freed, and taken for other tokens
    [["rm", 0, 8, 9]],
    [["rm", 1, 4, 5]],
    [["cp", 0, 1, 12, 30]],
    [["cp", 1, 2, -1, -1], ["rm", 1, 20, -1], ["decode", prompt(9, [1], 20)]],
    [["save", "all", -1], ["clear"], ["load", "all", -1]],
])
def test_a_prefix_shared_while_hot_may_change(arms: dict[str, Server], what_changes: list[Op]) -> None:
    ops = [["decode", prompt(36, [0])], ["cp", 0, 1, -1, -1], ["decode", prompt(60, [0], 36)], *what_changes]
    end = 29 if any(op[:2] == ["rm", 1] and op[2] == 20 for op in what_changes) else 36
    ops += [["decode", prompt(60, [1], end)], ["decode", prompt(1, [1], end + 60)], ["rm", 1, 6, 20]]
    check_agreement(arms, [*ops, ["decode", prompt(1, [1], end + 61)]])


def test_a_long_page_that_begins_early_may_end_last(arms: dict[str, Server]) -> None:
    """Copies of single tokens overlap by nearly two pages; the longest page is 32 tokens."""
    env = ENV | {"MONARCH_PAGE_SIZE": "32", "MONARCH_HOT_WINDOW": "32", "MONARCH_SINK_TOKENS": "0"}
    ops = [["decode", prompt(100, [0])], ["rm", 0, 0, 31], ["rm", 0, 32, -1]]
    ops += [["decode", prompt(100, [1], 30)], ["decode", prompt(100, [2], 33)]]
    ops += [["cp", 1, 0, 30, 31], ["cp", 1, 0, 61, 62], ["cp", 2, 0, 33, 34]]
    check_agreement(arms, [*ops, ["decode", prompt(1, [0], 62)], ["rm", 0, 61, -1]], env=env)


@pytest.mark.parametrize("groups", [
    [prompt(1, [0]), prompt(1, [0])],
    [prompt(40, [0]), prompt(40, [0])],  # the same position ends a ubatch and begins the next
    [([0], 1 << 30, [3])],
])
def test_positions_that_no_page_could_hold_are_refused(arms: dict[str, Server], groups: list[Group]) -> None:
    """Upstream takes them. A page has one token for each position, and a state's positions end at 2^30."""
    assert arms["stock"].run(CASE | {"ops": [["decode", *groups]], "kv_unified": True})["steps"][0]["status"] == 0
    ops = [["decode", *groups], ["decode", prompt(60, [0])]]
    got = arms["paged"].run(CASE | {"ops": ops, "kv_unified": True, "env": ENV})["steps"]
    assert [step["status"] for step in got] == [-2, 0] and got[0]["max"][0] == -1


def test_a_copy_in_parts_lists_each_page_once(arms: dict[str, Server]) -> None:
    """The parts meet within a page."""
    whole, parts = [["cp", 0, 1, 0, 110]], [["cp", 0, 1, 43, 110], ["cp", 0, 1, 0, 21], ["cp", 0, 1, 21, 43]]
    ops = [[["decode", prompt(110, [0])], *copies, ["decode", prompt(1, [1], 110)]] for copies in (whole, parts)]
    want, got = (check_agreement(arms, steps)["stats"] for steps in ops)
    assert got["n_promoted"] == want["n_promoted"] > 0


def test_a_page_that_loses_its_front_begins_after_the_copy_in_its_hole(arms: dict[str, Server]) -> None:
    """What is removed later is found all the same."""
    ops = [
        *(["decode", prompt(100, [s])] for s in (0, 1)),
        ["rm", 0, 8, 12],
        ["cp", 1, 0, 8, 12],
        ["rm", 0, 0, 8],
        ["decode", prompt(1, [0], 100)],
        ["rm", 0, 8, 10],
        ["decode", prompt(1, [0], 101)],
        ["rm", 0, 0, 12],
        ["decode", prompt(1, [0], 102)],
    ]
    check_agreement(arms, ops)


def test_a_copy_outlives_what_it_was_made_of(arms: dict[str, Server]) -> None:
    ops = [
        ["decode", prompt(110, [0])],
        ["cp", 0, 1, -1, -1],
        ["rm", 1, 20, 37],
        ["rm", 0, -1, -1],
        ["decode", prompt(100, [2])],
        ["decode", prompt(9, [1], 110)],
    ]
    stats = check_agreement(arms, ops)["stats"]
    assert stats["n_tokens"] == 110 - 17 + 9 + 100


def test_a_whole_state_keeps_what_is_shared(arms: dict[str, Server]) -> None:
    ops = [
        ["decode", prompt(110, [0])],
        *(["cp", 0, s, -1, -1] for s in range(1, N_SEQS)),
        ["save", "all", -1],
        ["clear"],
        ["decode", prompt(90, [3])],
        ["load", "all", -1],
        ["decode", *(prompt(3 + s, [s], 110) for s in range(N_SEQS))],
    ]
    stats = check_agreement(arms, ops)["stats"]
    assert stats["n_tokens"] < 110 + N_SEQS * 40


def test_a_state_whose_tables_could_outgrow_the_pages_is_refused(arms: dict[str, Server]) -> None:
    ops = [*(["decode", prompt(110, [s])] for s in (0, 1)), ["save", "all", -1], ["load", "all", -1]]
    ops += [["forge", "all"], ["load", "all", -1]]
    got = arms["paged"].run(CASE | {"ops": ops, "kv_unified": True, "env": ENV})
    assert [step["status"] for step in got["steps"]] == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("n_ubatch", [7, 32, 512])
def test_64_sequences_of_different_lengths(arms: dict[str, Server], kv_unified: bool, n_ubatch: int) -> None:
    """Then a token of each in a batch; more and fewer sequences than a step takes tokens."""
    case = CASE | {"n_ctx": 64 * 256, "n_seq_max": 64, "n_ubatch": n_ubatch}
    ops = [["decode", *(prompt(3 + 2 * s, [s]) for s in range(64))]]
    ops += [["decode", *(prompt(1, [s], 3 + 2 * s + i) for s in range(64))] for i in range(3)]
    stats = check_agreement(arms, ops, kv_unified, case)["stats"]
    assert stats["n_pages"] > 100


@pytest.mark.parametrize(("kv_unified", "n"), [(True, 128), (False, 256)])
def test_a_full_context_refuses_and_loses_nothing(arms: dict[str, Server], kv_unified: bool, n: int) -> None:
    """1 is llama_decode's answer when there is no room. Upstream gives every stream at least 256 tokens."""
    full = [["decode", prompt(n, [s])] for s in range(N_SEQS)]
    ops = [*full, ["decode", prompt(1, [2], n)], ["rm", 2, n - 28, -1], ["decode", prompt(20, [2], n - 28)]]
    got = arms["paged"].run(CASE | {"ops": ops, "kv_unified": kv_unified, "env": ENV})
    assert [step["status"] for step in got["steps"]] == [0] * N_SEQS + [1, 1, 0]
    assert got["steps"][-1]["max"] == [n - 1, n - 1, n - 9, *[n - 1] * (N_SEQS - 3)]
    alone = arms["stock"].run(CASE | {"ops": [["decode", prompt(n - 8, [2])]], "kv_unified": True})
    assert nmse(got["steps"][-1]["logits"], alone["steps"][0]["logits"][n - 28 :]) <= 1e-6


def test_a_sequence_that_the_context_has_no_place_for_is_refused(arms: dict[str, Server]) -> None:
    ops = [["decode", prompt(5, [0])], ["cp", 0, N_SEQS, -1, -1], ["decode", prompt(1, [0], 5)]]
    check_agreement(arms, [ops[0], ops[2]])
    got = arms["paged"].run(CASE | {"ops": ops, "kv_unified": True, "env": ENV})
    assert [step["status"] for step in got["steps"]] == [0, 1, 0]


#
# pages chosen
#

# 16 bits: with 4, a last bit of K that rounds differently in another batch may become another code
PAGED = ENV | {"MONARCH_MODE": "paged", "MONARCH_PROMOTE_TOKENS": "32", "MONARCH_DENSE_LAYERS": "0"}


def test_neighbours_do_not_change_what_a_sequence_answers(arms: dict[str, Server]) -> None:
    """Budgets, scores and choices are a sequence's own: alone or with seven others, the logits are the same."""
    alone = [["decode", prompt(100, [5])], *(["decode", prompt(1, [5], 100 + i)] for i in range(12))]
    others = [["decode", prompt(60 + 8 * s, [s])] for s in range(5)]
    together = [*others, alone[0]]
    for i, op in enumerate(alone[1:]):
        together.append(["decode", *(prompt(1, [s], 60 + 8 * s + i) for s in range(5)), *op[1:]])
    case = CASE | {"kv_unified": True, "env": PAGED}
    want = arms["paged"].run(case | {"ops": alone})
    got = arms["paged"].run(case | {"ops": together})
    assert got["stats"]["n_promotions"] > want["stats"]["n_promotions"] > 0
    for a, b in zip(got["steps"][5:], want["steps"], strict=True):
        assert nmse(a["logits"][-len(b["logits"]) :], b["logits"]) <= 1e-7


def test_threads_do_not_change_what_sequences_answer(arms: dict[str, Server]) -> None:
    """Sequences that share pages write one log of promotions, whoever comes first."""
    ops = [["decode", prompt(100, [0])], *(["cp", 0, s, -1, -1] for s in range(1, N_SEQS))]
    ops += [["decode", *(prompt(1, [s], 100 + i) for s in range(N_SEQS))] for i in range(12)]
    case = CASE | {"kv_unified": True, "env": PAGED | {"MONARCH_STICKY_THRESHOLD": "2"}, "ops": ops}
    want, got = (arms["paged"].run(case | {"n_threads": n}) for n in (1, 4))
    assert want["stats"] == got["stats"] and want["stats"]["n_sticky"] > 0
    for a, b in zip(got["steps"], want["steps"], strict=True):
        assert a["logits"].size == 0 or nmse(a["logits"], b["logits"]) <= 1e-7
