"""What the user sees besides the answer: lines and pictures as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .knobs import Knobs, specs
from .shim import Page
from .stats import Stats
from .units import MIB

if TYPE_CHECKING:
    from .chat_session import Turn

LEGEND = {
    "S": "sink",
    "#": "hot",
    "*": "sticky in some layer and head",
    "+": "promoted in some layer and head",
    ".": "cold",
}
_COLORS = {"S": "34", "#": "31", "*": "35", "+": "33", ".": "90"}


@dataclass(frozen=True)
class Cell:
    first_pos: int
    mark: str


def turn_line(turn: Turn, pages: str) -> str:
    reused = f", {turn.n_reused} reused" if turn.n_reused else ""
    prompt = f"prompt {_at_rate(turn.n_prompt, turn.prompt_s)}{reused}"
    return f"[{prompt} | answer {_at_rate(turn.n_answer, turn.answer_s)} | {pages}]"


def _at_rate(n: int, seconds: float) -> str:
    return f"{n} at {n / seconds:.1f} tok/s" if n and seconds > 0 else str(n)


def pages_summary(stats: Stats, page_size: int) -> str:
    """Promoted: the mean over layers and KV heads, each of which promotes its own pages."""
    n_hot = _ceil_div(stats.n_hot, page_size)
    promoted = f"{stats.n_promoted / stats.n_places:.1f}".removesuffix(".0")
    return f"{n_hot} hot, {promoted} promoted, {stats.n_pages} cold pages | KV {stats.kv_bytes / MIB:.1f} MiB"


def stats_table(stats: Stats) -> str:
    return _table((name, _stat(name, value)) for name, value in asdict(stats).items())


def knobs_table(knobs: Knobs) -> str:
    live = {name: "" if specs()[name].live else "  (needs a new context)" for name in knobs}
    return _table((name, f"{value}{live[name]}") for name, value in knobs.items())


def pages_picture(pages: list[Page], stats: Stats, knobs: Knobs, width: int, color: bool) -> str:
    """One character per page in order of position, each row headed by its first position."""
    cells = page_cells(pages, stats, knobs.sink_tokens, knobs.page_size)
    margin = len(str(stats.n_tokens)) + 1
    n_columns = max(1, width - margin)
    rows = [cells[i : i + n_columns] for i in range(0, len(cells), n_columns)]
    drawn = [f"{row[0].first_pos:>{margin - 1}} " + _draw(row, color) for row in rows]
    return "\n".join([*drawn, *_legend(cells, color)])


def page_cells(pages: list[Page], stats: Stats, sink_tokens: int, page_size: int) -> list[Cell]:
    n_sink = min(sink_tokens, stats.n_tokens)
    n_hot = stats.n_hot - n_sink
    hot_start = stats.n_tokens - n_hot
    cells = [Cell(pos, "S") for pos in range(0, n_sink, page_size)]
    cells += [Cell(page.first_pos, _mark(page)) for page in pages]
    return cells + [Cell(pos, "#") for pos in range(hot_start, stats.n_tokens, page_size)]


def _mark(page: Page) -> str:
    if page.n_sticky:
        return "*"
    return "+" if page.n_promoted else "."


def _draw(row: list[Cell], color: bool) -> str:
    return "".join(_colored(cell.mark, color) for cell in row)


def _legend(cells: list[Cell], color: bool) -> list[str]:
    marks = [cell.mark for cell in cells]
    return [f"{_colored(mark, color)} {meaning}: {marks.count(mark)}" for mark, meaning in LEGEND.items()]


def _colored(mark: str, color: bool) -> str:
    return f"\x1b[{_COLORS[mark]}m{mark}\x1b[0m" if color else mark


def _stat(name: str, value: object) -> str:
    if name.endswith("_bytes"):
        return f"{value}  ({value / MIB:.2f} MiB)"
    if name.endswith("_us"):
        return f"{value}  ({value / 1e6:.2f} s)"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def say(text: str) -> None:
    """Everything but answers."""
    print(text, file=sys.stderr, flush=True)


class ProgressLine:
    """How much of a long prompt is read; only where somebody watches, and gone when it is."""

    SHORT = 64

    def __init__(self) -> None:
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if total > self.SHORT and sys.stderr.isatty():
            self._write(f"reading the prompt: {done} of {total} tokens ({100 * done // total} %)")
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            self._write("")
            self._shown = False

    def _write(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
