"""The result of an A/B comparison as tables in a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .ab_arms import STOCK
from .ab_bench import Row
from .chat_view import MIB

# nearer to stock than this is called equal
_MARGIN = 0.05
_NOISY = 0.20  # standard deviation over mean

Test = tuple[int, int, int]  # depth, prompt tokens, generated tokens


class Speeds:
    """The best row of each arm and test: only stock and patched-off have a choice, of flash attention."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._best: dict[tuple[str, Test], Row] = {}
        for row in rows:
            key = row["arm"], _test(row)
            if key not in self._best or _speed(row) > _speed(self._best[key]):
                self._best[key] = row

    @property
    def arms(self) -> list[str]:
        return _unique(arm for arm, _ in self._best)

    @property
    def tests(self) -> list[Test]:
        return _unique(test for _, test in self._best)

    def row(self, arm: str, test: Test) -> Row | None:
        return self._best.get((arm, test))

    def ratio(self, arm: str, test: Test) -> float | None:
        row, stock = self.row(arm, test), self.row(STOCK, test)
        return _speed(row) / _speed(stock) if row and stock else None


def print_report(console: Console, speed: Sequence[Row], quality: Sequence[Row], memory: Sequence[Row]) -> None:
    speeds = Speeds(speed)
    console.print(_speed_table(speeds))
    console.print(_memory_table(quality, memory))
    for line in [*_stock_notes(speeds), *_noise_notes(speed), *_nothing_cold_notes(memory)]:
        console.print(line, highlight=False)


def _speed_table(speeds: Speeds) -> Table:
    table = Table(title="Speed, tokens per second", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("at depth", justify="right")
    table.add_column("arm")
    kinds = _unique((n_prompt, n_gen) for _, n_prompt, n_gen in speeds.tests)
    for n_prompt, n_gen in kinds:
        table.add_column(f"prompt {n_prompt}" if n_prompt else f"generate {n_gen}", justify="right")
        table.add_column("vs stock", justify="right")
    for depth in _unique(depth for depth, _, _ in speeds.tests):
        for i, arm in enumerate(speeds.arms):
            cells = (_speed_cells(speeds, arm, (depth, *kind)) for kind in kinds)
            table.add_row("" if i else str(depth), arm, *(cell for pair in cells for cell in pair))
        table.add_section()
    return table


def _speed_cells(speeds: Speeds, arm: str, test: Test) -> tuple[str, str]:
    row, ratio = speeds.row(arm, test), speeds.ratio(arm, test)
    if row is None:
        return "-", "-"
    noise = f" ±{100 * _noise(row):.0f}%" if len(row["samples_ts"]) > 1 else ""
    return f"{_speed(row):.1f}{noise}", _ratio_cell(ratio)


def _ratio_cell(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    color = "red" if ratio < 1 - _MARGIN else "green" if ratio > 1 + _MARGIN else "default"
    return f"[{color}]{ratio:.2f}x[/]"


def _memory_table(quality: Sequence[Row], memory: Sequence[Row]) -> Table:
    title = f"Cache and recall after {memory[0]['n_tokens']} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("arm", "KV cache", "hot tokens", "cold tokens", "promotions", "found"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    recall = {row["arm"]: f"{row['n_found']} of {row['n_needles']}" for row in quality}
    for row in memory:
        table.add_row(row["arm"], f"{row['kv_bytes'] / MIB:.2f} MiB", *_page_cells(row), recall.get(row["arm"], "-"))
    return table


def _page_cells(row: Row) -> tuple[str, str, str]:
    stats = row["stats"]
    if stats is None:
        return str(row["n_tokens"]), "-", "-"
    return str(stats["n_hot"]), str(stats["n_cold"]), str(stats["n_promotions"])


def _stock_notes(speeds: Speeds) -> list[str]:
    rows = [(test, speeds.row(STOCK, test)) for test in speeds.tests]
    faster = [f"{_name(test)} -fa {int(row['flash_attn'])}" for test, row in rows if row]
    return ["below 1.00x is slower than stock, which ran at its best: " + ", ".join(faster)] if faster else []


def _nothing_cold_notes(memory: Sequence[Row]) -> list[str]:
    paged = [row["stats"] for row in memory if row["stats"]]
    if not paged or any(stats["n_cold"] for stats in paged):
        return []
    return ["nothing was paged: every token fits in the hot window; compare at a greater depth"]


def _noise_notes(rows: Sequence[Row]) -> list[str]:
    noisy = sum(_noise(row) > _NOISY for row in rows)
    if not noisy:
        return []
    return [f"{noisy} of {len(rows)} rows vary by more than {100 * _NOISY:.0f}%: stop other programs, or raise --reps"]


def _speed(row: Row) -> float:
    """One slow repetition on a busy machine says nothing about an arm."""
    return statistics.median(row["samples_ts"])


def _noise(row: Row) -> float:
    return row["stddev_ts"] / row["avg_ts"]


def _name(test: Test) -> str:
    depth, n_prompt, n_gen = test
    return (f"prompt {n_prompt}" if n_prompt else f"generate {n_gen}") + f" at {depth}"


def _test(row: Row) -> Test:
    return row["n_depth"], row["n_prompt"], row["n_gen"]


def _unique(items: Iterable) -> list:
    return list(dict.fromkeys(items))
