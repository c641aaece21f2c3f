"""The A/B comparison: its parts without a build, then the whole of it on small models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from child import TESTS
from rich.console import Console

import models as random_models
from monarch_llamacpp import ab, ab_bench
from monarch_llamacpp.ab_arms import ARMS, Arm
from monarch_llamacpp.ab_bench import merge_rows
from monarch_llamacpp.ab_probe import check_activity
from monarch_llamacpp.ab_report import Speeds, print_report
from monarch_llamacpp.cli import run_command
from monarch_llamacpp.errors import MonarchError
from monarch_llamacpp.knobs import Knobs, specs
from monarch_llamacpp.recall import write_recall_model

# parts


def make_arm(name: str, **knobs) -> Arm:
    return Arm(name, Path("/nowhere"), None if name == "stock" else Knobs(**knobs))


def speed_row(arm: str, samples: list[float], flash_attn: int = 0, depth: int = 0) -> dict:
    n_gen = 100
    row = {"arm": arm, "flash_attn": flash_attn, "n_depth": depth, "n_prompt": 0, "n_gen": n_gen}
    return merge_rows([row | {"samples_ts": [ts], "samples_ns": [n_gen * 1e9 / ts]} for ts in samples])


def test_an_arm_s_processes_see_its_knobs_and_none_of_the_caller_s(monkeypatch):
    monkeypatch.setenv("MONARCH", "1")
    monkeypatch.setenv("MONARCH_HOT_WINDOW", "99")
    monkeypatch.setenv("MONARCH_CACHE", "/cache")
    assert not {name for name in make_arm("stock").environment() if name.startswith("MONARCH")} - {"MONARCH_CACHE"}
    paged = make_arm("paged", mode="paged", sink_tokens=4).environment()
    assert {spec.env for spec in specs().values()} <= paged.keys()
    assert (paged["MONARCH_MODE"], paged["MONARCH_SINK_TOKENS"], paged["MONARCH_HOT_WINDOW"]) == ("paged", "4", "512")


def test_repetitions_become_one_row():
    row = speed_row("stock", [90.0, 110.0])
    assert (row["avg_ts"], row["samples_ts"]) == (100.0, [90.0, 110.0])
    assert row["stddev_ts"] == pytest.approx(200**0.5)
    assert speed_row("stock", [90.0])["stddev_ts"] == 0


def test_stock_is_judged_by_its_better_setting():
    speeds = Speeds([speed_row("stock", [50.0]), speed_row("stock", [80.0], flash_attn=1), speed_row("paged", [40.0])])
    test = (0, 0, 100)
    assert speeds.row("stock", test)["flash_attn"] == 1
    assert (speeds.ratio("stock", test), speeds.ratio("paged", test)) == (1.0, 0.5)
    assert speeds.ratio("exact", test) is None


def test_one_slow_repetition_does_not_count_and_is_reported(capsys):
    rows = [speed_row("stock", [100.0, 100.0, 100.0]), speed_row("paged", [120.0, 10.0, 120.0])]
    assert Speeds(rows).ratio("paged", (0, 0, 100)) == 1.2
    memory = [{"arm": "stock", "kv_bytes": 1, "n_tokens": 1, "stats": None}]
    print_report(Console(width=80), rows, [], memory)
    assert "1 of 2 rows vary by more than 20%" in capsys.readouterr().out


STATS = dict(mode="paged", n_layer=2, n_head_kv=3, n_cold=160, n_pages=10, n_promoted=6, n_promotions=5)


@pytest.mark.parametrize(
    ("name", "mode", "stats", "problem"),
    [
        ("stock", None, None, None),
        ("stock", None, {}, "paging is on"),
        ("patched-off", "off", None, None),
        ("patched-off", "off", {"mode": "off"}, "paging is on"),
        ("paged", "paged", None, "paging is off"),
        ("paged", "paged", {}, None),
        ("paged", "paged", {"n_promotions": 0}, "no page of 160 cold tokens was promoted"),
        ("paged", "paged", {"n_promotions": 0, "n_cold": 0}, None),
        ("paged", "paged", {"mode": "exact"}, "it ran in mode exact"),
        ("window", "window", {"mode": "window", "n_promotions": 0}, None),
        ("window", "window", {"mode": "window"}, "5 pages were promoted"),
        ("exact", "exact", {"mode": "exact", "n_promoted": 60}, None),
        ("exact", "exact", {"mode": "exact", "n_promoted": 54}, None),
        ("exact", "exact", {"mode": "exact", "n_promoted": 53}, "it attended 53 of 60 cold pages"),
    ],
)
def test_an_arm_that_contradicts_its_name_is_no_measurement(name, mode, stats, problem):
    arm = make_arm(name, **({"mode": mode} if mode else {}))
    stats = None if stats is None else STATS | stats
    if problem is None:
        check_activity(arm, stats)
    else:
        with pytest.raises(MonarchError, match=f"arm {name} does not do what its name says: .*{problem}"):
            check_activity(arm, stats)


def test_a_row_of_another_build_is_refused():
    with pytest.raises(MonarchError, match="arm paged ran llama.cpp 0c1e57098, not 0c1e57098-monarch"):
        ab_bench._label_row({"build_commit": "0c1e57098"}, make_arm("paged", mode="paged"))


def test_report_fits_a_terminal(capsys):
    depths = [0, 65536]
    speed = [speed_row(arm, [12345.6, 12000.0], depth=depth) for depth in depths for arm in ARMS]
    quality = [{"arm": arm, "n_found": 10, "n_needles": 10} for arm in ARMS]
    stats = dict.fromkeys(("n_hot", "n_cold", "n_promotions"), 65536)
    memory = [{"arm": arm, "kv_bytes": 1 << 31, "n_tokens": 65540, "stats": stats} for arm in ARMS]
    print_report(Console(width=80, highlight=False), speed, quality, memory)
    lines = capsys.readouterr().out.splitlines()
    assert [arm for arm in ARMS for line in lines if line.split()[:1] == [arm] and "10 of 10" in line] == list(ARMS)
    assert sum("12172.8 ±2%" in line and "1.00x" in line for line in lines) == len(depths) * len(ARMS)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["no.gguf"], 1, "no model at no.gguf"),
        (["{model}", "--depths", "0,x"], 2, "--depths 0,x"),
        (["{model}", "--depths", "0,0"], 2, "--depths 0,0"),
        (["{model}", "--depths", "-1"], 2, "--depths -1"),
        (["{model}", "--arms", "stock,fast"], 2, "--arms stock,fast: allowed is"),
        (["{model}", "--arms", "stock,stock"], 2, "each once"),
        (["{model}", "--mode", "paged"], 2, "--mode belongs to the arms"),
        (["{model}", "--reps", "0"], 2, "--reps 0"),
        (["{model}", "--threads", "0"], 2, "--threads 0"),
        (["{model}", "--page-size", "17"], 2, "page_size = 17"),
        (["{model}", "--json", "/nowhere/rows.json"], 2, "--json /nowhere/rows.json"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, capsys, monkeypatch, arguments, status, message):
    monkeypatch.setattr(ab, "_probe", None)  # nothing may start
    model = tmp_path / "model.gguf"
    model.touch()
    assert run_command("ab", [argument.format(model=model) for argument in arguments]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


# the whole


def run_ab(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "monarch_llamacpp", "ab", *map(str, args)]
    return subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recall_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ab") / "recall.gguf"
    write_recall_model(path)
    return path


SMALL = ["--reps", 1, "-n", 2, "--hot-window", 64, "--promote-tokens", 256, "--dense-layers", 0]


def test_every_arm_is_measured_and_does_what_it_says(stock_bin, patched_bin, recall_model, tmp_path):
    file = tmp_path / "rows.json"
    result = run_ab(recall_model, "--depths", "0,1024", "-p", 64, "--json", file, *SMALL)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["row"] for row in rows if row["row"] != "speed"] == ["environment", *["quality"] * 5, *["memory"] * 5]
    check_speed([row for row in rows if row["row"] == "speed"])
    check_quality({row["arm"]: row for row in rows if row["row"] == "quality"})
    check_memory({row["arm"]: row for row in rows if row["row"] == "memory"})
    assert all(f" {arm} " in result.stdout for arm in ARMS)


def check_speed(rows: list[dict]) -> None:
    tests = [(depth, n_prompt, n_gen) for depth in (0, 1024) for n_prompt, n_gen in ((64, 0), (0, 2))]
    settings = [(arm, fa) for arm in ARMS for fa in ((0, 1) if arm in ("stock", "patched-off") else (0,))]
    measured = [(row["arm"], row["flash_attn"], (row["n_depth"], row["n_prompt"], row["n_gen"])) for row in rows]
    assert sorted(measured) == sorted((arm, fa, test) for arm, fa in settings for test in tests)
    assert all(len(row["samples_ts"]) == 1 and row["avg_ts"] > 0 for row in rows)
    assert all(row["build_commit"].endswith("-monarch") == (row["arm"] != "stock") for row in rows)
    assert {row["arm"]: row["knobs"] and row["knobs"]["mode"] for row in rows} == {
        "stock": None, "patched-off": "off", "window": "window", "paged": "paged", "exact": "exact",
    }  # fmt: skip


def check_quality(rows: dict[str, dict]) -> None:
    assert list(rows) == list(ARMS)
    assert {arm: rows[arm]["n_found"] for arm in ARMS if arm != "window"} == dict.fromkeys(set(ARMS) - {"window"}, 10)
    assert rows["window"]["n_found"] <= 1  # the last one may still be hot


def check_memory(rows: dict[str, dict]) -> None:
    assert rows["stock"]["stats"] is None and rows["patched-off"]["stats"] is None
    for arm in ("window", "paged", "exact"):
        assert rows[arm]["stats"]["n_cold"] > 900
        assert rows[arm]["kv_bytes"] == rows[arm]["stats"]["kv_bytes"] < rows["stock"]["kv_bytes"]
    assert rows["paged"]["stats"]["n_promotions"] > 0 == rows["window"]["stats"]["n_promotions"]


def test_an_arm_that_cannot_promote_stops_the_comparison(stock_bin, patched_bin, recall_model, tmp_path):
    file = tmp_path / "rows.json"
    knobs = [*SMALL, "--promote-tokens", 0]
    result = run_ab(recall_model, "--depths", 256, "--arms", "stock,paged", "--json", file, *knobs)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: arm paged does not do what its name says")
    assert not file.exists()


def test_recall_of_another_model_is_left_out_and_said_so(stock_bin, patched_bin, tmp_path):
    model = random_models.write_random_model(tmp_path / "random.gguf")
    result = run_ab(model, "--depths", 1024, "--arms", "stock,window", "-p", 0, *SMALL)
    assert result.returncode == 0, result.stderr
    assert "recall: needs the constructed recall model" in result.stderr
    assert " of 10" not in result.stdout


def test_a_model_that_cannot_be_paged_says_why(stock_bin, patched_bin, tmp_path):
    model = random_models.write_random_model(tmp_path / "head.gguf", head_dim=72)
    result = run_ab(model, "--depths", 64, "--arms", "paged", *SMALL)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: arm paged: ")
    assert "head size 72 is not supported" in result.stderr
