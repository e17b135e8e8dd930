"""Shapes of a plot as SVG elements, shared by all pictures. Knows no data."""

from __future__ import annotations

from xml.etree import ElementTree as xml

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d")  # told apart by most eyes
DASHES = ("none", "6 3", "2 2")
INK, GREY, SMALL = "#222222", "#bbbbbb", "12"

Style = dict[str, str]


def canvas(width: float, height: float) -> xml.Element:
    """A white page of this size, in pixels where nothing else is said."""
    root = xml.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width:g} {height:g}", "font-family": "sans-serif"},
    )
    xml.SubElement(root, "rect", {"width": f"{width:g}", "height": f"{height:g}", "fill": "white"})
    return root


def line_style(index: int) -> Style:
    """Of the n-th line of a plot: colours first, then dashes."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"stroke": COLOURS[index % len(COLOURS)], "stroke-width": "1.5", "stroke-dasharray": dash}


def polyline(root: xml.Element, places: list[tuple[float, float]], style: Style) -> None:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    xml.SubElement(root, "polyline", {"points": points, "fill": "none", **style})


def marker(root: xml.Element, x: float, y: float, style: Style) -> None:
    """A circle, a square or a triangle, as the line is dashed."""
    dash = style.get("stroke-dasharray", "none")
    if dash == "none":
        xml.SubElement(root, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3", "fill": style["stroke"]})
        return
    corners = ((-3, -3), (3, -3), (3, 3), (-3, 3)) if dash == DASHES[1] else ((0, -4), (4, 3), (-4, 3))
    points = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in corners)
    xml.SubElement(root, "polygon", {"points": points, "fill": style["stroke"]})


def line(root: xml.Element, x1: float, y1: float, x2: float, y2: float, style: Style | None = None) -> None:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    xml.SubElement(root, "line", {**ends, **(style or {"stroke": GREY, "stroke-width": "0.5"})})


def text(root: xml.Element, x: float, y: float, words: str, *, anchor: str = "start", size: str = SMALL) -> None:
    places = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "font-size": size, "fill": INK}
    xml.SubElement(root, "text", places).text = words
