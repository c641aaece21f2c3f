"""The result of an A/B comparison as tables in a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table

from .ab_arms import STOCK
from .ab_rows import Row
from .ab_summary import Quality, Speeds, Test, noise, speed, test_name, unique, verdict
from .units import MIB

_NOISY = 0.20  # standard deviation over mean


def print_report(console: Console, rows: Sequence[Row]) -> None:
    by_kind = {kind: [row for row in rows if row["row"] == kind] for kind in ("speed", "memory", "quality", "failure")}
    speeds = Speeds(by_kind["speed"])
    if by_kind["speed"]:
        console.print(_speed_table(speeds))
    if by_kind["memory"]:
        console.print(_memory_table(by_kind["memory"]))
    if by_kind["quality"]:
        console.print(_quality_table(Quality(by_kind["quality"])))
    notes = [*_stock_notes(speeds), *_noise_notes(by_kind["speed"]), *_nothing_cold_notes(rows)]
    for line in [*notes, *(f"failed: {row['reason']}" for row in by_kind["failure"])]:
        console.print(line, highlight=False, markup=False, soft_wrap=not console.is_terminal)
    console.print(verdict(rows), highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _make_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    return table


def _speed_table(speeds: Speeds) -> Table:
    kinds = unique((n_prompt, n_gen) for _, n_prompt, n_gen in speeds.tests)
    names = [f"prompt {n_prompt}" if n_prompt else f"generate {n_gen}" for n_prompt, n_gen in kinds]
    columns = [cell for name in names for cell in (name, "vs stock")]
    table = _make_table("Speed, tokens per second: median ± standard deviation", "at depth", "arm", *columns)
    for depth in unique(depth for depth, _, _ in speeds.tests):
        for i, arm in enumerate(speeds.arms):
            cells = (_speed_cells(speeds, arm, (depth, *kind)) for kind in kinds)
            table.add_row("" if i else str(depth), arm, *(cell for pair in cells for cell in pair))
        table.add_section()
    return table


def _speed_cells(speeds: Speeds, arm: str, test: Test) -> tuple[str, str]:
    row, ratio = speeds.row(arm, test), speeds.ratio(arm, test)
    if row is None:
        return "-", "-"
    spread = f" ±{100 * noise(row):.0f}%" if len(row["samples_ts"]) > 1 else ""
    return f"{speed(row):.1f}{spread}", "-" if ratio is None else _ratio_cell(ratio, speeds.margin(arm, test))


def _ratio_cell(ratio: float, margin: float) -> str:
    color = "red" if ratio < 1 - margin else "green" if ratio > 1 + margin else "default"
    return f"[{color}]{ratio:.2f}x[/]"


def _memory_table(memory: Sequence[Row]) -> Table:
    title = f"Cache and latency after {memory[0]['n_tokens']} tokens"
    vram = ["VRAM MiB"] if any(row["vram_bytes"] for row in memory) else []
    table = _make_table(title, "arm", "KV MiB", "hot", "cold", "promoted", "peak MiB", *vram, "first s", "ms", "p99")
    for row in memory:
        taken = [row["peak_rss_bytes"], *([row["vram_bytes"]] if vram else [])]
        sizes = f"{row['kv_bytes'] / MIB:.4g}", *_page_cells(row), *(f"{size / MIB:.0f}" for size in taken)
        times = statistics.median(row["token_ms"]), percentile(row["token_ms"], 99)
        table.add_row(row["arm"], *sizes, f"{row['first_token_s']:.3g}", *(f"{time:.3g}" for time in times))
    return table


def percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def _page_cells(row: Row) -> tuple[str, str, str]:
    stats = row["stats"]
    if stats is None:
        return str(row["n_tokens"]), "-", "-"
    return str(stats["n_hot"]), str(stats["n_cold"]), str(stats["n_promotions"])


def _quality_table(quality: Quality) -> Table:
    title = "Quality against stock f16, token by token; prompt: KL through a prompt"
    columns = "ppl", "change %", "KL", "prompt", "top", "found", "BLEU", "read", "bytes"
    table = _make_table(title, "arm", *columns)
    if quality.control:
        ppl, *others = _text_cells(quality.control_value)
        table.add_row("control", ppl, "-", *others, *("-",) * 4)
    for arm in quality.arms:
        found, row = quality.recall(arm), quality.row(arm, "kl_mean", "decode")
        bleu = f"{quality.value(arm, 'bleu'):.0f}"
        cells = f"{found[0]}/{found[1]}" if found else "-", bleu, f"{row['attended']:.0%}"
        ppl, *others = _text_cells(partial(quality.value, arm))
        table.add_row(arm, ppl, _change_cell(quality, arm), *others, *cells, f"{row['bytes_per_token']:.0f}")
    return table


def _change_cell(quality: Quality, arm: str) -> str:
    if not (change := quality.perplexity_change(arm, "decode")):
        return "-"
    percent, error = (100 * share for share in change)
    return f"{percent:+.1f}±{error:.1f}" if abs(percent) < 9.95 else f"{percent:+.0f}±{error:.0f}"


def _text_cells(value: Callable[[str, str], float | None]) -> tuple[str, ...]:
    kinds = ("perplexity", "decode"), ("kl_mean", "decode"), ("kl_mean", "prefill"), ("same_top", "decode")
    return tuple(short(value(*kind)) for kind in kinds)


def short(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 0.1:
        return f"{value:.3g}"
    return "0" if value < 1e-7 else f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"


def _stock_notes(speeds: Speeds) -> list[str]:
    rows = [(test, speeds.row(STOCK, test)) for test in speeds.tests]
    faster = [f"{test_name(test)} -fa {int(row['flash_attn'])}" for test, row in rows if row]
    return ["below 1.00x is slower than stock, which ran at its best: " + ", ".join(faster)] if faster else []


def _nothing_cold_notes(rows: Sequence[Row]) -> list[str]:
    notes = []
    for kind, remedy in (("memory", "compare at a greater depth"), ("quality", "ask for more --text-tokens")):
        paged = [row["stats"] for row in rows if row["row"] == kind and row.get("stats")]
        if paged and not any(stats["n_cold"] for stats in paged):
            notes.append(f"{kind}: nothing was paged, every token fits in the hot window: {remedy}")
    return notes


def _noise_notes(rows: Sequence[Row]) -> list[str]:
    noisy = sum(noise(row) > _NOISY for row in rows)
    if not noisy:
        return []
    return [f"{noisy} of {len(rows)} rows vary by more than {100 * _NOISY:.0f}%: stop other programs, or raise --reps"]
