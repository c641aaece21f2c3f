"""Each allocation of creating, decoding, saving, restoring and removing fails once, and each write of a saved state."""

import subprocess
import sys
from pathlib import Path

import pytest
from arms import python_path
from child import TESTS, run_child_json
from emulated_device import build_emulated_device
from logits import random_tokens, run_cases

from models import write_random_model

PAGED = {
    "MONARCH_MODE": "paged", "MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": "64", "MONARCH_DENSE_LAYERS": "0",
}  # fmt: skip
SUMMED = PAGED | {"MONARCH_STICKY_THRESHOLD": "0"}  # only summaries choose pages
PREFIX = "fault_alloc"


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("failing allocations needs LD_PRELOAD, which Linux has")
    library = tmp_path_factory.mktemp(PREFIX) / f"{PREFIX}.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared"]
    subprocess.run(["c++", *flags, str(TESTS / f"{PREFIX}.cpp"), "-o", str(library), "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model") / "model.gguf", head_dim=64, n_head=4, n_head_kv=2)


@pytest.fixture(scope="module")
def device_env(patched_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a device: the host has only copies of pages."""
    library = build_emulated_device(patched_bin, tmp_path_factory.mktemp("emulated"))
    return SUMMED | dict([python_path("emulated"), ("EMULATED_DEVICE", str(library))])


def run_faults(lib_dir: Path, preload: Path, what: str, *args: Path | str, env: dict[str, str] = PAGED) -> dict:
    return run_child_json(lib_dir, "child_faults.py", [what, *args], env=env | {"LD_PRELOAD": str(preload)})


def test_create_without_memory_is_refused(patched_bin: Path, stock_bin: Path, preload: Path, model: Path) -> None:
    """Upstream loses a few blocks when some of its own allocations fail: paging loses no more."""
    stock = run_faults(stock_bin, preload, "create", model, env={})
    paged = run_faults(patched_bin, preload, "create", model)
    assert paged["n"] > stock["n"] > 0 and paged["refused"] > stock["refused"]
    assert paged["left"] <= stock["left"]


def test_contexts_are_freed_in_any_order(patched_bin: Path, preload: Path, model: Path) -> None:
    assert run_faults(patched_bin, preload, "free", model) == {"left": [0, 0, 0]}


def test_decode_without_memory_changes_nothing(patched_bin: Path, preload: Path, model: Path) -> None:
    """After 5000 failed attempts the logits are those of a context where none failed."""
    got = run_faults(patched_bin, preload, "decode", model)
    assert got["n"] >= got["refused"] > 100


def test_save_without_memory_changes_nothing(patched_bin: Path, preload: Path, model: Path) -> None:
    assert all(n > 0 for n in run_faults(patched_bin, preload, "save", model).values())


@pytest.mark.parametrize("kind", ["paged", "stock"])
def test_restore_without_memory_changes_nothing(
    patched_bin: Path, stock_bin: Path, preload: Path, model: Path, tmp_path: Path, kind: str
) -> None:
    state = tmp_path / "state"
    lib_dir, env = (patched_bin, PAGED) if kind == "paged" else (stock_bin, {})
    tokens = random_tokens(500)
    case = {"model": str(model), "n_ctx": 640, "n_ubatch": 64, "tokens": tokens, "env": env}
    run_cases(lib_dir, tmp_path, [case | {"steps": [["decode", 260], ["save", str(state)]]}])
    got = run_faults(patched_bin, preload, "restore", model, state)
    assert got["n"] >= got["refused"] > 10


@pytest.mark.parametrize("what", ["remove", "copy"])
def test_change_without_memory_changes_nothing(patched_bin: Path, preload: Path, model: Path, what: str) -> None:
    assert all(n > 0 for n in run_faults(patched_bin, preload, what, model, env=SUMMED).values())


def test_change_on_a_device_without_memory_changes_nothing(
    patched_bin: Path, preload: Path, model: Path, device_env: dict[str, str]
) -> None:
    assert run_faults(patched_bin, preload, "remove", model, "own", env=device_env)["own"] > 0


def test_clear_needs_no_memory(patched_bin: Path, preload: Path, model: Path, device_env: dict[str, str]) -> None:
    assert run_faults(patched_bin, preload, "clear", model, env=SUMMED) == {"all": 0}
    assert run_faults(patched_bin, preload, "clear", model, env=device_env) == {"all": 0}


#
# writes
#


@pytest.mark.parametrize("n_tokens", [1, 300])
def test_a_state_that_cannot_be_written_is_an_error(
    patched_bin: Path, model: Path, tmp_path: Path, n_tokens: int
) -> None:
    """A full disk, and one with room for some of it: whichever write fails, or only the last flush."""
    got = run_child_json(patched_bin, "child_writes.py", [model, tmp_path / "state", n_tokens], env=PAGED)
    assert got["sizes"] and got["taken"] == []
    assert got["whole"] == [True, True]
