"""The result of an A/B comparison as one page that needs nothing else: pictures, tables, environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from .ab_arms import ARMS
from .ab_plots import Figure, figures
from .ab_rows import Row
from .ab_summary import Quality, Speeds, speed, test_name, unique, verdict
from .ab_svg import number

_COLORS = ("#222222", "#8c8c8c", "#b8860b", "#7a5230", "#5b8db8", "#d1495b", "#1b7f3b", "#6a3fb5", "#e07b00", "#0097a7")

_HELD = {"attended": "share read", "bytes_per_token": "bytes/token", "bytes_per_further_token": "further"}

_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 12px;
       max-width: 1000px }
h1 { font-size: 1.35em }
h2 { font-size: 1.1em; margin: 1.4em 0 .3em }
.verdict { background: #f3f3f3; padding: 10px }
.failed { color: #b00020 }
.figures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)) }
figure { margin: 0; min-width: 0 }
figcaption { font-weight: 600 }
svg { width: 100%; height: auto; max-width: 100% }
svg text { font: 12.5px system-ui, sans-serif }
.key { margin-right: 12px; white-space: nowrap }
.key i { display: inline-block; width: 11px; height: 11px; margin-right: 4px }
.note { color: #555; font-size: .9em }
.wide { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .9em }
td, th { padding: 2px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8em }
""".strip()


def make_page(rows: Sequence[Row]) -> str:
    environment = next(row for row in rows if row["row"] == "environment")
    title = f"A/B: {Path(environment['model']['file']).name}"
    color = _colors(rows)
    body = [f"<h1>{escape(title)}</h1>", f'<p class="verdict">{escape(verdict(rows))}</p>']
    body += [f'<p class="failed">failed: {escape(row["reason"])}</p>' for row in rows if row["row"] == "failure"]
    body.append(f'<div class="figures">{"".join(_figure(figure, color) for figure in figures(rows, color))}</div>')
    body += _tables(rows)
    body.append(f"<h2>Environment</h2><pre>{escape(json.dumps(environment, indent=1))}</pre>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{chr(10).join(body)}</body></html>\n'


def _colors(rows: Sequence[Row]) -> Callable[[str], str]:
    """The same for an arm in every report."""
    names = unique([*ARMS, *(row["arm"] for row in rows if "arm" in row)])
    return lambda name: _COLORS[names.index(name) % len(_COLORS)]


def _figure(figure: Figure, color: Callable[[str], str]) -> str:
    colors = figure.colors or {name: color(name) for name in figure.names}
    key = "".join(f'<span class="key"><i style="background:{value}"></i>{escape(name)}</span>'
                  for name, value in colors.items())  # fmt: skip
    note = f'<div class="note">{escape(figure.note)}</div>' if figure.note else ""
    caption = f"<figcaption>{escape(figure.title)}</figcaption>"
    return f'<figure id="{escape(figure.id)}">{caption}{figure.svg}<div>{key}</div>{note}</figure>'


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    speeds = Speeds(row for row in rows if row["row"] == "speed")
    if speeds.tests:
        yield "<h2>Speed, tokens per second (times stock's)</h2>"
        cells = [[arm, *(_speed_cell(speeds, arm, test) for test in speeds.tests)] for arm in speeds.arms]
        yield _table(["arm", *map(test_name, speeds.tests)], cells)
    quality = Quality(row for row in rows if row["row"] == "quality")
    if quality.arms:
        yield "<h2>Quality against stock f16</h2>"
        for way, about in (("decode", "one token at a time"), ("prefill", "through a prompt")):
            yield f"<p class=\"note\">{about}</p>"
            metrics = ["perplexity", "perplexity_change", "perplexity_change_stderr"]
            metrics += ["kl_mean", "kl_median", "kl_p99", "kl_max", "same_top"]
            control = ["stock again (control)", *(_cell(quality.control_value(metric, way)) for metric in metrics)]
            cells = [[arm, *(_cell(quality.value(arm, metric, way)) for metric in metrics)] for arm in quality.arms]
            held = [[number(quality.row(arm, "kl_mean", way)[name]) for name in _HELD] for arm in quality.arms]
            cells = [cell + more for cell, more in zip(cells, held, strict=True)]
            control += ["-"] * len(_HELD)
            yield _table(["arm", *metrics, *_HELD.values()], [control, *cells] if quality.control else cells)
        yield '<p class="note">what it finds, and what it writes on greedily against stock</p>'
        yield _table(["arm", "needles", "bleu", "exact_match"], [_written_cells(quality, arm) for arm in quality.arms])


def _written_cells(quality: Quality, arm: str) -> list[str]:
    found = quality.recall(arm)
    written = [_cell(quality.value(arm, metric)) for metric in ("bleu", "exact_match")]
    return [arm, f"{found[0]} of {found[1]}" if found else "-", *written]


def _speed_cell(speeds: Speeds, arm: str, test: tuple[int, int, int]) -> str:
    row, ratio = speeds.row(arm, test), speeds.ratio(arm, test)
    if row is None:
        return "-"
    return f"{speed(row):.1f}" + (f" ({ratio:.2f}x)" if ratio else "")


def _cell(value: float | None) -> str:
    return "-" if value is None else number(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
