"""Results as one HTML page that needs nothing else: tables, plots as SVG, where it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from loadtest.chart import Line, cumulative, draw
from loadtest.measure import RATIOS
from loadtest.report import Summary, troubles
from loadtest.result_file import Results, ResultsError
from loadtest.terminal import HEADS, cell_row, ratio_rows

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 1080px; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .7em; border-bottom: 1px solid #ddd }
td, th { text-align: right } td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left }
.plots { display: flex; flex-wrap: wrap; gap: 1em } .plots svg { width: 500px; max-width: 100% }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto } .trouble { color: #a00 }
"""
DISTRIBUTIONS = {"ttft_ms": "Time to first token", "inter_token_ms": "Inter-token latency", "latency_ms": "Latency"}
RATES = {
    "output_tokens_per_s": ("Throughput", "output tokens/s"),
    "requests_per_s": ("Requests answered", "requests/s"),
    "goodput_requests_per_s": ("Goodput", "requests/s within the limits"),
}
TIMELINES = (
    ("Batch and queue", ("batch size", "running", "waiting")),
    ("Cache blocks", ("blocks in use", "blocks kept")),
    ("Cache in use", ("cache in use",)),
)


def write(results: Results, path: Path, title: str = "kvasir bench") -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html(results, title), encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror}; name another folder with --out") from error


def html(results: Results, title: str) -> str:
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_headline(results))}</p>"]
    body.append(_table(HEADS, [cell_row(cell) for cell in results.cells]))
    body.append("<p>Times are milliseconds and count from when a request was due. ITL is the time between pieces.</p>")
    body += [f'<p class="trouble">{escape(line)}</p>' for line in _troubles(results)]
    body += [f"<p>{escape(name)}: the sweep ended: {escape(reason)}</p>" for name, reason in results.stopped.items()]
    if results.ratios:
        first = escape(results.cells[0]["endpoint"])
        body.append(f"<h2>Compared</h2><p>Multiples of {first}; above 1 is better. Extremes of the rounds in brackets.")
        body.append(_table(("endpoint", "load", *RATIOS), ratio_rows(results)))
    body.append("<h2>Latency</h2>" + _plots(_distributions(results.cells)))
    body.append("<h2>Throughput against load</h2>" + _plots(_rates(results.cells)))
    body.append("<h2>While it ran</h2>" + "".join(_timelines(cell) for cell in results.cells))
    facts = {"environment": results.environment, "settings": results.settings}
    body.append(f"<h2>Where and how</h2><pre>{escape(json.dumps(facts, indent=1))}</pre>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _headline(results: Results) -> str:
    found = results.environment
    return (
        f"{found['time']}, {found['cores']} cores of {found['processor']}, Kvasir {found['kvasir']}, {found['command']}"
    )


def _troubles(results: Results) -> list[str]:
    return [
        f"{cell['endpoint']}, {cell['level']['label']}: {line}"
        for cell in results.cells
        for line in troubles(Summary(**cell["figures"]))
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(heads, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _plots(pictures: Sequence[str]) -> str:
    return '<div class="plots">' + "".join(pictures) + "</div>"


def _distributions(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        draw(
            name,
            "ms",
            "% of all",
            [Line(_label(cell, cells), cumulative(cell["quantiles"][key])) for cell in cells],
            log_x=True,
        )
        for key, name in DISTRIBUTIONS.items()
    ]


def _rates(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    unit = "requests in flight" if cells and cells[0]["level"]["concurrency"] is not None else "requests/s offered"
    endpoints = list(dict.fromkeys(cell["endpoint"] for cell in cells))
    pictures = []
    for key, (name, y_label) in RATES.items():
        lines = [
            Line(
                endpoint,
                [(cell["level"]["load"], cell["figures"][key]) for cell in cells if cell["endpoint"] == endpoint],
            )
            for endpoint in endpoints
        ]
        pictures.append(draw(name, unit, y_label, lines, log_x=True))
    return pictures


def _timelines(cell: Mapping[str, Any]) -> str:
    """A row of pictures for each round."""
    parts = []
    for number, timeline in enumerate(cell["timelines"], start=1):
        round_name = f", round {number}" if len(cell["timelines"]) > 1 else ""
        parts.append(f"<h3>{escape(cell['endpoint'])}, {escape(cell['level']['label'])}{round_name}</h3>")
        if timeline["note"]:
            parts.append(f"<p>{escape(timeline['note'])}</p>")
        parts.append(_plots(_timeline(timeline)))
    return "".join(parts)


def _timeline(timeline: Mapping[str, Any]) -> list[str]:
    pictures = []
    for title, names in TIMELINES:
        lines = [
            Line(
                name,
                [
                    (at, value)
                    for at, value in zip(timeline["times_s"], timeline["series"][name], strict=True)
                    if value is not None
                ],
            )
            for name in names
            if name in timeline["series"]
        ]
        if lines:
            pictures.append(draw(title, "s", "", lines))
    return pictures


def _label(cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> str:
    is_alone = len({other["endpoint"] for other in cells}) == 1
    return str(cell["level"]["label"]) if is_alone else f"{cell['endpoint']}, {cell['level']['label']}"
