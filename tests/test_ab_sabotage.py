"""A broken arm shows in the quality rows: wrong tables, lost values, pages chosen blindly, wrong positions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sabotage_build
from arms import ArmWith, python_path
from child import TESTS

from monarch_llamacpp.ab_arms import Arm, stock_arm
from monarch_llamacpp.ab_lab import Lab
from monarch_llamacpp.ab_quality import run_quality
from monarch_llamacpp.ab_rows import Rows
from monarch_llamacpp.ab_settings import Settings
from monarch_llamacpp.ab_summary import Quality
from monarch_llamacpp.knobs import Knobs
from monarch_llamacpp.progress import Progress

MODEL = TESTS.parent / "models" / "monarch-small.gguf"

KNOBS = Knobs(hot_window=64, promote_tokens=128, dense_layers=0)

needs_known_code = pytest.mark.skipif(
    not sabotage_build.MACHINE_IS_KNOWN, reason="knows the machine code of x86-64 and aarch64 only"
)


def measure(arm: Arm) -> Quality:
    settings = Settings(MODEL, [0], 0, 1, 1, 1, text_tokens=640, decode_tokens=64, lengths=[640], haystacks=2,
                        continuations=1, continue_tokens=8)  # fmt: skip
    lab = Lab([stock_arm(), arm], settings, Rows(None), Progress())
    run_quality(lab)
    assert not lab.rows.of("failure")
    return Quality(lab.rows.of("quality"))


@pytest.fixture(scope="module")
def intact(stock_bin: Path, patched_bin: Path) -> Callable[[str], Quality]:
    made: dict[str, Quality] = {}

    def get(mode: str) -> Quality:
        if mode not in made:
            made[mode] = measure(Arm(mode, patched_bin, KNOBS.replace(mode=mode)))
        return made[mode]

    return get


def check_is_caught(broken: Quality, intact: Quality, mode: str, factor: float) -> None:
    for way in ("prefill", "decode"):
        ours, theirs = broken.value("broken", "kl_mean", way), intact.value(mode, "kl_mean", way)
        print(f"{mode}, {way}: mean KL {theirs:.2g}, broken {ours:.2g}")
        assert ours > factor * theirs
        assert broken.value("broken", "same_top", way) < intact.value(mode, "same_top", way)
    assert broken.control_value("kl_mean", "decode") < 1e-6


@needs_known_code
@pytest.mark.parametrize(
    ("mode", "spoil", "what", "factor"),
    [
        ("exact", sabotage_build.overwrite_table, "MONARCH_SINE_4", 10),
        ("exact", sabotage_build.return_at_once, "encode_page_v", 10),
        ("paged", sabotage_build.return_at_once, "monarch_[a-z0-9]+_score", 1.2),
    ],
    ids=["wrong tables", "values lost", "pages chosen blindly"],
)
def test_broken_code_is_caught(intact, patched_bin, tmp_path, mode, spoil, what, factor):
    spoil(sabotage_build.copy_build(patched_bin, tmp_path), what)
    bin_dir = tmp_path / patched_bin.parent.name / "bin"
    arm = ArmWith("broken", bin_dir, KNOBS.replace(mode=mode), extra=(("MONARCH_CACHE", str(tmp_path)),))
    check_is_caught(measure(arm), intact(mode), mode, factor)


def test_wrong_positions_are_caught(intact, patched_bin):
    arm = ArmWith("broken", patched_bin, KNOBS.replace(mode="exact"), extra=(python_path("sabotage"),))
    check_is_caught(measure(arm), intact("exact"), "exact", 10)
