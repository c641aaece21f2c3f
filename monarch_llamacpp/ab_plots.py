"""The pictures of an A/B comparison, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from .ab_rows import Row
from .ab_summary import Quality, Speeds, speed, unique
from .ab_svg import Axis, area_chart, heat_map, line_chart, linear_axis, log_axis, point_chart
from .units import MIB

Color = Callable[[str], str]

# of a paging timeline
_LAYERS = {"hot": "#d1495b", "sticky": "#6a3fb5", "promoted": "#e0a030", "cold, not read": "#cfd8dc"}
_LEAST_KL = 1e-7  # below it is rounding


@dataclass(frozen=True)
class Figure:
    id: str
    title: str
    svg: str
    names: Sequence[str] = ()  # of arms, for the key
    note: str = ""
    colors: Mapping[str, str] = field(default_factory=dict)  # instead of names


def figures(rows: Sequence[Row], color: Color) -> Iterator[Figure]:
    by_kind = {kind: [row for row in rows if row["row"] == kind] for kind in ("speed", "memory", "quality")}
    if by_kind["speed"]:
        yield from _speed_figures(Speeds(by_kind["speed"]), color)
    if by_kind["memory"]:
        yield _memory_figure(by_kind["memory"], color)
    if by_kind["quality"]:
        yield from _quality_figures(Quality(by_kind["quality"]), color)
    if by_kind["memory"]:
        yield _latency_figure(by_kind["memory"], color)
        yield from (_paging_figure(row) for row in by_kind["memory"] if row["stats"] and row["stats"]["n_promotions"])


def _speed_figures(speeds: Speeds, color: Color) -> Iterator[Figure]:
    for n_prompt, n_gen in unique((n_prompt, n_gen) for _, n_prompt, n_gen in speeds.tests):
        depths = sorted({depth for depth, *kind in speeds.tests if tuple(kind) == (n_prompt, n_gen)})
        series = {arm: [(depth, speed(row)) for depth in depths if (row := speeds.row(arm, (depth, n_prompt, n_gen)))]
                  for arm in speeds.arms}  # fmt: skip
        y = linear_axis("tokens per second", [b for points in series.values() for _, b in points])
        svg = line_chart(linear_axis("tokens held", [*depths, 1]), y, series, color)
        what = f"prompt of {n_prompt}" if n_prompt else f"{n_gen} tokens generated"
        yield Figure(f"speed-{'prompt' if n_prompt else 'generate'}", f"Speed: {what}", svg, speeds.arms)


def _memory_figure(memory: Sequence[Row], color: Color) -> Figure:
    series = {row["arm"]: [(point[0], point[5] / MIB) for point in row["timeline"]] for row in memory}
    xs, ys = zip(*(pair for points in series.values() for pair in points), strict=True)
    svg = line_chart(linear_axis("tokens held", xs), linear_axis("MiB", ys), series, color)
    return Figure("memory", "Memory of the KV cache", svg, list(series))


def _quality_figures(quality: Quality, color: Color) -> Iterator[Figure]:
    points = {}
    for arm in quality.arms:
        if row := quality.row(arm, "kl_mean", "decode"):
            points[arm] = row["bytes_per_further_token"], max(row["value"], _LEAST_KL)
    if points:
        xs, ys = zip(*points.values(), strict=True)
        axes = linear_axis("bytes for each further token", xs), log_axis("mean KL divergence", ys)
        svg = point_chart(*axes, points, color)
        note = "Down and to the left is better. One token at a time. The hot window, of a fixed size, is not counted; "
        note += f"the table counts it. Drawn at {_LEAST_KL:.0e}: that or less."
        yield Figure("frontier", "Quality against memory", svg, note=note)
    traces = {arm: row["promoted_sticky"] for arm in quality.arms if (row := quality.row(arm, "cold_attention"))}
    yield from (_mass_figure(arm, trace) for arm, trace in traces.items())
    if cells := {arm: quality.needles(arm) for arm in quality.arms if quality.needles(arm)}:
        yield _recall_figure(cells)


def _mass_figure(arm: str, trace: Sequence[tuple[float, float]]) -> Figure:
    layers = {"hot": [1 - sum(each) for each in trace], "sticky": [sticky for _, sticky in trace]}
    layers["promoted"] = [promoted for promoted, _ in trace]
    xs = list(range(1, len(trace) + 1))
    axes = linear_axis("token written", xs), Axis("share of attention", 0.0, 1.0)
    svg = area_chart(*axes, xs, layers, lambda name: _LAYERS[name])
    colors = {name: _LAYERS[name] for name in layers}
    note = "A mean over layers and heads, on the text of the quality rows."
    return Figure(f"mass-{arm}", f"Where attention goes: {arm}", svg, note=note, colors=colors)


def _recall_figure(needles: Mapping[str, Mapping[tuple[int, float], Row]]) -> Figure:
    depths = sorted({depth for cells in needles.values() for _, depth in cells})
    lengths = sorted({length for cells in needles.values() for length, _ in cells})
    rows = {f"{arm} {length}": [_recall_cell(cells.get((length, depth))) for depth in depths]
            for length in lengths for arm, cells in needles.items()}  # fmt: skip
    note = "Columns: where the needle lies in the text. Rows: arm and tokens. Cells: found, of how many."
    return Figure("recall", "Needles found", heat_map([f"{depth:.0%}" for depth in depths], rows), note=note)


def _recall_cell(row: Row | None) -> tuple[float, str] | None:
    return (row["value"], f"{row['n_found']}/{row['n_needles']}") if row else None


def _latency_figure(memory: Sequence[Row], color: Color) -> Figure:
    series = {row["arm"]: list(enumerate(row["token_ms"], 1)) for row in memory}
    times = [time for row in memory for time in row["token_ms"]]
    axes = linear_axis("token", [len(row["token_ms"]) for row in memory]), linear_axis("milliseconds", times)
    note = f"After {memory[0]['n_tokens'] - len(memory[0]['token_ms']) - 1} tokens of prompt; one run each."
    return Figure("latency", "Latency of each token", line_chart(*axes, series, color), list(series), note)


def _paging_figure(row: Row) -> Figure:
    layers: dict[str, list[float]] = {name: [] for name in _LAYERS}
    for _, hot, promoted, sticky, cold, _ in row["timeline"]:
        sticky = min(sticky, promoted)
        for name, value in zip(_LAYERS, (hot, sticky, promoted - sticky, max(0, cold - promoted)), strict=True):
            layers[name].append(value)
    steps = list(range(len(row["timeline"])))
    held = [point[0] for point in row["timeline"]]
    axes = linear_axis("step: batches of the prompt, then tokens", steps), linear_axis("tokens", held)
    svg = area_chart(*axes, steps, layers, lambda name: _LAYERS[name])
    note = "Promoted and sticky: a mean over layers and KV heads."
    return Figure(f"paging-{row['arm']}", f"Paging over the run: {row['arm']}", svg, note=note, colors=_LAYERS)
