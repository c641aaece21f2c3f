"""Knobs and the typed shim: parsing, validation, precedence, conversion. Needs no build."""

import argparse
import copy
import pickle
import re
from dataclasses import asdict

import pytest
from child_chat_shim import FakeLibrary
from hypothesis import given
from hypothesis import strategies as st

from monarch_llamacpp import knobs as knobs_module
from monarch_llamacpp import stats as stats_module
from monarch_llamacpp.errors import MonarchError, UsageError
from monarch_llamacpp.knobs import Knobs, add_knob_arguments, from_env, knobs_from_args, parse_specs, specs
from monarch_llamacpp.paths import native_dir
from monarch_llamacpp.shim import Event, Page, Shim
from monarch_llamacpp.stats import Stats, parse_stats

# the contract with users: these names do not change
CONTRACT = {
    "mode": "auto", "hot_window": 512, "sink_tokens": 16, "page_size": 16, "promote_tokens": 1024,
    "sticky_threshold": 3, "importance_decay": 0.92, "dense_layers": 0, "dense_tokens": 8192,
    "cold_bits_k": 4, "cold_bits_v": 4, "residual_k": "off", "cold_tier": "auto",
}  # fmt: skip


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_knob_arguments(parser)
    return parser.parse_args(argv)


def test_definitions_hold_the_contract():
    knobs = Knobs()
    assert {name: knobs[name] for name in CONTRACT} == CONTRACT
    assert {"promotion_threshold", "scorer", "frames"} <= set(knobs)
    live = {spec.name for spec in specs().values() if spec.live}
    assert live == {"mode", "promote_tokens", "promotion_threshold", "sticky_threshold", "importance_decay"}
    assert all(spec.help for spec in specs().values())


