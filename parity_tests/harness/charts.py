"""Plots of the report as inline SVG: colours come from the page's style, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 12, 34
"""Sizes a phone shows as they are; larger screens scale them up."""


@dataclass(frozen=True)
class Line:
    """A curve; `style` is a class of the page's style sheet."""

    label: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class Level:
    """A horizontal line: a bound."""

    label: str
    style: str
    value: float


class _LogAxis:
    """Vertical axis over powers of ten; what is smaller than its lower end is drawn there, and at its upper end what is
    larger or no number."""

    def __init__(self, values: Sequence[float], floor: float) -> None:
        positive = [value for value in values if value > 0 and math.isfinite(value)]
        self.low = math.floor(math.log10(max(min(positive, default=floor), floor)))
        self.high = max(math.ceil(math.log10(max(positive, default=1.0)) + 0.2), self.low + 1)

    def y(self, value: float) -> float:
        if math.isnan(value):
            value = math.inf
        exponent = self.low if value <= 0 else min(max(math.log10(value), self.low), self.high)
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - exponent) / (self.high - self.low)

    def grid(self) -> str:
        step = max(1, round((self.high - self.low) / 6))
        parts = []
        for exponent in range(self.low, self.high + 1, step):
            y = self.y(10.0**exponent)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">1e{exponent}</text>')
        return "".join(parts)


def _levels(levels: Sequence[Level], axis: _LogAxis) -> str:
    return "".join(
        f'<line class="bound {level.style}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{axis.y(level.value):.1f}" '
        f'y2="{axis.y(level.value):.1f}"/><text class="tick halo {level.style}" x="{WIDTH - RIGHT}" '
        f'y="{axis.y(level.value) - 4:.1f}" text-anchor="end">{escape(level.label)}</text>'
        for level in levels
    )


def _figure(body: str, description: str, x_label: str, legend: Sequence[tuple[str, str]]) -> str:
    keys = "".join(f'<span class="key"><i class="{style}"></i>{escape(label)}</span>' for label, style in legend)
    return (
        f'<figure><div class="legend">{keys}</div><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(description)}">{body}<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" '
        f'y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text></svg>'
        f"<figcaption>{escape(description)}</figcaption></figure>"
    )


def _polyline(line: Line, length: int, y: Callable[[float], float]) -> str:
    """The line's finite values over steps 1 to `length`: a run that diverges has others."""
    x = np.linspace(LEFT, WIDTH - RIGHT, length)
    points = (f"{x[i]:.1f},{y(float(value)):.1f}" for i, value in enumerate(line.values) if math.isfinite(value))
    return f'<polyline class="line {line.style}" points="{" ".join(points)}"/>'


def log_lines(
    lines: Sequence[Line], levels: Sequence[Level], description: str, x_label: str, floor: float = 1e-17
) -> str:
    """Curves over steps 1, 2, ... on a logarithmic axis."""
    values = [float(value) for line in lines for value in line.values] + [level.value for level in levels]
    axis = _LogAxis(values, floor)
    length = max(len(line.values) for line in lines)
    body = [axis.grid(), *(_polyline(line, length, axis.y) for line in lines)]
    body.append(_levels(levels, axis))
    for step in (1, length // 2, length):
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / max(length - 1, 1)
        anchor = "start" if step == 1 else "end" if step == length else "middle"
        body.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="{anchor}">{step}</text>')
    return _figure("".join(body), description, x_label, [(line.label, line.style) for line in lines])


def lines(curves: Sequence[Line], description: str, x_label: str) -> str:
    """Curves over steps 1, 2, ... on a linear axis."""
    finite = [value for curve in curves for value in curve.values if math.isfinite(value)]
    low = math.floor(min(finite, default=0))
    high = max(math.ceil(max(finite, default=0)), low + 1)
    length = max(len(curve.values) for curve in curves)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    body = []
    for tick in range(low, high + 1):
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick}</text>')
    body += [_polyline(curve, length, y) for curve in curves]
    return _figure("".join(body), description, x_label, [(curve.label, curve.style) for curve in curves])


def log_bars(
    groups: Sequence[str], series: Sequence[Line], levels: Sequence[Level], description: str, x_label: str
) -> str:
    """Groups of bars on a logarithmic axis, one bar of each series in a group."""
    values = [float(value) for line in series for value in line.values] + [level.value for level in levels]
    axis = _LogAxis([*values, min(value for value in values if value > 0) / 10], 1e-18)
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    width = min(slot * 0.8 / len(series), 34)
    base = HEIGHT - BOTTOM
    body = [axis.grid()]
    for index, group in enumerate(groups):
        middle = LEFT + slot * (index + 0.5)
        for number, line in enumerate(series):
            x = middle + (number - len(series) / 2) * width
            y = axis.y(float(line.values[index]))
            body.append(
                f'<rect class="bar {line.style}" x="{x + 1:.1f}" y="{y:.1f}" width="{width - 2:.1f}" '
                f'height="{max(base - y, 0.5):.1f}"><title>{escape(group)}, {escape(line.label)}: '
                f"{float(line.values[index]):.1e}</title></rect>"
            )
        body.append(f'<text class="tick" x="{middle:.1f}" y="{base + 14}" text-anchor="middle">{escape(group)}</text>')
    body.append(_levels(levels, axis))
    return _figure("".join(body), description, x_label, [(line.label, line.style) for line in series])


def log_dots(
    names: Sequence[str], series: Sequence[Line], levels: Sequence[Level], description: str, x_label: str
) -> str:
    """One dot per named place on a logarithmic axis, in order; `layers.N` of the names divides the horizontal axis."""
    values = [float(value) for line in series for value in line.values] + [level.value for level in levels]
    axis = _LogAxis(values, 1e-18)
    x = np.linspace(LEFT + 4, WIDTH - RIGHT - 4, len(names))
    body = [axis.grid()]
    layers = [".".join(name.split(".")[:2]) if name.startswith("layers.") else "" for name in names]
    for layer in filter(None, dict.fromkeys(layers)):
        first = x[layers.index(layer)] - 2
        body.append(f'<line class="grid" x1="{first:.1f}" x2="{first:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM + 4}"/>')
        body.append(f'<text class="tick" x="{first + 3:.1f}" y="{HEIGHT - BOTTOM + 14}">{escape(layer)}</text>')
    for line in series:
        body += [
            f'<circle class="dot {line.style}" cx="{x[i]:.1f}" cy="{axis.y(float(value)):.1f}" r="2.2">'
            f"<title>{escape(names[i])}, {escape(line.label)}: {float(value):.1e}</title></circle>"
            for i, value in enumerate(line.values)
        ]
    body.append(_levels(levels, axis))
    return _figure("".join(body), description, x_label, [(line.label, line.style) for line in series])
