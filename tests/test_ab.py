"""The A/B comparison: its parts without a build, then the whole of it on small models."""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from child import TESTS
from rich.console import Console

import models as random_models
from monarch_llamacpp import ab, ab_bench, ab_probe, ab_text, recall_text
from monarch_llamacpp import stats as stats_module
from monarch_llamacpp.ab_arms import ARMS, Arm, make_arms
from monarch_llamacpp.ab_bench import merge_rows
from monarch_llamacpp.ab_child import check_activity, run_child
from monarch_llamacpp.ab_quality_child import Comparison, log_softmax
from monarch_llamacpp.ab_receipt import environment
from monarch_llamacpp.ab_report import print_report
from monarch_llamacpp.ab_rows import Rows, read_rows
from monarch_llamacpp.ab_settings import Settings, read_settings
from monarch_llamacpp.ab_summary import Speeds, verdict
from monarch_llamacpp.cli import run_command
from monarch_llamacpp.cores import n_cores
from monarch_llamacpp.errors import MonarchError
from monarch_llamacpp.knobs import Knobs, specs
from monarch_llamacpp.output_file import write_file
from monarch_llamacpp.recall import write_recall_model
from monarch_llamacpp.stats import Stats

# parts


def make_arm(name: str, **knobs) -> Arm:
    return Arm(name, Path("/nowhere"), None if name == "stock" else Knobs(**knobs))


def memory_row(arm: str, kv_bytes: int = 1 << 31, stats: dict | None = None) -> dict:
    times = {"first_token_s": 12.34, "token_ms": [1.0, 2.0, 123.45]}
    timeline = [[0, 0, 0, 0, 0, 0], [65540, 512, 1024, 512, 65028, kv_bytes]]
    sizes = {"n_tokens": 65540, "kv_bytes": kv_bytes, "peak_rss_bytes": 1 << 33, "vram_bytes": 0}
    return {"row": "memory", "arm": arm, "knobs": None, "stats": stats, "timeline": timeline, **sizes, **times}


def test_upstream_s_memory_and_first_token_are_those_of_its_better_setting():
    sizes = {"stats": None, "vram_bytes": 0}
    off = sizes | {"token_ms": [1.0, 2.0, 9.0], "peak_rss_bytes": 20, "first_token_s": 3.0}
    on = sizes | {"token_ms": [3.0, 3.0, 3.0], "peak_rss_bytes": 10, "first_token_s": 2.0}
    row = ab_probe._row(Arm("stock", Path("/nowhere"), None), {0: off, 1: on})
    assert (row["flash_attn"], row["token_ms"]) == (0, off["token_ms"])
    assert (row["peak_rss_bytes"], row["first_token_s"]) == (10, 2.0)


def quality_rows(arm: str, kl: float = 0.0123, control: bool = False) -> list[dict]:
    head = {"row": "quality", "arm": arm, "flash_attn": int(arm == "stock" and not control), "control": control}
    head |= {"knobs": None if arm.startswith("stock") else dict(Knobs(mode="paged"))}
    metrics = {"perplexity": 12.345, "perplexity_change": -0.0012, "perplexity_change_stderr": 0.0345}
    metrics |= {"kl_mean": kl, "kl_median": kl, "kl_p99": kl, "kl_max": kl, "same_top": 0.987}
    rows = [{"metric": metric, "value": value, "way": way, "attended": 0.126, "bytes_per_token": 12345.6,
             "bytes_per_further_token": 3456.7}
            for metric, value in metrics.items() for way in ("prefill", "decode")]  # fmt: skip
    rows += [{"metric": "needle_recall", "length": 1024, "depth": 0.5, "value": 0.9, "n_found": 18, "n_needles": 20}]
    rows += [{"metric": "bleu", "value": 66.6}, {"metric": "exact_match", "value": 0.5}]
    return [head | row for row in rows]


