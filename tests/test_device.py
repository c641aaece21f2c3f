"""The cache on a device: a server of the same library on this machine, whose memory the host cannot reach, and one that
runs the CUDA kernels in their emulation."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from arms import ArmWith, python_path
from child import TESTS, environment, run_child_json
from emulated_device import build_emulated_device
from logits import Result, nmse, random_tokens, run_cases

from models import write_random_model
from monarch_llamacpp.ab_lab import Lab
from monarch_llamacpp.ab_probe import run_probes
from monarch_llamacpp.ab_rows import Rows
from monarch_llamacpp.ab_settings import Settings
from monarch_llamacpp.knobs import Knobs
from monarch_llamacpp.progress import Progress
from monarch_llamacpp.recall import write_recall_model

ALL, LAST = 99, 2  # layers on the device: of two and the output, all or the last two
PAGED = {
    "MONARCH_MODE": "paged",
    "MONARCH_HOT_WINDOW": "32",
    "MONARCH_PROMOTE_TOKENS": "64",
    "MONARCH_KERNEL": "plain",
}
ONE_BY_ONE = [["decode", 1]] * 20


class Device(NamedTuple):
    env: dict[str, str]  # of processes that are to have it
    name: str  # of its memory
    tolerance: float  # of logits, against the host's plain path
    same_bytes: bool  # that it saves


@pytest.fixture(scope="module", params=["rpc", "emulated"])
def device(request: pytest.FixtureRequest) -> Device:
    return request.getfixturevalue(f"{request.param}_device")


@pytest.fixture(scope="module")
def emulated_device(patched_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Device:
    library = build_emulated_device(patched_bin, tmp_path_factory.mktemp("emulated"))
    return Device({"EMULATED_DEVICE": str(library)}, "Emulated", 1e-6, False)


@pytest.fixture(scope="module")
def rpc_device(patched_bin: Path) -> Iterator[Device]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    endpoint = f"{address[0]}:{address[1]}"
    command = [sys.executable, str(TESTS / "child_rpc_server.py"), endpoint]
    env = environment(patched_bin, {"MONARCH_KERNEL": "plain"})
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(address, server)
            yield Device({"RPC_ENDPOINT": endpoint}, f"RPC0[{endpoint}]", 1e-9, True)
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
    steps = {"n_ctx": 1024, "n_ubatch": 64, "env": PAGED, "tokens": random_tokens(500)}
    return {"model": str(model), "kv_bytes_per_token": 2 * 2 * 2 * 64 * 2} | steps


@pytest.fixture(scope="module")
def recall_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("recall") / "recall.gguf"
    write_recall_model(model)
    return model


def run_on(device: Device, patched_bin: Path, folder: Path, cases: list[dict]) -> list[Result]:
    return run_cases(patched_bin, folder, [{"n_gpu_layers": ALL} | case for case in cases], env=device.env)


def check_equal(got: Result, want: Result, tolerance: float) -> None:
    assert nmse(got.logits, want.logits) <= tolerance
    assert np.array_equal(got.logits.argmax(1), want.logits.argmax(1))
    assert got.info["stats"] == want.info["stats"]
    assert got.info["status"] == want.info["status"]


def all_steps(file: Path) -> list[list]:
    """Prompt, tokens, cut pages, a state saved, something else, the state restored."""
    steps = [["decode", 300], *ONE_BY_ONE, ["rm", 100, 120], ["rm", 250], *ONE_BY_ONE, ["save", str(file)]]
    return [*steps, ["clear"], ["decode", 110], *ONE_BY_ONE, ["clear"], ["load", str(file), -1], *ONE_BY_ONE]


@pytest.mark.parametrize("mode", ["paged", "exact", "window"])
@pytest.mark.parametrize("n_gpu_layers", [ALL, LAST])
def test_a_device_decodes_as_the_host_does(
    patched_bin: Path, tmp_path: Path, device: Device, case: dict, mode: str, n_gpu_layers: int
) -> None:
    case = case | {"env": PAGED | {"MONARCH_MODE": mode}, "steps": all_steps(tmp_path / "state")}
    (want,) = run_cases(patched_bin, tmp_path, [case])
    (got,) = run_on(device, patched_bin, tmp_path, [case | {"n_gpu_layers": n_gpu_layers}])
    assert [*want.info["stores"]] == ["CPU"]
    assert sorted(got.info["stores"]) == (["CPU"] if n_gpu_layers == LAST else []) + [device.name]
    check_equal(got, want, device.tolerance)


def test_states_move_between_host_and_device(patched_bin: Path, tmp_path: Path, device: Device, case: dict) -> None:
    files = [str(tmp_path / name) for name in ("host", "device")]
    save = [case | {"steps": [["decode", 300], *ONE_BY_ONE, ["save", file]]} for file in files]
    rest = case | {"tokens": case["tokens"][320:]}
    load = [rest | {"steps": [["load", file, -1], *ONE_BY_ONE]} for file in files]
    run_cases(patched_bin, tmp_path, save[:1])
    run_on(device, patched_bin, tmp_path, save[1:])
    assert not device.same_bytes or Path(files[0]).read_bytes() == Path(files[1]).read_bytes()
    for step in load:
        (want,) = run_cases(patched_bin, tmp_path, [step])
        (got,) = run_on(device, patched_bin, tmp_path, [step])
        assert [*got.info["stores"]] == [device.name]
        check_equal(got, want, device.tolerance)


def test_stock_states_are_paged_out_onto_the_device(
    patched_bin: Path, stock_bin: Path, tmp_path: Path, device: Device, case: dict
) -> None:
    file = str(tmp_path / "stock")
    run_cases(stock_bin, tmp_path, [case | {"env": {}, "steps": [["decode", 300], ["save", file]]}])
    case = case | {"tokens": case["tokens"][300:], "steps": [["load", file, -1], *ONE_BY_ONE]}
    (want,) = run_cases(patched_bin, tmp_path, [case])
    (got,) = run_on(device, patched_bin, tmp_path, [case])
    check_equal(got, want, device.tolerance)


def test_a_cold_tier_of_device_is_where_the_layers_are(
    patched_bin: Path, tmp_path: Path, device: Device, case: dict
) -> None:
    case = case | {"env": PAGED | {"MONARCH_COLD_TIER": "device"}, "steps": [["decode", 200]]}
    (host,) = run_cases(patched_bin, tmp_path, [case])
    (far,) = run_on(device, patched_bin, tmp_path, [case])
    assert ([*host.info["stores"]], [*far.info["stores"]]) == (["CPU"], [device.name])


def test_the_cache_stays_on_the_host_if_asked(patched_bin: Path, tmp_path: Path, device: Device, case: dict) -> None:
    case = case | {"offload_kqv": False, "steps": [["decode", 300], *ONE_BY_ONE]}
    (want,) = run_cases(patched_bin, tmp_path, [case])
    (got,) = run_on(device, patched_bin, tmp_path, [case])
    assert [*got.info["stores"]] == ["CPU"]
    check_equal(got, want, 1e-9)


def test_a_device_that_does_not_reach_the_host_leaves_the_cache_there(
    patched_bin: Path, tmp_path: Path, rpc_device: Device, case: dict
) -> None:
    case = case | {"env": PAGED | {"MONARCH_COLD_TIER": "ram"}, "steps": [["decode", 300], *ONE_BY_ONE]}
    (want,) = run_cases(patched_bin, tmp_path, [case])
    (got,) = run_on(rpc_device, patched_bin, tmp_path, [case])
    assert [*got.info["stores"]] == ["CPU"]
    check_equal(got, want, 1e-9)


@pytest.mark.parametrize(("mode", "cold_tier"), [("paged", "device"), ("paged", "ram"), ("exact", "device")])
def test_every_needle_is_recalled(
    patched_bin: Path, recall_model: Path, emulated_device: Device, mode: str, cold_tier: str
) -> None:
    """The constructed recall model, of which the CPU answers all questions, through the CUDA kernels."""
    env = PAGED | {"MONARCH_MODE": mode, "MONARCH_COLD_TIER": cold_tier, "MONARCH_PROMOTE_TOKENS": "128"}
    args = [recall_model, "--tokens", 2048]
    report = run_child_json(patched_bin, "child_recall.py", args, env=env | emulated_device.env)
    assert len(report["needles"]) == 10
    assert [needle["key"] for needle in report["needles"] if not needle["correct"]] == []
    assert report["stats"]["n_cold"] > 0.9 * 2048
    assert (report["stats"]["n_frame_hits"] > 0) == (cold_tier == "ram")


@pytest.mark.parametrize(
    ("mode", "n_gpu_layers", "frames"), [("paged", ALL, 0), ("paged", ALL, 1), ("paged", LAST, 5), ("exact", ALL, 0)]
)
def test_pages_in_host_memory_are_the_same_pages(
    patched_bin: Path, tmp_path: Path, emulated_device: Device, case: dict, mode: str, n_gpu_layers: int, frames: int
) -> None:
    """A frame's copy or the page itself: the same bytes, so the same logits to the last bit."""
    env = PAGED | {"MONARCH_MODE": mode}
    far = env | {"MONARCH_COLD_TIER": "ram", "MONARCH_FRAMES": str(frames)}
    case = case | {"n_gpu_layers": n_gpu_layers, "hooks": True}
    (want, got) = run_on(emulated_device, patched_bin, tmp_path, [
        case | {"env": knobs, "steps": all_steps(tmp_path / f"state{i}")} for i, knobs in enumerate([env, far])
    ])
    assert {"Emulated", "Emulated_Mapped"} <= set(got.info["stores"])
    assert np.array_equal(got.logits, want.logits)
    moved = ("n_page_ins", "n_frame_hits")
    apart = {name for name, value in want.info["stats"].items() if got.info["stats"][name] != value}
    assert apart <= {*moved, "frame_bytes"}
    counts = [got.info["stats"][name] for name in moved]
    assert all(count > 0 for count in counts) if mode == "paged" else counts == [0, 0]
    assert got.info["n_page_in_events"] == counts[0]
    assert [want.info["stats"][name] for name in (*moved, "frame_bytes")] == [0, 0, 0]


