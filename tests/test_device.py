"""The cache in memory that the host cannot reach: a server of the same library on this machine is the device."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from child import TESTS, environment
from logits import Result, nmse, random_tokens, run_cases

from models import write_random_model

ALL, LAST = 99, 2  # layers on the device: of two and the output, all or the last two
PAGED = {"MONARCH_MODE": "paged", "MONARCH_HOT_WINDOW": "32", "MONARCH_PROMOTE_TOKENS": "64"}
ONE_BY_ONE = [["decode", 1]] * 20


@pytest.fixture(scope="module")
def endpoint(patched_bin: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    endpoint = f"{address[0]}:{address[1]}"
    command = [sys.executable, str(TESTS / "child_rpc_server.py"), endpoint]
    with subprocess.Popen(command, env=environment(patched_bin, {}), stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(address, server)
            yield endpoint
        finally:
            server.kill()


def wait_for(address: tuple[str, int], server: subprocess.Popen) -> None:
    for _ in range(300):
        assert server.poll() is None, "the server ended"
        try:
            socket.create_connection(address, 1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"no server at {address}")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict:
    model = write_random_model(
        tmp_path_factory.mktemp("device") / "model.gguf", head_dim=64, n_head=4, n_head_kv=2, n_ctx=1024
    )
    return {"model": str(model), "n_ctx": 1024, "n_ubatch": 64, "env": PAGED, "tokens": random_tokens(500)}


def run_on(endpoint: str, patched_bin: Path, folder: Path, cases: list[dict]) -> list[Result]:
    return run_cases(patched_bin, folder, cases, env={"RPC_ENDPOINT": endpoint})


def device(endpoint: str) -> str:
    return f"RPC0[{endpoint}]"


def check_equal(got: Result, want: Result) -> None:
    assert nmse(got.logits, want.logits) <= 1e-9
    assert np.array_equal(got.logits.argmax(1), want.logits.argmax(1))
    assert got.info["stats"] == want.info["stats"]
    assert got.info["status"] == want.info["status"]


@pytest.mark.parametrize("mode", ["paged", "exact", "window"])
@pytest.mark.parametrize("n_gpu_layers", [ALL, LAST])
def test_a_device_decodes_as_the_host_does(
    patched_bin: Path, tmp_path: Path, endpoint: str, case: dict, mode: str, n_gpu_layers: int
) -> None:
    """Prompt, tokens, cut pages, a state saved and restored."""
    file = str(tmp_path / "state")
    steps = [["decode", 300], *ONE_BY_ONE, ["rm", 100, 120], ["rm", 250], *ONE_BY_ONE, ["save", file]]
    steps += [["clear"], ["load", file, -1], *ONE_BY_ONE]
    case = case | {"env": PAGED | {"MONARCH_MODE": mode}, "steps": steps}
    (want,) = run_cases(patched_bin, tmp_path, [case])
    (got,) = run_on(endpoint, patched_bin, tmp_path, [case | {"n_gpu_layers": n_gpu_layers}])
    assert want.info["stores"] == ["CPU"]
    assert sorted(got.info["stores"]) == (["CPU"] if n_gpu_layers == LAST else []) + [device(endpoint)]
    check_equal(got, want)


def test_states_move_between_host_and_device(patched_bin: Path, tmp_path: Path, endpoint: str, case: dict) -> None:
    files = [str(tmp_path / name) for name in ("host", "device")]
    save = [case | {"steps": [["decode", 300], *ONE_BY_ONE, ["save", file]]} for file in files]
    rest = case | {"tokens": case["tokens"][320:]}
    load = [rest | {"steps": [["load", file, -1], *ONE_BY_ONE]} for file in files]
    run_cases(patched_bin, tmp_path, save[:1])
    run_on(endpoint, patched_bin, tmp_path, [save[1] | {"n_gpu_layers": ALL}])
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()
    (want,) = run_cases(patched_bin, tmp_path, load[1:])
    (got,) = run_on(endpoint, patched_bin, tmp_path, [load[0] | {"n_gpu_layers": ALL}])
    assert got.info["stores"] == [device(endpoint)]
    check_equal(got, want)


def test_stock_states_are_paged_out_onto_the_device(
    patched_bin: Path, stock_bin: Path, tmp_path: Path, endpoint: str, case: dict
) -> None:
    file = str(tmp_path / "stock")
    run_cases(stock_bin, tmp_path, [case | {"env": {}, "steps": [["decode", 300], ["save", file]]}])
    case = case | {"tokens": case["tokens"][300:], "steps": [["load", file, -1], *ONE_BY_ONE]}
    (want,) = run_cases(patched_bin, tmp_path, [case])
    (got,) = run_on(endpoint, patched_bin, tmp_path, [case | {"n_gpu_layers": ALL}])
    check_equal(got, want)


def test_a_cold_tier_of_device_is_where_the_layers_are(
    patched_bin: Path, tmp_path: Path, endpoint: str, case: dict
) -> None:
    case = case | {"env": PAGED | {"MONARCH_COLD_TIER": "device"}, "steps": [["decode", 200]], "n_gpu_layers": ALL}
    (host,) = run_cases(patched_bin, tmp_path, [case])
    (far,) = run_on(endpoint, patched_bin, tmp_path, [case])
    assert (host.info["stores"], far.info["stores"]) == (["CPU"], [device(endpoint)])


@pytest.mark.parametrize(
    "kept", [{"env": PAGED | {"MONARCH_COLD_TIER": "ram"}}, {"offload_kqv": False}], ids=["cold_tier", "offload_kqv"]
)
def test_the_cache_stays_on_the_host_if_asked(
    patched_bin: Path, tmp_path: Path, endpoint: str, case: dict, kept: dict
) -> None:
    case = case | kept | {"steps": [["decode", 300], *ONE_BY_ONE]}
    (want,) = run_cases(patched_bin, tmp_path, [case])
    (got,) = run_on(endpoint, patched_bin, tmp_path, [case | {"n_gpu_layers": ALL}])
    assert got.info["stores"] == ["CPU"]
    check_equal(got, want)
