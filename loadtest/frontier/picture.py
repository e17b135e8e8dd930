"""One picture per task: quality against memory kept, a panel per mode, as SVG. Knows results only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as xml

from loadtest import svg
from loadtest.frontier.policies import FULL, RANDOM
from loadtest.frontier.table import Column, Row, columns, is_perplexity
from loadtest.svg import INK

WIDTH, HEIGHT, GAP = 420, 320, 70  # of a panel, and between panels
LEFT, TOP, LEGEND = 60, 50, 190


@dataclass(frozen=True)
class Scale:
    """Memory is shown by its logarithm; quality from bottom to top, perplexity with the best on top."""

    left: float
    least_kept: float
    worst: float
    best: float

    def x(self, kept: float) -> float:
        share = 1 - math.log2(min(max(kept, self.least_kept), 1.0)) / math.log2(self.least_kept)
        return self.left + share * WIDTH

    def y(self, quality: float) -> float:
        share = (quality - self.worst) / (self.best - self.worst)
        return TOP + (1 - min(max(share, 0.0), 1.0)) * HEIGHT


def draw(task: str, rows: Sequence[Row]) -> str:
    """The picture of one task as SVG text."""
    panels = [column for column in columns(rows) if column[0] == task]
    width = LEFT + len(panels) * (WIDTH + GAP) + LEGEND
    height = TOP + HEIGHT + 60
    root = svg.canvas(width, height)
    drawn = {row.setting.label for row in rows for column in panels if column in row.quality}
    styles = {label: style for label, style in _styles(rows).items() if label in drawn}
    for i, column in enumerate(panels):
        _panel(root, column, rows, LEFT + i * (WIDTH + GAP), styles)
    _legend(root, styles, LEFT + len(panels) * (WIDTH + GAP) - GAP + 20)
    return xml.tostring(root, encoding="unicode") + "\n"


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, str]]:
    """Colour, dashes and width of each policy's line, the same in every picture."""
    labels = [label for label in dict.fromkeys(row.setting.label for row in rows) if label not in (FULL, RANDOM)]
    styles = {RANDOM: {"stroke": INK, "stroke-width": "3"}, FULL: {"stroke": INK, "stroke-dasharray": "8 4"}}
    for i, label in enumerate(labels):
        styles[label] = svg.line_style(i)
    return styles


def _panel(
    root: xml.Element, column: Column, rows: Sequence[Row], left: float, styles: dict[str, dict[str, str]]
) -> None:
    found = {row.setting: row.quality[column] for row in rows if column in row.quality}
    values = [quality.quality for quality in found.values()]
    least = 2.0 ** math.floor(math.log2(max(1 / 64, min(quality.kept for quality in found.values()))))
    if is_perplexity(column):
        scale = Scale(left, least, worst=max(values) * 1.05, best=min(values) * 0.95)
    else:
        scale = Scale(left, least, worst=0.0, best=1.0)
    _axes(root, column, scale)
    for label, style in styles.items():
        points = sorted((quality.kept, quality.quality) for one, quality in found.items() if one.label == label)
        if label == FULL and points:
            points = [(scale.least_kept, points[0][1]), (1.0, points[0][1])]
        places = [(scale.x(kept), scale.y(quality)) for kept, quality in points]
        if len(places) > 1:
            svg.polyline(root, places, style)
        for x, y in places if label != FULL else ():
            svg.marker(root, x, y, style)


def _axes(root: xml.Element, column: Column, scale: Scale) -> None:
    bottom, right = TOP + HEIGHT, scale.left + WIDTH
    svg.text(root, scale.left, TOP - 18, f"{column[0]}, {column[1]}", size="15")
    kept = scale.least_kept
    while kept <= 1.0:
        x = scale.x(kept)
        svg.line(root, x, TOP, x, bottom)
        svg.text(root, x, bottom + 18, f"{kept:.3g}", anchor="middle")
        kept *= 2
    for i in range(6):
        quality = scale.worst + (scale.best - scale.worst) * i / 5
        y = scale.y(quality)
        svg.line(root, scale.left, y, right, y)
        svg.text(root, scale.left - 6, y + 4, f"{quality:.3g}", anchor="end")
    svg.text(root, (scale.left + right) / 2, bottom + 40, "memory at the end, share of the full cache", anchor="middle")


def _legend(root: xml.Element, styles: dict[str, dict[str, str]], left: float) -> None:
    for i, (label, style) in enumerate(styles.items()):
        y = TOP + 8 + 17 * i
        svg.line(root, left, y, left + 26, y, style)
        if label != FULL:
            svg.marker(root, left + 13, y, style)
        svg.text(root, left + 32, y + 4, label)