def test_enum_values_are_the_indices_of_the_choices():
    header = (native_dir() / "monarch-enums.h").read_text()
    found = re.findall(r"^enum monarch_(\w+) \{\n(.*?)^\};", header, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == ["mode", "scorer", "cold_tier"]
    for name, body in found:
        values = re.findall(r"^    (\w+) += (\d+),$", body, re.MULTILINE)
        choices = [f"MONARCH_{name}_{choice}".upper() for choice in specs()[name].choices]
        assert values == [(choice, str(i)) for i, choice in enumerate(choices)]


@pytest.mark.parametrize(
    "line",
    [
        'MONARCH_STAT_U16(a, "help")',
        'MONARCH_STAT_U32(a)',
        'MONARCH_STAT_U32(A, "help")',
        'MONARCH_STAT_U32(a, "help") x',
        'MONARCH_STAT_U32(a, "help")\nMONARCH_STAT_U64(a, "help")',
    ],
)
def test_anything_but_a_statistic_is_refused_with_its_line(line):
    with pytest.raises(MonarchError, match=rf"x\.def:{2 + line.count(chr(10))}: "):
        parse_stats("// comment\n" + line, "x.def")


def test_statistics_are_those_of_the_definitions():
    stats = Stats(**{stat.name: i for i, stat in enumerate(stats_module.stats(), 1)})
    assert list(asdict(stats).values()) == list(range(1, len(stats_module.stats()) + 1))
    assert stats.n_places == stats.n_layer * stats.n_head_kv == 2
    assert stats.kv_bytes == sum(value for name, value in asdict(stats).items() if name.endswith("_bytes"))
    assert all(f"{stat.name}: {stat.help}" in Stats.__doc__ for stat in stats_module.stats())
    assert pickle.loads(pickle.dumps(stats)) == stats


@pytest.mark.parametrize(
    "line",
    [
        'MONARCH_KNOB_INT(a, 1, 0, 2, 1 "help")',
        'MONARCH_KNOB_INT(a, 1, 0, 2, 2, "help")',
        'MONARCH_KNOB_INT(a, 3, 0, 2, 1, "help")',
        'MONARCH_KNOB_INT(a, 1.5, 0, 2, 1, "help")',
        'MONARCH_KNOB_FLOAT(a, x, 0, 2, 1, "help")',
        'MONARCH_KNOB_ENUM(a, z, "x|y", 1, "help")',
        'MONARCH_KNOB_ENUM(a, x, "x|", 1, "help")',
        'MONARCH_KNOB_BOOL(a, 1, 1, "help")',
        'MONARCH_KNOB_INT(A, 1, 0, 2, 1, "help")',
        'MONARCH_KNOB_INT(a, 1, 0, 2, 1, "help") x',
        'MONARCH_KNOB_INT(a, 1, 0, 2, 1, "help")\nMONARCH_KNOB_INT(a, 1, 0, 2, 1, "help")',
        "#define MONARCH_KNOB",
    ],
)
def test_anything_but_a_definition_is_refused_with_its_line(line):
    with pytest.raises(MonarchError, match=rf"x\.def:{2 + line.count(chr(10))}: "):
        parse_specs("// comment\n" + line, "x.def")


def test_construction_attributes_and_replace():
    knobs = Knobs(mode="paged", hot_window=256, promotion_threshold=1)
    assert (knobs.mode, knobs.hot_window, knobs.sink_tokens) == ("paged", 256, 16)
    assert isinstance(knobs.promotion_threshold, float)
    assert knobs.replace(mode="exact") == Knobs(mode="exact", hot_window=256, promotion_threshold=1.0)
    assert repr(Knobs(mode="paged", hot_window=256)) == "Knobs(mode='paged', hot_window=256)"
    assert hash(knobs) == hash(knobs.replace())


def test_knobs_do_not_change_and_can_be_copied():
    knobs = Knobs(hot_window=64)
    with pytest.raises(AttributeError):
        knobs.hot_window = 128
    with pytest.raises(AttributeError):
        _ = knobs.hot_windows
    assert copy.deepcopy(knobs) == pickle.loads(pickle.dumps(knobs)) == knobs


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("mode", "fast", "off, window, paged, exact, auto"),
        ("mode", 2, "off, window, paged, exact, auto"),
        ("hot_window", 15, "16 to 1048576"),
        ("hot_window", 1048577, "16 to 1048576"),
        ("hot_window", 64.0, "16 to 1048576"),
        ("hot_window", True, "16 to 1048576"),
        ("page_size", 12, "8, 16, 32"),
        ("cold_bits_k", 5, "2, 3, 4, 16"),
        ("importance_decay", 1.01, "0.0 to 1.0"),
        ("importance_decay", float("nan"), "0.0 to 1.0"),
        ("promotion_threshold", "0.1", "0.0 to 1.0"),
    ],
)
def test_a_refusal_names_knob_value_and_range(name, value, allowed):
    with pytest.raises(UsageError) as refusal:
        Knobs(**{name: value})
    assert str(refusal.value) == f"{name} = {value}: allowed is {allowed}"
    assert refusal.value.exit_status == 2


def test_an_unknown_knob_suggests_the_nearest():
    with pytest.raises(UsageError, match="no knob is named hot_windw: did you mean hot_window?"):
        Knobs(hot_windw=3)


def test_command_line_beats_environment_beats_default():
    environ = {"MONARCH_HOT_WINDOW": "128", "MONARCH_MODE": "exact", "MONARCH_CACHE": "/x", "MONARCH": "1"}
    knobs = knobs_from_args(arguments("--hot-window", "64", "--importance-decay", "0.5"), environ)
    assert knobs == Knobs(hot_window=64, mode="exact", importance_decay=0.5)
    assert knobs_from_args(arguments(), {}) == Knobs()
    assert from_env(environ) == Knobs(hot_window=128, mode="exact")


@pytest.mark.parametrize("text", ["", "x", "1e3", "15", "0x40"])
def test_bad_text_is_refused_wherever_it_comes_from(text):
    with pytest.raises(UsageError, match=f"^hot_window = {text}: allowed is 16 to"):
        knobs_from_args(arguments("--hot-window", text), {})
    with pytest.raises(UsageError, match=f"^environment variable MONARCH_HOT_WINDOW: hot_window = {text}: "):
        from_env({"MONARCH_HOT_WINDOW": text})


def test_help_shows_every_knob_with_its_default():
    parser = argparse.ArgumentParser()
    add_knob_arguments(parser)
    text = " ".join(parser.format_help().split())
    for spec in specs().values():
        assert f"{spec.flag} " in text
        assert f"(default: {spec.default})" in text