def test_what_128k_tokens_take_on_the_device(patched_bin: Path, tmp_path: Path, emulated_device: Device) -> None:
    """Heads of 128, as in an 8B model: at most 0.08 of f16 K and V with cold pages in host memory, 0.32 without."""
    n_ctx, head_dim, n_layer = 131072, 128, 2
    model = write_random_model(tmp_path / "model.gguf", head_dim=head_dim, n_head=4, n_head_kv=1, n_ctx=n_ctx)
    case = {"model": str(model), "n_ctx": n_ctx, "n_ubatch": 512, "tokens": random_tokens(1), "steps": [["decode", 1]]}
    tiers = [case | {"env": {"MONARCH": "1", "MONARCH_COLD_TIER": tier}} for tier in ("ram", "device")]
    stock = n_layer * 2 * head_dim * 2 * n_ctx
    ram, near = (
        (result.info["stores"]["Emulated"] * 2**20 + result.info["stats"]["hot_bytes"]) / stock
        for result in run_on(emulated_device, patched_bin, tmp_path, tiers)
    )
    assert 0.03 < ram <= 0.08 < near <= 0.32


def test_ab_tells_what_the_device_holds(
    patched_bin: Path, stock_bin: Path, emulated_device: Device, case: dict
) -> None:
    """Weights, K and V; less of it with cold pages in host memory."""
    extra = (python_path("emulated"), *emulated_device.env.items())
    knobs = Knobs(mode="paged", hot_window=32, promote_tokens=64, frames=1, cold_tier="ram")
    arms = [
        ArmWith("stock", stock_bin, None, extra=extra),
        ArmWith("device", patched_bin, knobs.replace(cold_tier="device", frames=0), extra=extra),
        ArmWith("ram", patched_bin, knobs, extra=extra),
        ArmWith("host", patched_bin, knobs.replace(cold_tier="auto", frames=0)),
    ]
    lab = Lab(arms, Settings(Path(case["model"]), [700], 0, 2, 1, 1), Rows(None), Progress())
    run_probes(lab)
    assert not lab.rows.of("failure")
    held = {row["arm"]: row["vram_bytes"] for row in lab.rows.of("memory")}
    assert held["stock"] > 700 * case["kv_bytes_per_token"]
    assert held["device"] > held["ram"] > held["host"] == 0
