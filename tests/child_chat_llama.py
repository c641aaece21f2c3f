"""monarch_llamacpp.Llama as a program uses it. Argument: the folder of recall.gguf and long.txt."""

import os
import pickle
import sys
from pathlib import Path

import monarch_llamacpp

assert "llama_cpp" not in sys.modules, "importing the package loads the library"

from monarch_llamacpp import Knobs, Llama  # noqa: E402
from monarch_llamacpp.errors import MonarchError, UsageError  # noqa: E402
from monarch_llamacpp.knobs import specs  # noqa: E402
from monarch_llamacpp.llama import SHIM  # noqa: E402

FOLDER = Path(sys.argv[1])
OPTIONS = {"n_ctx": 4096, "n_ubatch": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
KNOBS = Knobs(
    mode="paged", hot_window=64, promote_tokens=128, dense_layers=0, promotion_threshold=0.01, scorer="minmax"
)


def refused(kind: type, call) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("was not refused")


def check_defaults() -> None:
    struct = SHIM._new("struct monarch_knobs")
    assert SHIM._lib.monarch_knobs_default(struct) == 0
    SHIM.set_pending(None)
    llm = Llama(str(FOLDER / "recall.gguf"), paging=Knobs(), **OPTIONS)
    assert llm.knobs() == Knobs()
    for name, spec in specs().items():
        value = getattr(struct, name)
        assert (spec.choices[value] if spec.type is str else round(value, 6)) == spec.default, name


def check_paging(llm: Llama) -> None:
    assert llm.knobs() == KNOBS
    promoted, broken = [], []
    llm.set_hooks(on_promote=promoted.append, on_page_out=lambda event: broken.append(event) or 1 / 0)
    llm.eval(llm.tokenize((FOLDER / "long.txt").read_bytes(), special=True))
    stats, pages = llm.stats(), llm.pages()
    assert stats.n_tokens == llm.n_tokens > 2900 and stats.mode == "paged"
    assert stats.n_pages == len(pages) == stats.n_page_outs > 150
    assert stats.n_cold == sum(page.n_tokens for page in pages)
    assert (len(broken), len(promoted)) == (stats.n_page_outs, stats.n_promotions) and promoted
    assert {(event.layer, event.n_tokens) for event in broken} == {(-1, 16)}
    assert all(0 <= event.layer < 2 and event.head_kv == 0 for event in promoted)


def check_state(llm: Llama) -> None:
    """llama-cpp-python's own way of keeping a context."""
    before, kept = llm.stats(), llm.save_state()
    assert kept.llama_state_size < 0.35 * 2 * 2 * 128 * 2 * before.n_tokens + 2**18  # of f16 K and V
    again = []
    for _ in range(2):
        llm.load_state(kept)
        now = llm.stats()
        assert (now.n_tokens, now.n_pages, now.n_promotions) == (before.n_tokens, before.n_pages, before.n_promotions)
        assert llm.n_tokens == before.n_tokens
        llm.eval(llm.tokenize(b" The passphrase", add_bos=False))
        again.append(int(llm.sample(temp=0.0)))
        llm.eval([5] * 100)
    assert again[0] == again[1]
    llm.load_state(kept)


def check_hooks_end(llm: Llama) -> None:
    seen = []
    llm.set_hooks(on_promote=seen.append)
    llm.set_hooks()
    llm.eval([5] * 64)
    assert seen == []


def check_cut_page() -> None:
    """A page that lost tokens in the hot window is told with those that are left."""
    import llama_cpp

    llm = Llama(str(FOLDER / "recall.gguf"), paging=KNOBS, **OPTIONS)
    seen = []
    llm.set_hooks(on_page_out=seen.append)
    llm.eval([5] * 64)
    assert llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, 40, 45)
    llm.eval([5] * 200)
    assert [(event.first_pos, event.n_tokens) for event in seen[:3]] == [(16, 16), (32, 11), (48, 16)]
    assert sum(event.n_tokens for event in seen) == llm.stats().n_cold


def check_knobs(llm: Llama) -> None:
    llm.set_knob("mode", "exact")
    llm.set_knob("promote_tokens", "64")
    assert llm.knobs() == KNOBS.replace(mode="exact", promote_tokens=64)
    assert "needs a new context" in refused(UsageError, lambda: llm.set_knob("page_size", 8))
    assert "mode" in refused(UsageError, lambda: llm.set_knob("mode", "slow"))


def check_environment() -> None:
    os.environ["MONARCH_MODE"] = "window"
    os.environ["MONARCH_HOT_WINDOW"] = "128"
    chosen = Llama(str(FOLDER / "recall.gguf"), **OPTIONS).knobs()
    assert (chosen.mode, chosen.hot_window) == ("window", 128)
    off = Llama(str(FOLDER / "recall.gguf"), paging=Knobs(mode="off"), **OPTIONS)
    assert refused(MonarchError, off.stats)


def check_copies() -> None:
    llm = Llama(str(FOLDER / "recall.gguf"), paging=KNOBS, **OPTIONS)
    llm.set_knob("promote_tokens", 64)
    assert pickle.loads(pickle.dumps(llm)).knobs() == KNOBS.replace(promote_tokens=64)
    off = Llama(str(FOLDER / "recall.gguf"), paging=Knobs(mode="off"), **OPTIONS)
    os.environ["MONARCH_MODE"] = "paged"
    assert refused(MonarchError, pickle.loads(pickle.dumps(off)).stats)


def check_closed() -> None:
    llm = Llama(str(FOLDER / "recall.gguf"), paging=KNOBS, **OPTIONS)
    llm.eval([5] * 8)
    state = llm.get_sequence_state()
    llm.close()
    uses = [llm.stats, llm.pages, llm.knobs, llm.set_hooks, llm.get_sequence_state]
    uses += [llm.n_ctx, llm.n_vocab, llm.save_state]
    uses += [lambda: llm("x"), lambda: llm.eval([5]), lambda: llm.tokenize(b"x")]
    for use in (*uses, lambda: llm.set_sequence_state(state), lambda: llm.set_knob("mode", "exact")):
        assert "the model is closed" in refused(MonarchError, use)
    llm.close()


check_defaults()
model = Llama(str(FOLDER / "recall.gguf"), paging=KNOBS, **OPTIONS)
check_paging(model)
check_state(model)
check_hooks_end(model)
check_cut_page()
check_knobs(model)
check_environment()
check_copies()
check_closed()
assert monarch_llamacpp.Llama is Llama