@given(st.data())
def test_every_allowed_value_survives_text(data):
    spec = data.draw(st.sampled_from(list(specs().values())))
    strategies = {int: st.integers(int(spec.least), int(spec.greatest)), float: st.floats(spec.least, spec.greatest)}
    value = data.draw(st.sampled_from(spec.choices) if spec.choices else strategies[spec.type])
    assert spec.parse(str(value)) == Knobs(**{spec.name: value})[spec.name]


# the shim


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary()


@pytest.fixture
def shim(library) -> Shim:
    shim = Shim(library.ffi, library.lib)
    shim.set_pending(Knobs())
    return shim


def test_pending_knobs_reach_the_library_and_come_back(library, shim):
    knobs = Knobs(mode="exact", hot_window=64, importance_decay=0.92, residual_k="on", promotion_threshold=0.1)
    shim.set_pending(knobs)
    assert library.pending[-1]["mode"] == specs()["mode"].choices.index("exact")
    assert library.pending[-1]["hot_window"] == 64
    assert shim.knobs(1) == knobs  # 0.92 and 0.1 too, which no C float holds
    shim.set_pending(None)
    assert library.pending[-1] is None


def test_live_knobs_change_and_others_need_a_new_context(shim):
    shim.set_knob(1, "promote-tokens", 256)
    assert shim.knobs(1) == Knobs(promote_tokens=256)
    with pytest.raises(UsageError, match="^hot_window needs a new context: start again with --hot-window 64$"):
        shim.set_knob(1, "hot_window", 64)
    with pytest.raises(UsageError, match="allowed is 0 to 1048576"):
        shim.set_knob(1, "promote_tokens", -1)
    assert shim.knobs(1) == Knobs(promote_tokens=256)


def test_the_librarys_own_refusal_passes_through(library, shim):
    library.fail = "hot_window = 16: allowed is page_size (32) and more"
    with pytest.raises(UsageError, match="^hot_window = 16: allowed is page_size"):
        shim.validate(Knobs(hot_window=16, page_size=32))
    for call in (shim.stats, shim.pages, shim.knobs):
        with pytest.raises(MonarchError, match="^hot_window = 16"):
            call(1)


def test_stats_and_pages(library, shim):
    sizes = {"hot_bytes": 5, "cold_bytes": 6, "table_bytes": 1}
    library.stats = {"n_layer": 3, "n_head_kv": 2, "mode": 3, "n_hot": 7, **sizes}
    library.pages = [(16, 16, 4, 0), (32, 9, 0, 2)]
    stats = shim.stats(1)
    assert (stats.mode, stats.n_hot, stats.n_places, stats.kv_bytes) == ("exact", 7, 6, 12)
    assert shim.pages(1) == [Page(16, 16, 4, 0), Page(32, 9, 0, 2)]
    library.pages = []
    assert shim.pages(1) == []


def test_hooks_are_called_replaced_and_removed(library, shim):
    seen: list[Event] = []
    keep = shim.set_hooks(1, {"on_promote": seen.append, "on_sticky": None})
    assert not library.hooks.on_sticky
    library.fire("on_promote", seq_id=1, layer=2, head_kv=3, first_pos=32, n_tokens=16, estimated=0.5, measured=0.25)
    assert seen == [Event(1, 2, 3, 32, 16, 0.5, 0.25)]
    del keep
    shim.set_hooks(1, {"on_promote": None})
    assert library.hooks is None


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt("boom"), SystemExit("boom")])
def test_an_exception_in_a_hook_is_reported_and_stays_in_python(library, shim, capfd, error):
    def raises(_event: Event) -> None:
        raise error

    keep = shim.set_hooks(1, {"on_page_out": raises})
    library.fire("on_page_out", layer=-1)
    report = capfd.readouterr().err
    assert "exception ignored in hook on_page_out:" in report
    assert f"{type(error).__name__}: boom" in report
    assert keep


def test_missing_definitions_are_one_line(tmp_path):
    with pytest.raises(MonarchError, match="cannot read none.def: .*reinstall"):
        knobs_module.read_specs(tmp_path / "none.def")