def speed_row(arm: str, samples: list[float], flash_attn: int = 0, depth: int = 0) -> dict:
    n_gen = 100
    row = {"row": "speed", "arm": arm, "flash_attn": flash_attn, "n_depth": depth, "n_prompt": 0, "n_gen": n_gen}
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
    print_report(Console(width=80), rows)
    assert "1 of 2 rows vary by more than 20%" in capsys.readouterr().out


COUNTED = dict(mode="paged", n_layer=2, n_head_kv=3, n_cold=160, n_pages=10, n_promoted=6, n_promotions=5)
LOGGED = {stat.name: COUNTED.get(stat.name, 0) for stat in stats_module.stats()}
STATS = Stats(**LOGGED).with_sums()


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
        ("paged", "paged", {"n_promotions": 0, "n_pages": 1}, "no page of 160 cold tokens was promoted"),
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
        ab_bench._label_row({"build_commit": "0c1e57098"}, make_arm("paged", mode="paged"), STATS)


def test_a_speed_that_the_counters_contradict_is_no_measurement():
    row = {"build_commit": "0c1e57098-monarch", "n_prompt": 64, "n_ubatch": 512, "samples_ns": [1], "samples_ts": [1]}
    arm = make_arm("paged", mode="paged")
    assert ab_bench._label_row(row, arm, STATS)["stats"] == STATS
    ab_bench._label_row(row, arm, STATS | {"n_promotions": 0, "n_pages": 4})  # of the prompt's own tokens
    with pytest.raises(MonarchError, match="does not do what its name says: no page of 160"):
        ab_bench._label_row(row, arm, STATS | {"n_promotions": 0})
    log = f"load: ...\nlog_stats: statistics: {json.dumps(LOGGED)}\n"
    assert ab_bench._read_stats(log, arm, 1) == [STATS]
    with pytest.raises(MonarchError, match="statistics of 1 contexts in 2 tests"):
        ab_bench._read_stats(log, arm, 2)


def test_report_fits_a_terminal(capsys):
    depths = [0, 65536]
    stats = dict.fromkeys(("n_hot", "n_cold", "n_promotions"), 65536)
    rows = [speed_row(arm, [12345.6, 12000.0], depth=depth) for depth in depths for arm in ARMS]
    rows += [memory_row(arm, stats=stats) for arm in ARMS]
    rows += [row for arm in ARMS for row in quality_rows(arm)] + quality_rows("stock", control=True)
    print_report(Console(width=80, highlight=False), rows)
    lines = capsys.readouterr().out.splitlines()
    assert not any("…" in line for line in lines)
    assert [arm for arm in ARMS for line in lines if line.split()[:1] == [arm] and "18/20" in line] == list(ARMS)
    assert sum("12172.8 ±2%" in line and "1.00x" in line for line in lines) == len(depths) * len(ARMS)


def test_vram_is_shown_where_there_is_some(capsys):
    rows = [memory_row("stock"), memory_row("paged")]
    print_report(Console(width=80), rows)
    assert "VRAM" not in capsys.readouterr().out
    print_report(Console(width=80), [*rows[:1], rows[1] | {"vram_bytes": 777 << 20}])
    shown = capsys.readouterr().out
    assert "VRAM" in shown and "777" in shown
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown


def test_the_verdict_names_the_losses():
    rows = [speed_row("stock", [100.0]), speed_row("paged", [50.0]), memory_row("stock", 100)]
    rows += [memory_row("paged", 30, {"n_cold": 9}), *quality_rows("stock", control=True), *quality_rows("paged")]
    rows += quality_rows("stock-q4_0", kl=0.001)
    gains, losses = verdict(rows).split("; it loses: ")
    assert "30% of stock's KV bytes" in gains and "perplexity -0.12% ± 3.45%" in gains
    assert "generate 100 at 0 0.50x" in losses and "stock-q4_0 0.001 in 1.00x the bytes" in losses


