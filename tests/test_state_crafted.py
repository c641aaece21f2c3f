"""States that somebody made up, with checksums that fit: refused, or harmless."""

import copy
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from crafted import State, parse
from logits import random_tokens, run_cases

from models import write_random_model

PAGED = {
    "MONARCH_MODE": "paged", "MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": "64", "MONARCH_DENSE_LAYERS": "0",
}  # fmt: skip
N_STATE, N_AFTER, N_CALM = 400, 40, 100
N_CTX, N_UBATCH = 640, 64
N_RING = 16 + 32 + N_UBATCH + 16
N_HEADS = 2 * 2  # layers and KV heads


@pytest.fixture
def case(tmp_path: Path) -> dict:
    model = write_random_model(tmp_path / "model.gguf", head_dim=64, n_head=4, n_head_kv=2)
    return {"model": str(model), "n_ctx": N_CTX, "n_ubatch": N_UBATCH, "env": PAGED}


@pytest.fixture
def state(patched_bin: Path, tmp_path: Path, case: dict) -> State:
    file = tmp_path / "good"
    steps = [["decode", N_STATE - 20], *[["decode", 1]] * 20, ["save", str(file)]]
    run_cases(patched_bin, tmp_path, [case | {"tokens": random_tokens(N_STATE), "steps": steps}])
    return parse(file.read_bytes())


def run_crafted(
    lib_dir: Path, folder: Path, case: dict, states: list[State], after: list, n_taken: int
) -> list[list[int]]:
    """What loading each state and the steps after it, which decode n_taken tokens, returned. Then all is as new."""
    tokens, calm_tokens = random_tokens(N_AFTER, 1), random_tokens(N_CALM, 2)
    cases = [case | {"tokens": calm_tokens, "steps": [["decode", N_CALM]]}]
    for i, state in enumerate(states):
        file = folder / f"crafted-{i}"
        file.write_bytes(bytes(state))
        steps = [["load", str(file), -1], *after, ["clear"], ["decode", N_CALM]]
        cases.append(case | {"tokens": tokens[:n_taken] + calm_tokens, "steps": steps})
    calm, *results = run_cases(lib_dir, folder, cases)
    for result in results:
        assert np.array_equal(result.logits[-N_CALM:], calm.logits)
    return [result.info["status"] for result in results]


#
# numbers that are none
#

HALVES = {"NaN": 0x7E00, "negative NaN": 0xFFFF, "infinity": 0x7C00, "negative infinity": 0xFC00, "greatest": 0x7BFF}
FLOATS = [float("nan"), float("inf"), float("-inf"), -1.0, 3e38]


def spoil(data: bytes, half: int, share: float) -> bytes:
    """Some of the 16-bit words."""
    words = np.frombuffer(data, np.uint16).copy()
    words[np.random.default_rng(half).random(len(words)) < share] = half
    return words.tobytes()


def spoil_blocks(state: State, half: int, share: float) -> None:
    state.cold = [spoil(page, half, share) for page in state.cold]


def spoil_hot(state: State, half: int, share: float) -> None:
    state.hot = spoil(state.hot, half, share)


def spoil_sticky(state: State, values: list[float]) -> None:
    """All pages sticky, of importances that have no order."""
    n = len(state.pages)
    importance = struct.pack(f"<{n}f", *(values[i % len(values)] for i in range(n)))
    state.sticky = (struct.pack("<QQ", 2**64 - 1, 2**63) + importance + b"\xff" * n) * N_HEADS


def changed(state: State, change: Callable[..., None], *args: object) -> State:
    result = copy.deepcopy(state)
    change(result, *args)
    return result


