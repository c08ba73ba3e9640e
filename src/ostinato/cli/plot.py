"""A line chart as SVG text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 860, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 200, 50, 60  # margins; the legend stands in the right one
_COLOURS = ("#1b6ca8", "#c2410c", "#15803d", "#7e22ce", "#b91c1c", "#0f766e", "#a16207", "#475569")


@dataclass(frozen=True)
class Line:
    """One line of the chart. x: above 0. low, high: the spread of each y."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dashed: bool = False


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """A chart with a logarithmic x axis and a y axis that begins at 0."""
    values = sorted({x for line in lines for x in line.x})
    ticks = y_ticks(max(high for line in lines for high in line.high))
    first, last = math.log(values[0]), math.log(values[-1])

    def at_x(x: float) -> float:
        share = (math.log(x) - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - y / ticks[-1] * (_HEIGHT - _TOP - _BOTTOM)

    end = _WIDTH - _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 28, title, size=16, anchor="start"),
        _text((_LEFT + end) / 2, _HEIGHT - 14, x_label),
        f'<g transform="translate(22 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f}) rotate(-90)">{_text(0, 0, y_label)}</g>',
    ]
    for tick in ticks:
        y = at_y(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e8f0"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{tick:,g}", anchor="end"))
    for value in values:
        parts.append(_text(at_x(value), _HEIGHT - _BOTTOM + 20, f"{value:g}"))
    for number, line in enumerate(lines):
        parts += _drawn(line, [at_x(x) for x in line.x], at_y, _COLOURS[number % len(_COLOURS)])
        parts += _legend(line, number, _COLOURS[number % len(_COLOURS)])
    return "\n".join([*parts, "</svg>\n"])


def y_ticks(highest: float) -> list[float]:
    """Round numbers from 0 to the first one that is not below ``highest``, five or so of them."""
    if highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 6 >= highest)
    return [step * at for at in range(math.ceil(highest / step - 1e-9) + 1)]


def _drawn(line: Line, xs: list[float], at_y: Callable[[float], float], colour: str) -> list[str]:
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    path = " ".join(f"{x:.1f},{at_y(y):.1f}" for x, y in zip(xs, line.y, strict=True))
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    for x, y, low, high in zip(xs, line.y, line.low, line.high, strict=True):
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{at_y(low):.1f}" y2="{at_y(high):.1f}" stroke="{colour}"/>'
            f'<circle cx="{x:.1f}" cy="{at_y(y):.1f}" r="3.5" fill="{colour}"><title>{y:,.1f}</title></circle>'
        )
    return parts


def _legend(line: Line, number: int, colour: str) -> list[str]:
    x, y = _WIDTH - _RIGHT + 20, _TOP + 10 + 22 * number
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    return [
        f'<line x1="{x}" x2="{x + 28}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>',
        _text(x + 36, y + 4, line.label, anchor="start"),
    ]


def _text(x: float, y: float, content: str, *, size: int = 12, anchor: str = "middle") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text {place} font-size="{size}" text-anchor="{anchor}" fill="#1e293b">{escape(content)}</text>'