def test_what_noise_may_be_is_no_loss():
    noisy = [60.0, 130.0, 80.0, 90.0, 70.0]
    rows = [speed_row("stock", [100.0] * 5), speed_row("paged", noisy), memory_row("paged", 30, {"n_cold": 9})]
    rows[1]["knobs"] = dict(Knobs(mode="paged"))
    assert "loses" not in verdict(rows)
    rows[1] = speed_row("paged", [ts / 2 for ts in noisy]) | {"knobs": rows[1]["knobs"]}
    assert "it loses: generate 100 at 0 0.40x" in verdict(rows)


def test_knobs_given_for_one_arm(monkeypatch):
    monkeypatch.setattr("monarch_llamacpp.library.stock_dir", lambda: Path("/stock"))
    monkeypatch.setattr("monarch_llamacpp.library.patched_dir", lambda: Path("/patched"))
    given = ["wide:promote-tokens=2048,sink_tokens=4", "fine:mode=exact"]
    stock, wide, fine = make_arms("stock-q4_0", given, Knobs(hot_window=256))
    assert (stock.type_kv, stock.bin_dir, stock.knobs, stock.flash_attn) == ("q4_0", Path("/stock"), None, (1,))
    assert wide.knobs == Knobs(mode="paged", hot_window=256, promote_tokens=2048, sink_tokens=4)
    assert (fine.knobs.mode, fine.bin_dir) == ("exact", Path("/patched"))


