"""The rows of an A/B comparison, looked up by arm; and what they come to, in a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from .ab_arms import STOCK
from .ab_rows import Row

# nearer to stock than this is called equal, and so is what noise may be
MARGIN = 0.05
RECALL_MARGIN = 0.02
PERPLEXITY_MARGIN = 0.003

_BYTES = "bytes_per_further_token"

Test = tuple[int, int, int]  # depth, prompt tokens, generated tokens


def unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))


class Speeds:
    """The best row of each arm and test: only f16 without paging has a choice, of flash attention."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._best: dict[tuple[str, Test], Row] = {}
        for row in rows:
            key = row["arm"], _test(row)
            if key not in self._best or speed(row) > speed(self._best[key]):
                self._best[key] = row

    @property
    def arms(self) -> list[str]:
        return unique(arm for arm, _ in self._best)

    @property
    def tests(self) -> list[Test]:
        return unique(test for _, test in self._best)

    def row(self, arm: str, test: Test) -> Row | None:
        return self._best.get((arm, test))

    def ratio(self, arm: str, test: Test) -> float | None:
        row, stock = self.row(arm, test), self.row(STOCK, test)
        return speed(row) / speed(stock) if row and stock else None

    def margin(self, arm: str, test: Test) -> float:
        """By how much the ratio must differ from 1 to be a difference: two standard errors, if that is more."""
        rows = (self.row(arm, test), self.row(STOCK, test))
        return max(MARGIN, 2 * math.hypot(*(_standard_error(row) for row in rows if row)))


class Quality:
    """Of stock, what it scores with flash attention: without it, it is the reference."""

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self._values: dict[tuple, Row] = {}
        for row in rows:
            if not row.get("control"):
                self._values.setdefault((row["arm"], row["metric"], row.get("way"), _cell(row)), row)
        self.control = [row for row in rows if row.get("control")]

    @property
    def arms(self) -> list[str]:
        return unique(arm for arm, _, _, _ in self._values)

    def row(self, arm: str, metric: str, way: str | None = None) -> Row | None:
        return self._values.get((arm, metric, way, None))

    def value(self, arm: str, metric: str, way: str | None = None) -> float | None:
        row = self.row(arm, metric, way)
        return row["value"] if row else None

    def control_value(self, metric: str, way: str | None = None) -> float | None:
        return next((row["value"] for row in self.control if (row["metric"], row.get("way")) == (metric, way)), None)

    def perplexity_change(self, arm: str, way: str) -> tuple[float, float] | None:
        """Against stock f16, and its standard error; both shares."""
        change, error = (self.value(arm, f"perplexity_change{name}", way) for name in ("", "_stderr"))
        return None if change is None or error is None else (change, error)

    def needles(self, arm: str) -> dict[tuple[int, float], Row]:
        """By length and depth."""
        return {cell: row for (name, metric, _, cell), row in self._values.items()
                if (name, metric) == (arm, "needle_recall")}  # fmt: skip

    def recall(self, arm: str) -> tuple[int, int] | None:
        """Found, of how many."""
        rows = self.needles(arm).values()
        return (sum(row["n_found"] for row in rows), sum(row["n_needles"] for row in rows)) if rows else None


def verdict(rows: Sequence[Row]) -> str:
    """One sentence about the first arm that pages, losses included."""
    paged = [arm for arm in _paging_arms(rows) if arm != "window"]
    if not paged:
        return "No arm paged: there is nothing to judge."
    arm = "paged" if "paged" in paged else paged[0]
    gains, losses = [], []
    for text, lost in [*_speed_facts(rows, arm), *_memory_facts(rows, arm), *_quality_facts(rows, arm)]:
        (losses if lost else gains).append(text)
    sentence = f"{arm}: " + (", ".join(gains) or "no gain over stock")
    return sentence + (f"; it loses: {', '.join(losses)}." if losses else "; no loss was measured.")


def _paging_arms(rows: Sequence[Row]) -> list[str]:
    return unique(row["arm"] for row in rows if row.get("knobs") and row["knobs"]["mode"] != "off")


def _speed_facts(rows: Sequence[Row], arm: str) -> list[tuple[str, bool]]:
    speeds = Speeds(row for row in rows if row["row"] == "speed")
    facts = []
    for test in speeds.tests:
        if (ratio := speeds.ratio(arm, test)) and abs(ratio - 1) > speeds.margin(arm, test):
            facts.append((f"{test_name(test)} {ratio:.2f}x stock's speed", ratio < 1))
    return facts


def _memory_facts(rows: Sequence[Row], arm: str) -> list[tuple[str, bool]]:
    held = {row["arm"]: row for row in rows if row["row"] == "memory"}
    if arm not in held or STOCK not in held:
        return []
    ratio = held[arm]["kv_bytes"] / held[STOCK]["kv_bytes"]
    facts = [(f"{100 * ratio:.0f}% of stock's KV bytes at {held[arm]['n_tokens']} tokens", ratio > 1)]
    if held[arm]["stats"]["n_cold"] == 0:
        facts.append(("nothing was cold at these depths", True))
    return facts


def _quality_facts(rows: Sequence[Row], arm: str) -> list[tuple[str, bool]]:
    quality = Quality([row for row in rows if row["row"] == "quality"])
    facts: list[tuple[str, bool]] = []
    if change := quality.perplexity_change(arm, "decode"):
        facts.append((f"perplexity {change[0]:+.2%} ± {change[1]:.2%}", change[0] > PERPLEXITY_MARGIN))
    found, base_found = quality.recall(arm), quality.recall(STOCK)
    if found and base_found and base_found[0]:  # a model that finds none says nothing about the cache
        lost = found[0] / found[1] < base_found[0] / base_found[1] - RECALL_MARGIN
        facts.append((f"{found[0]} needles of {found[1]} found (stock {base_found[0]})", lost))
    return facts + _beaten_facts(quality, arm)


def _beaten_facts(quality: Quality, arm: str) -> list[tuple[str, bool]]:
    """KV types of stock that are nearer to f16."""
    ours = quality.row(arm, "kl_mean", "decode")
    theirs = ((name, quality.row(name, "kl_mean", "decode")) for name in quality.arms if name.startswith(f"{STOCK}-"))
    nearer = [(name, row) for name, row in theirs if ours and row and row["value"] < ours["value"]]
    if not nearer:
        return []
    each = (f"{name} {row['value']:.1g} in {row[_BYTES] / ours[_BYTES]:.2f}x the bytes"
            for name, row in nearer)  # fmt: skip
    return [(f"KL divergence {ours['value']:.1g} (" + "; ".join(each) + ")", True)]


def speed(row: Row) -> float:
    """One slow repetition on a busy machine says nothing about an arm."""
    return statistics.median(row["samples_ts"])


def noise(row: Row) -> float:
    """The samples' standard deviation, relative."""
    return row["stddev_ts"] / row["avg_ts"]


def _standard_error(row: Row) -> float:
    """Of the median, relative, as if the samples were normal."""
    return noise(row) * math.sqrt(math.pi / 2 / len(row["samples_ts"]))


def test_name(test: Test) -> str:
    depth, n_prompt, n_gen = test
    return (f"prompt {n_prompt}" if n_prompt else f"generate {n_gen}") + f" at {depth}"


def _test(row: Row) -> Test:
    return row["n_depth"], row["n_prompt"], row["n_gen"]


def _cell(row: Row) -> tuple[int, float] | None:
    return (row["length"], row["depth"]) if "length" in row else None
