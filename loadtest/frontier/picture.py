"""One picture per task: quality against memory kept, a panel per mode, as SVG. Knows results only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as xml

from loadtest.frontier.policies import FULL, RANDOM
from loadtest.frontier.table import Column, Row, columns, is_perplexity

WIDTH, HEIGHT, GAP = 420, 320, 70  # of a panel, and between panels
LEFT, TOP, LEGEND = 60, 50, 190
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d")  # told apart by most eyes
DASHES = ("none", "6 3", "2 2")
INK, GREY, SMALL = "#222222", "#bbbbbb", "12"


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
    root = xml.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} {height}", "font-family": "sans-serif"},
    )
    xml.SubElement(root, "rect", {"width": str(width), "height": str(height), "fill": "white"})
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
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        styles[label] = {"stroke": COLOURS[i % len(COLOURS)], "stroke-width": "1.5", "stroke-dasharray": dash}
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
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            xml.SubElement(root, "polyline", {"points": line, "fill": "none", **style})
        for x, y in places if label != FULL else ():
            _marker(root, x, y, style)


def _axes(root: xml.Element, column: Column, scale: Scale) -> None:
    bottom, right = TOP + HEIGHT, scale.left + WIDTH
    _text(root, scale.left, TOP - 18, f"{column[0]}, {column[1]}", size="15")
    kept = scale.least_kept
    while kept <= 1.0:
        x = scale.x(kept)
        _line(root, x, TOP, x, bottom)
        _text(root, x, bottom + 18, f"{kept:.3g}", anchor="middle")
        kept *= 2
    for i in range(6):
        quality = scale.worst + (scale.best - scale.worst) * i / 5
        y = scale.y(quality)
        _line(root, scale.left, y, right, y)
        _text(root, scale.left - 6, y + 4, f"{quality:.3g}", anchor="end")
    _text(root, (scale.left + right) / 2, bottom + 40, "memory at the end, share of the full cache", anchor="middle")


def _legend(root: xml.Element, styles: dict[str, dict[str, str]], left: float) -> None:
    for i, (label, style) in enumerate(styles.items()):
        y = TOP + 8 + 17 * i
        _line(root, left, y, left + 26, y, style)
        if label != FULL:
            _marker(root, left + 13, y, style)
        _text(root, left + 32, y + 4, label)


def _marker(root: xml.Element, x: float, y: float, style: dict[str, str]) -> None:
    """A circle, a square or a triangle, as the line is dashed."""
    dash = style.get("stroke-dasharray", "none")
    if dash == "none":
        xml.SubElement(root, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3", "fill": style["stroke"]})
        return
    corners = ((-3, -3), (3, -3), (3, 3), (-3, 3)) if dash == DASHES[1] else ((0, -4), (4, 3), (-4, 3))
    points = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in corners)
    xml.SubElement(root, "polygon", {"points": points, "fill": style["stroke"]})


def _line(root: xml.Element, x1: float, y1: float, x2: float, y2: float, style: dict[str, str] | None = None) -> None:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    xml.SubElement(root, "line", {**ends, **(style or {"stroke": GREY, "stroke-width": "0.5"})})


def _text(root: xml.Element, x: float, y: float, text: str, *, anchor: str = "start", size: str = SMALL) -> None:
    places = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "font-size": size, "fill": INK}
    xml.SubElement(root, "text", places).text = text