def test_comparing_needs_no_compiler(tmp_path, monkeypatch):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    settings = Settings(model, depths=[0], n_prompt=0, n_gen=1, n_threads=1, reps=1)
    assert environment([], settings)["compiler"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert environment([], settings)["compiler"] is None


def parse(*args: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    ab.add_arguments(parser)
    return parser.parse_args([str(arg) for arg in args])


def test_every_process_gets_as_many_threads(tmp_path, monkeypatch):
    """llama-cpp-python would take half of the CPUs for a token, and llama-bench every core."""
    commands = []

    def record(command: list[str], **_: object) -> None:
        commands.append(command)
        raise FileNotFoundError

    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    monkeypatch.setattr(subprocess, "run", record)
    for options in ([], ["--threads", 3]):
        settings = read_settings(parse(model, *options))
        with pytest.raises(MonarchError):
            ab_bench._run_once(make_arm("stock"), 0, settings)
        with pytest.raises(FileNotFoundError):
            run_child(make_arm("stock"), "module", [], 0, settings)
    given = [command[command.index("--threads") + 1] for command in commands]
    assert given == [str(n_cores())] * 2 + ["3"] * 2


def test_help_lists_no_mode(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "--hot-window" in shown and "--mode" not in shown


def test_a_name_that_is_no_text_does_not_cost_the_page(tmp_path):
    write_file(tmp_path / "page.html", os.fsdecode(b"caf\xe9.txt"))
    assert (tmp_path / "page.html").read_text() == "caf?.txt"


def test_divergence_of_a_known_pair(tmp_path):
    base, ours = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    Comparison(tmp_path / "base.npy", [0, 1], 2, True).add(base)
    comparison = Comparison(tmp_path / "base.npy", [0, 1], 2, False)
    comparison.add(ours[:1])
    comparison.add(ours[1:])
    metrics = comparison.metrics()
    assert metrics["kl_max"] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-5)
    assert metrics["kl_mean"] == pytest.approx(metrics["kl_max"] / 2)
    assert metrics["perplexity"] == pytest.approx((0.25 * 0.1) ** -0.5)
    assert metrics["perplexity_change"] == pytest.approx(2**0.5 - 1)
    assert metrics["perplexity_change_stderr"] == pytest.approx(np.log(2) / 2 / 2**0.5)
    assert metrics["same_top"] == 0.5
    with pytest.raises(MonarchError, match="not a number"):
        comparison.add(np.full((1, 2), np.nan))
    assert np.exp(log_softmax(np.array([[1e4, 1e4]]))) == pytest.approx(0.5)


def words(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def test_a_disk_too_small_for_the_reference_says_so(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(MonarchError, match=r"No space left on device, 4 MiB are needed: point TMPDIR"):
        Comparison(tmp_path / "base.npy", [0] * 1024, 1024, is_reference=True)


def test_a_made_text_says_again_what_it_said_long_before():
    text: list[str] = []
    ab_text.make_chunks(lambda sentence: text.append(sentence) or words(sentence), 1, "any", 1, 1500, None)
    facts = [sentence for sentence in text if any(char.isdigit() for char in sentence)]
    first = {sentence: text.index(sentence) for sentence in facts}
    late = [sentence for sentence in text[len(text) // 2 :] if sentence in first]
    assert len(late) > 5 and all(first[sentence] < len(text) // 2 for sentence in late)


@pytest.mark.parametrize("name", ["any", ab_text.SMALL_MODEL_NAME])
def test_needles_lie_where_they_are_said_to(name):
    ids: dict[str, int] = {}

    def tokenize(text: str) -> list[int]:
        return [ids.setdefault(word, len(ids)) for word in text.split()]

    code = " ".join(f"x{i} = {i}" for i in range(3000))  # a text without sentences
    for haystack in [*ab_text.make_haystacks(tokenize, 0, name, [512], 2, None),
                     *ab_text.make_haystacks(tokenize, 0, name, [512], 2, code)]:  # fmt: skip
        assert 512 - ab_text.ROOM - 4 <= len(haystack.tokens) <= 512 - ab_text.ROOM
        for question in haystack.questions:
            (value,) = [ids[word] for word in ids if word.rstrip(".") == question.expected]
            assert haystack.tokens.count(value) == 1
            assert haystack.tokens.index(value) / len(haystack.tokens) == pytest.approx(question.depth, abs=0.08)
            assert value not in question.tokens


def test_an_answer_counts_when_it_is_whole():
    assert ab_text.is_found("It is 12345.", " 12345")
    assert not ab_text.is_found("It is 123456.", "12345")


def test_a_text_too_short_is_refused():
    with pytest.raises(MonarchError, match="the text has 4 tokens, not 64: give a longer one"):
        ab_text.make_chunks(words, 1, "any", 1, 64, "a b c")
    with pytest.raises(MonarchError, match="the text has 6 tokens, not 8: .*or fewer --text-tokens or --chunks"):
        ab_text.make_chunks(words, 1, "any", 2, 4, "a b c d e")


def test_chunks_of_a_text_do_not_overlap():
    assert ab_text.make_chunks(words, 0, "any", 2, 3, "a aa aaa aaaa aaaaa aaaaaa") == [[0, 1, 2], [0, 4, 5]]


def test_resumed_rows_are_those_of_the_same_receipt(tmp_path):
    earlier = [{"row": "speed", "arm": "stock", "receipt": receipt, "n_gen": i} for i, receipt in enumerate("aab")]
    rows = Rows(tmp_path / "rows.json", earlier)
    assert rows.take("speed", "stock", "a", lambda row: row["n_gen"] < 1) == earlier[:1]
    assert rows.take("speed", "paged", "a", lambda row: True) == []
    assert read_rows(tmp_path / "rows.json") == earlier  # until the end: somebody may stop it before
    assert rows.all() == earlier[:1]
    rows.finish()
    assert read_rows(tmp_path / "rows.json") == earlier[:1]


@pytest.mark.parametrize("content", ["not JSON", '{"no": "row"}', "[1]"])
def test_a_file_that_cannot_be_resumed_says_so(tmp_path, content):
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(MonarchError, match="rows.json"):
        read_rows(tmp_path / "rows.json")


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
        (["{model}", "--html", "/nowhere/page.html"], 2, "--html /nowhere/page.html"),
        (["{model}", "--json", "/dev/null"], 2, "/dev/null is a device or a pipe: give a file"),
        (["{model}", "--json", "{model}.x", "--html", "{model}.x"], 2, "--json and --html both name"),
        (["{model}", "--threads", "513"], 2, "--threads 513: allowed is 1 to 512"),
        (["/dev/null"], 1, "no model at /dev/null"),
        ([__file__], 1, "test_ab.py is no GGUF"),
        (["{model}", "--arm", "wide", "--arm", "wide"], 2, "there is an arm wide already"),
        (["{model}", "--arm", "paged:sink_tokens=4"], 2, "--arm paged:sink_tokens=4: give NAME:knob=value"),
        (["{model}", "--arm", "wide:promote=4"], 2, "no knob is named promote"),
        (["{model}", "--arm", "wide:sink_tokens=-4"], 2, "--arm wide:sink_tokens=-4: sink_tokens = -4: allowed is"),
        (["{model}", "--parts", "speed,luck"], 2, "--parts speed,luck: allowed is"),
        (["{model}", "--lengths", "10"], 2, "--lengths 10: allowed is 256 and more"),
        (["{model}", "--decode-tokens", "4096"], 2, "--decode-tokens 4096: allowed is half"),
        (["{model}", "--depths", "0,4294967296"], 2, "to 2147483647"),
        (["{model}", "--n-gpu-layers", "4294967296"], 2, "--n-gpu-layers 4294967296: allowed is"),
        (["{model}", "--text", "no.txt"], 1, "no text at no.txt"),
        (["{model}", "--resume"], 2, "--resume: name the file"),
        (["{model}", "--json", "{model}"], 2, "the comparison reads it"),
        (["{model}", "--html", "{model}"], 2, "the comparison reads it"),
        (["{model}", "--text", "{text}", "--json", "{text}"], 2, "the comparison reads it"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, capsys, monkeypatch, arguments, status, message):
    monkeypatch.setattr(ab, "_RUN", {})  # nothing may start
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    text = tmp_path / "text.txt"
    text.write_text("once")
    assert run_command("ab", [argument.format(model=model, text=text) for argument in arguments]) == status
    assert (model.read_bytes(), text.read_text()) == (b"GGUF", "once")
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


SHIPPED = TESTS.parent / "models" / "monarch-small.gguf"

SMALL = ["--threads", 1, "--reps", 1, "-n", 2, "-p", 64, "--hot-window", 64, "--promote-tokens", 256]
SMALL += ["--dense-layers", 0, "--text-tokens", 640, "--decode-tokens", 48, "--lengths", 1024]


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def compared(stock_bin, patched_bin, recall_model, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """The whole comparison, once: what it printed, and the folder of its rows.json and page.html."""
    folder = tmp_path_factory.mktemp("compared")
    files = ["--json", folder / "rows.json", "--html", folder / "page.html", "--arm", "narrow:promote_tokens=64"]
    return run_ab(recall_model, "--depths", "0,1024", *files, *SMALL), folder


ALL = (*ARMS, "narrow")
PAGED = ("window", "paged", "exact", "narrow")


def test_every_arm_is_measured_and_does_what_it_says(compared):
    result, folder = compared
    assert result.returncode == 0, result.stderr
    rows = read(folder / "rows.json")
    assert {row["row"] for row in rows} == {"environment", "memory", "quality", "speed"}
    check_speed([row for row in rows if row["row"] == "speed"])
    check_memory({row["arm"]: row for row in rows if row["row"] == "memory"})
    check_environment(rows[0])
    assert all(f" {arm} " in result.stdout for arm in ALL)
    assert all(len(row["receipt"]) == 64 for row in rows[1:])


def check_speed(rows: list[dict]) -> None:
    tests = [(depth, n_prompt, n_gen) for depth in (0, 1024) for n_prompt, n_gen in ((64, 0), (0, 2))]
    both, on = ("stock", "patched-off"), ("stock-q8_0", "stock-q4_0", "stock-iq4_nl")
    settings = [(arm, fa) for arm in ALL for fa in ((0, 1) if arm in both else (1,) if arm in on else (0,))]
    measured = [(row["arm"], row["flash_attn"], (row["n_depth"], row["n_prompt"], row["n_gen"])) for row in rows]
    assert sorted(measured) == sorted((arm, fa, test) for arm, fa in settings for test in tests)
    assert all(len(row["samples_ts"]) == 1 and row["avg_ts"] > 0 for row in rows)
    assert all(row["build_commit"].endswith("-monarch") != row["arm"].startswith("stock") for row in rows)
    assert {row["arm"]: row["type_k"] for row in rows if row["flash_attn"]} == {
        "stock": "f16", "stock-q8_0": "q8_0", "stock-q4_0": "q4_0", "stock-iq4_nl": "iq4_nl", "patched-off": "f16",
    }  # fmt: skip
    assert {row["arm"]: row["knobs"]["mode"] for row in rows if row["knobs"]} == {
        "patched-off": "off", "window": "window", "paged": "paged", "exact": "exact", "narrow": "paged",
    }  # fmt: skip
    assert all((row["stats"] is None) == (row["arm"] not in PAGED) for row in rows)
    deep = [(row["arm"], row["stats"]) for row in rows if row["n_depth"] and row["stats"]]
    assert all(stats["n_cold"] > 900 and (stats["n_promotions"] > 0) != (arm == "window") for arm, stats in deep)


def check_memory(rows: dict[str, dict]) -> None:
    assert rows["stock"]["stats"] is None and rows["patched-off"]["stats"] is None
    assert rows["stock-q4_0"]["kv_bytes"] < rows["stock-q8_0"]["kv_bytes"] < rows["stock"]["kv_bytes"]
    for arm in PAGED:
        assert rows[arm]["stats"]["n_cold"] > 900
        assert rows[arm]["kv_bytes"] == rows[arm]["stats"]["kv_bytes"] < rows["stock"]["kv_bytes"]
    assert rows["paged"]["stats"]["n_promotions"] > 0 == rows["window"]["stats"]["n_promotions"]
    assert all(len(row["token_ms"]) == 2 and row["timeline"][-1][0] == row["n_tokens"] for row in rows.values())


def check_environment(row: dict) -> None:
    digests = [row["model"]["sha256"], *row["arms"]["paged"]["libraries"].values()]
    assert len(digests) > 3 and {len(digest) for digest in digests} == {64}
    assert row["arms"]["narrow"]["knobs"]["promote_tokens"] == 64
    assert row["arms"]["stock"]["libraries"] != row["arms"]["paged"]["libraries"]


def test_quality_with_pages_cold(compared):
    _, folder = compared
    rows = [row for row in read(folder / "rows.json") if row["row"] == "quality"]
    value = {(row["arm"], row["metric"], row.get("way")): row["value"] for row in rows if not row["control"]}
    for way in ("prefill", "decode"):
        control = {row["metric"]: row["value"] for row in rows if row["control"] and row.get("way") == way}
        assert control["kl_mean"] < 1e-6 and control["same_top"] == 1
        assert value["patched-off", "kl_mean", way] < 1e-6
        assert value["exact", "kl_mean", way] < 0.05 < 1 < value["window", "kl_mean", way]
        assert value["paged", "kl_mean", way] < 0.05
    stats = [row["stats"] for row in rows if row["arm"] in PAGED and row.get("way")]
    assert stats and all(each["n_cold"] > 400 for each in stats)
    assert all(row["attended"] < 0.3 for row in rows if row["arm"] == "window" and row.get("way"))
    needles = [row for row in rows if row["metric"] == "needle_recall" and not row["control"]]
    found = {arm: [row["value"] for row in needles if row["arm"] == arm] for arm in ALL}
    assert all(found[arm] and min(found[arm]) == 1 for arm in ("stock", "stock-q8_0", "patched-off", "paged", "exact"))
    assert sum(found["window"]) <= 1  # the last one may still be hot
    assert value["patched-off", "bleu", None] > 99 and value["patched-off", "exact_match", None] == 1


def test_the_rest_is_not_measured_again(compared, recall_model, tmp_path):
    _, folder = compared
    file = tmp_path / "rows.json"
    kept = [row for row in read(folder / "rows.json") if row.get("arm") != "exact"]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    arms = ["--arms", "stock,paged,exact", "--json", file, "--resume"]
    result = run_ab(recall_model, "--depths", "0,1024", *arms, *SMALL)
    assert result.returncode == 0, result.stderr
    steps = [line for line in result.stderr.splitlines() if " of " in line]
    assert len(steps) == 4  # memory; reference, exact; speed
    assert all("exact" in step or "reference" in step for step in steps)
    assert [row for row in read(file) if row.get("arm") == "exact"]
    now, before = ([json.dumps(row) for row in rows if row.get("arm") == "paged"] for rows in (read(file), kept))
    assert now == before


def test_what_is_done_is_kept_when_it_is_stopped(stock_bin, patched_bin, recall_model, tmp_path):
    file = tmp_path / "rows.json"
    args = [recall_model, "--depths", 1024, "--arms", "stock,paged", "--json", file, *SMALL, "--reps", 1000]
    command = [sys.executable, "-m", "monarch_llamacpp", "ab", *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=TESTS.parent, text=True, **pipes)
    while process.poll() is None and not (file.is_file() and '"row": "speed"' in file.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert "Speed, tokens per second" in output
    assert {"memory", "quality", "speed"} < {row["row"] for row in read(file)}


def test_nothing_runs_on_after_it_is_ended(stock_bin, patched_bin, recall_model, tmp_path):
    """From outside: the child goes with it, and so do the files of the reference."""
    args = [recall_model, "--arms", "stock,paged", "--parts", "quality", *SMALL]
    command = [sys.executable, "-m", "monarch_llamacpp", "ab", *map(str, args)]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, cwd=TESTS.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("*/prefill.npy")):
        time.sleep(0.01)
    process.terminate()
    process.communicate()  # ends when the child's output ends, too
    assert (process.returncode, list(tmp_path.iterdir())) == (128 + signal.SIGTERM, [])


@pytest.fixture(scope="module")
def shipped(stock_bin, patched_bin, tmp_path_factory) -> Path:
    """Quality of the model that ships: a folder with text.txt, rows.json and page.html."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "text.txt").write_text("".join(islice(recall_text.make_sentences(random.Random(1)), 200)))
    args = ["--text", folder / "text.txt", "--json", folder / "rows.json", "--html", folder / "page.html"]
    args += ["--arms", "stock,paged", "--parts", "quality", *SMALL, "--text-tokens", 512, "--chunks", 2]
    args += ["--lengths", 256]
    result = run_ab(SHIPPED, *args)
    assert result.returncode == 0, result.stderr
    return folder


def test_perplexity_of_stock_is_that_of_upstream_s_tool(shipped, stock_bin):
    """llama-perplexity's first two chunks, by hand."""
    (ours,) = (row["value"] for row in read(shipped / "rows.json")
               if row.get("control") and (row["metric"], row.get("way")) == ("perplexity", "prefill"))  # fmt: skip
    command = [stock_bin / "llama-perplexity", "-m", SHIPPED, "-f", shipped / "text.txt", "-c", "512", "--chunks", "2"]
    result = subprocess.run([*command, "-fa", "off", "-t", "1"], capture_output=True, text=True, check=True)
    (theirs,) = re.findall(r"\[2\](\d+\.\d+)", result.stdout + result.stderr)
    assert ours == pytest.approx(float(theirs), abs=6e-5)  # four digits are printed


def test_attention_to_cold_pages_is_traced(shipped):
    (row,) = (row for row in read(shipped / "rows.json") if row.get("metric") == "cold_attention")
    assert row["arm"] == "paged" and len(row["promoted_sticky"]) == row["n_tokens"]
    assert all(0 < sum(each) < 1 for each in row["promoted_sticky"])
    assert any(sticky > 0 for _, sticky in row["promoted_sticky"])
    assert '<figure id="mass-paged">' in (shipped / "page.html").read_text()


def test_the_page_has_its_pictures(compared):
    _, folder = compared
    page = (folder / "page.html").read_text()
    wanted = ["speed-prompt", "speed-generate", "memory", "frontier", "recall", "latency", "paging-paged"]
    assert all(f'<figure id="{name}"><figcaption>' in page for name in wanted)
    assert page.count("<svg") == page.count("<figure") >= len(wanted)
    assert not any(outside in page for outside in ("<script", "<img", "stylesheet", "src=", "@import", "url("))
    assert escape(verdict(read(folder / "rows.json"))) in page


# measures a page from the outside: a frame as wide as a phone, and what goes wrong in it
HARNESS = """<!DOCTYPE html><iframe id="phone" style="width:360px;height:800px" srcdoc="{page}"></iframe><script>
onload = () => {{
  const inside = document.getElementById("phone").contentDocument;
  const size = picture => picture.getBoundingClientRect();
  const seen = [...inside.querySelectorAll("svg")].filter(p => size(p).width > 200 && size(p).height > 50);
  document.body.dataset.seen = seen.length;
  document.body.dataset.width = inside.scrollingElement.scrollWidth;
}};
</script>"""


def test_a_browser_shows_the_page(compared, tmp_path):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs chromium, which is not installed")
    _, folder = compared
    page = (folder / "page.html").read_text()
    harness = tmp_path / "harness.html"
    harness.write_text(HARNESS.format(page=escape(page)))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command.append("--enable-logging=stderr")
    shown = subprocess.run([*command, "--dump-dom", harness], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in shown.stderr
    assert f'data-seen="{page.count("<svg")}"' in shown.stdout
    assert 'data-width="360"' in shown.stdout or 'data-width="345"' in shown.stdout  # with a scroll bar
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", "--window-size=800,2000", folder / "page.html"], timeout=120)
    assert picture.stat().st_size > 20_000


def test_an_arm_that_cannot_promote_fails_and_the_others_finish(stock_bin, patched_bin, recall_model, tmp_path):
    file = tmp_path / "rows.json"
    args = ["--arms", "stock", "--arm", "blind:promote_tokens=0", "--parts", "memory,speed", "--json", file]
    result = run_ab(recall_model, "--depths", 256, *args, *SMALL)
    assert result.returncode == 1
    assert "failed: arm blind does not do what its name says" in " ".join(result.stdout.split())
    rows = read(file)
    assert [row["arm"] for row in rows if row["row"] == "failure"] == ["blind"]
    assert {row["arm"] for row in rows if row["row"] == "speed"} == {"stock"}


def test_a_crash_is_reported_and_the_rest_is_measured(stock_bin, patched_bin, tmp_path):
    """llama.cpp throws where a vocabulary lacks a byte."""
    model = random_models.write_random_model(tmp_path / "random.gguf")
    result = run_ab(model, "--depths", 64, "--arms", "stock,window", "--parts", "quality,memory", *SMALL)
    assert result.returncode == 1
    assert "failed: quality needs stock as the reference: arm stock: " in " ".join(result.stdout.split())
    assert "Cache and latency after 67 tokens" in result.stdout


def test_a_text_shorter_than_asked_for_fails_and_speed_is_measured(stock_bin, patched_bin, recall_model, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("The king found the ring.")
    result = run_ab(recall_model, "--depths", 64, "--arms", "stock", "--text", text, *SMALL)
    assert result.returncode == 1
    assert "failed: quality needs stock as the reference: arm stock: the text has" in " ".join(result.stdout.split())
    assert "Speed, tokens per second" in result.stdout


def test_a_model_that_cannot_be_paged_says_why(stock_bin, patched_bin, tmp_path):
    model = random_models.write_random_model(tmp_path / "head.gguf", head_dim=72)
    result = run_ab(model, "--depths", 64, "--arms", "stock,paged", "--parts", "memory", *SMALL)
    assert result.returncode == 1
    assert "failed: arm paged: " in result.stdout and "head size 72 is not supported" in " ".join(result.stdout.split())
    assert " stock " in result.stdout