def test_numbers_that_are_none_do_no_harm(patched_bin: Path, tmp_path: Path, case: dict, state: State) -> None:
    """Decoding, cutting pages, saving: whatever comes out, the next conversation is not touched by it."""
    sticky = changed(state, spoil_sticky, FLOATS)
    spoilers = (spoil_blocks, spoil_hot)
    states = [
        changed(kind, spoiler, half, share)
        for spoiler in spoilers
        for half in HALVES.values()
        for kind, share in ((state, 1.0), (sticky, 0.1))
    ]
    states += [sticky, *(changed(state, spoil_sticky, [value]) for value in FLOATS)]
    decode = [["decode", 1]] * 4
    after = [*decode, ["rm", 100, 123], *decode, ["decode", 32], ["save", str(tmp_path / "again")]]
    for status in run_crafted(patched_bin, tmp_path, case, states, after, n_taken=40):
        assert status[0] == len(bytes(state)) and status[1:-2] == [0] * 4 + [1] + [0] * 5
        assert status[-2] > 0 and status[-1] == 0


#
# tables
#


def resized(state: State, n_hot: int) -> State:
    """With so many hot tokens: what lies after the last page, and the sink tokens before the first."""
    result = copy.deepcopy(state)
    n_sink = result.header["sink_tokens"]
    end = result.pages[-1][0] + 16
    result.positions = [*range(n_sink), *range(end, end + n_hot - n_sink)]
    result.hot = bytes(len(state.hot) // len(state.positions) * n_hot)
    result.header["n_hot"] = n_hot
    return result


def test_a_full_ring_says_so_and_goes_on_once_there_is_room(
    patched_bin: Path, tmp_path: Path, case: dict, state: State
) -> None:
    state = resized(state, N_RING)
    state.pages, state.cold = state.pages[:2], state.cold[:2]  # or it holds more than n_ctx
    state.header["n_pages"] = 2
    state.sticky = bytes(N_HEADS * (16 + 2 * 5))
    state.positions = [*range(16), *range(200, 200 + N_RING - 16)]
    after = [["decode", 1], ["rm", 290], ["decode", 1], ["decode", 30]]
    (status,) = run_crafted(patched_bin, tmp_path, case, [state], after, n_taken=31)
    assert status == [len(bytes(state)), 1, 1, 0, 0, 0]


def with_header(**fields: int) -> Callable[[State], None]:
    return lambda state: state.header.update(fields)


def with_position(i: int, pos: int) -> Callable[[State], None]:
    return lambda state: state.positions.__setitem__(i, pos)


def with_page(i: int, first_pos: int, mask: int = 0xFFFF) -> Callable[[State], None]:
    return lambda state: state.pages.__setitem__(i, (first_pos, mask))


REFUSED = {
    "hot tokens without end": with_header(n_hot=2**32 - 1),
    "more hot tokens than there are": with_header(n_hot=N_RING),
    "pages without end": with_header(n_pages=2**32 - 1),
    "as many bytes as wrap": with_header(n_pages=2**29, n_hot=2**30),
    "no page": with_header(n_pages=0),
    "no hot token": with_header(n_hot=0),
    "the last position": with_position(-1, 2**31 - 1),
    "a position so great that sums wrap": with_position(-1, 2**31 - 40),
    "a negative position": with_position(0, -1),
    "positions out of order": with_position(1, 0),
    "a position among the pages": with_position(16, 120),
    "a position that is neither sink token nor recent": with_position(15, 17),
    "a page where sink tokens are": with_page(0, 0),
    "a negative page": with_page(0, -16),
    "a page so late that sums wrap": with_page(-1, 2**31 - 16),
    "the same page twice": with_page(1, 16),
    "an empty page": with_page(3, 64, 0),
    "a page of more tokens than a page has": with_page(3, 64, 0x1FFFF),
}


def test_tables_that_cannot_be_are_refused(patched_bin: Path, tmp_path: Path, case: dict, state: State) -> None:
    assert state.positions[15:17] == [15, state.pages[-1][0] + 16] and state.pages[0][0] == 16
    states = [changed(state, change) for change in REFUSED.values()] + [resized(state, N_RING + 1)]
    statuses = run_crafted(patched_bin, tmp_path, case, states, [["decode", 8]], n_taken=8)
    taken = [name for name, status in zip([*REFUSED, "a ring too full"], statuses, strict=True) if status[0]]
    assert taken == []
    assert all(status[1:] == [0, 0] for status in statuses)
