"""One plot of lines over two axes, as SVG. Knows no load test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as xml

from loadtest import svg

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 420, 240, 64, 36, 16, 44
LEGEND_ROW = 16
MAX_TICKS = 6
LABEL_CHARS = 40


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Axis:
    """Positive values on a logarithmic axis, any on a linear one."""

    low: float
    high: float
    start: float  # pixels
    length: float
    is_log: bool

    def place(self, value: float) -> float:
        return self.start + self.length * (self._at(value) - self._at(self.low)) / (
            self._at(self.high) - self._at(self.low)
        )

    def ticks(self) -> list[float]:
        if self.is_log:
            first, last = math.ceil(math.log2(self.low) - 1e-9), math.floor(math.log2(self.high) + 1e-9)
            stride = max(1, math.ceil((last - first + 1) / MAX_TICKS))
            return [2.0**power for power in range(first, last + 1, stride)]
        step = _round_step((self.high - self.low) / MAX_TICKS)
        lowest, highest = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [count * step for count in range(lowest, highest + 1)]

    def _at(self, value: float) -> float:
        return math.log2(max(value, self.low)) if self.is_log else value


def draw(title: str, x_label: str, y_label: str, lines: Sequence[Line], *, log_x: bool = False) -> str:
    """SVG text; the vertical axis starts at 0. Without any point the plot says so."""
    shown = [line for line in lines if line.points]
    points = [point for line in shown for point in line.points]
    bottom = TOP + HEIGHT
    root = svg.canvas(LEFT + WIDTH + RIGHT, bottom + BOTTOM + LEGEND_ROW * ((len(shown) + 1) // 2))
    svg.text(root, LEFT, TOP - 14, title, size="15")
    if not points:
        svg.text(root, LEFT + WIDTH / 2, TOP + HEIGHT / 2, "no data", anchor="middle")
        return xml.tostring(root, encoding="unicode")
    across = _axis([x for x, _ in points], LEFT, WIDTH, log_x)
    upward = _axis([0.0, *(y for _, y in points)], bottom, -HEIGHT, False)
    for tick in across.ticks():
        x = across.place(tick)
        svg.line(root, x, TOP, x, bottom)
        svg.text(root, x, bottom + 16, f"{tick:.4g}", anchor="middle")
    for tick in upward.ticks():
        y = upward.place(tick)
        svg.line(root, LEFT, y, LEFT + WIDTH, y)
        svg.text(root, LEFT - 6, y + 4, f"{tick:.4g}", anchor="end")
    svg.text(root, LEFT + WIDTH, bottom + 34, x_label, anchor="end")
    svg.text(root, LEFT + WIDTH, TOP - 14, y_label, anchor="end")
    for i, line in enumerate(shown):
        _draw_line(root, line, svg.line_style(i), across, upward)
        _draw_label(
            root, line.label, svg.line_style(i), LEFT + i % 2 * WIDTH / 2, bottom + BOTTOM + i // 2 * LEGEND_ROW
        )
    return xml.tostring(root, encoding="unicode")


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points of a distribution given by its evenly spaced quantiles: value against share in per cent."""
    return [(value, 100 * i / (len(values) - 1)) for i, value in enumerate(values)] if len(values) > 1 else []


def _draw_line(root: xml.Element, line: Line, style: svg.Style, across: _Axis, upward: _Axis) -> None:
    places = [(across.place(x), upward.place(y)) for x, y in line.points]
    svg.polyline(root, places, style)
    if len(places) < 20:
        for x, y in places:
            svg.marker(root, x, y, style)


def _draw_label(root: xml.Element, label: str, style: svg.Style, x: float, y: float) -> None:
    svg.line(root, x, y, x + 22, y, style)
    svg.text(root, x + 28, y + 4, label if len(label) <= LABEL_CHARS else label[: LABEL_CHARS - 1] + "…")


def _axis(values: Sequence[float], start: float, length: float, is_log: bool) -> _Axis:
    positive = [value for value in values if value > 0] if is_log else list(values)
    low, high = (min(positive), max(positive)) if positive else (1.0, 2.0)
    if high <= low:
        low, high = (low / 2, low * 2) if is_log else (low, low + 1)
    return _Axis(low, high, start, length, is_log)


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))
