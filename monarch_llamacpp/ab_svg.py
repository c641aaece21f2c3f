"""Small charts as inline SVG: lines, labelled points, stacked areas and heat maps. No library, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

# drawn at 420 wide, so that 13 px are still legible on a phone
WIDTH, HEIGHT = 420, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44


@dataclass(frozen=True)
class Axis:
    label: str
    least: float
    greatest: float
    log: bool = False

    def place(self, value: float) -> float:
        """0 to 1."""
        if self.log:
            low, high, value = math.log10(self.least), math.log10(self.greatest), math.log10(max(value, self.least))
        else:
            low, high = self.least, self.greatest
        return (value - low) / ((high - low) or 1)

    def ticks(self) -> list[float]:
        if self.log:
            low, high = math.ceil(math.log10(self.least) - 1e-9), math.floor(math.log10(self.greatest) + 1e-9)
            step = max(1, math.ceil((high - low) / 5))
            return [10.0**i for i in range(low, high + 1, step)]
        step = _nice((self.greatest - self.least) / 4)
        first = math.ceil(self.least / step)
        return [i * step for i in range(first, int(self.greatest / step + 1e-9) + 1)]


def linear_axis(label: str, values: Sequence[float]) -> Axis:
    """From zero."""
    return Axis(label, 0.0, max([*values, 1e-12]) * 1.05)


def log_axis(label: str, values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    return Axis(label, 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high * 1.01)), log=True)


def line_chart(x: Axis, y: Axis, series: Mapping[str, Points], color: Callable[[str], str]) -> str:
    parts = []
    for name, points in series.items():
        path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color(name)}" stroke-width="2"/>')
        if len(points) <= 12:
            parts += [_dot(_x(x, a), _y(y, b), color(name), f"{name}: {number(a)}, {number(b)}") for a, b in points]
    return _frame(x, y, parts)


def point_chart(x: Axis, y: Axis, points: Mapping[str, tuple[float, float]], color: Callable[[str], str]) -> str:
    parts, taken = [], []
    for name, (a, b) in sorted(points.items(), key=lambda item: -item[1][1]):
        px, py = _x(x, a), _y(y, b)
        parts.append(_dot(px, py, color(name), f"{name}: {number(a)}, {number(b)}", 5))
        right = px > WIDTH * 0.7
        ly = py + 4
        while any(abs(ly - other) < 13 and side == right for other, side in taken):
            ly += 13
        taken.append((ly, right))
        anchor, lx = ("end", px - 8) if right else ("start", px + 8)
        parts.append(_text(lx, min(ly, HEIGHT - _BOTTOM - 3), name, anchor, color(name)))
    return _frame(x, y, parts)


def area_chart(x: Axis, y: Axis, xs: Sequence[float], layers: Mapping[str, Sequence[float]],
               color: Callable[[str], str]) -> str:
    """Layers on top of each other."""
    parts, base = [], [0.0] * len(xs)
    for name, values in layers.items():
        top = [low + value for low, value in zip(base, values, strict=True)]
        edge = [*zip(xs, top, strict=True), *reversed(list(zip(xs, base, strict=True)))]
        path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in edge)
        parts.append(f'<polygon points="{path}" fill="{color(name)}"><title>{escape(name)}</title></polygon>')
        base = top
    return _frame(x, y, parts)


def heat_map(columns: Sequence[str], rows: Mapping[str, Sequence[tuple[float, str] | None]]) -> str:
    """Values from 0 to 1, each with what is written in its cell."""
    left, row_height, top = 130, 24, 22
    width = (WIDTH - left) / max(1, len(columns))
    parts = [_text(left + (i + 0.5) * width, 15, name, "middle") for i, name in enumerate(columns)]
    for j, (name, cells) in enumerate(rows.items()):
        y = top + j * row_height
        parts.append(_text(left - 6, y + 16, name, "end"))
        for i, cell in enumerate(cells):
            if cell:
                x, (value, written) = left + i * width, cell
                parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="{row_height - 1}" '
                             f'fill="{_heat(value)}"/>')
                parts.append(_text(x + width / 2, y + 16, written, "middle"))
    return _svg(parts, top + len(rows) * row_height + 4)


def number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return f"{value / 1000:.0f}k" if abs(value) < 1e6 else f"{value / 1e6:.3g}M"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.0e}"


def _frame(x: Axis, y: Axis, parts: Sequence[str]) -> str:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    grid = []
    for value in y.ticks():
        py = _y(y, value)
        grid.append(f'<line x1="{_LEFT}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>')
        grid.append(_text(_LEFT - 5, py + 4, number(value), "end"))
    for value in x.ticks():
        px = _x(x, value)
        grid.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{_TOP}" y2="{bottom}" stroke="#eee"/>')
        grid.append(_text(px, bottom + 16, number(value), "middle"))
    grid.append(_text((_LEFT + right) / 2, HEIGHT - 8, x.label, "middle"))
    middle = (_TOP + bottom) / 2
    grid.append(f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
                f"{escape(y.label)}</text>")
    return _svg([*grid, *parts], HEIGHT)


def _svg(parts: Sequence[str], height: float) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - _BOTTOM - axis.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _dot(x: float, y: float, color: str, title: str, radius: float = 3.5) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{color}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str, color: str = "#333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _heat(value: float) -> str:
    """Red to green, pale enough to write on."""
    return f"hsl({round(120 * max(0.0, min(1.0, value)))} 60% 75%)"


def _nice(step: float) -> float:
    power = 10 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)
