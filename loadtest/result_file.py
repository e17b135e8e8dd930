"""The file of results: one JSON document whose form has a version. Written by a measurement, read to compare several.

schema        "kvasir-bench/2"
environment   versions, hardware, command, commit
settings      the options of the measurement
cells         per endpoint and level: figures, each round's figures and timeline, quantiles of three latencies
ratios        of every endpoint to the first, medians over rounds
stopped       per endpoint of a sweep: why it ended
warm_up       per endpoint: requests before the measurement, and how many of them failed
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.measure import RATIOS, Cell, figure_ratio, ratios
from loadtest.report import Goals, Summary, quantiles, summarize

SCHEMA = "kvasir-bench/2"


class ResultsError(ValueError):
    """A file of results cannot be read or written; the message says what to do."""


@dataclass
class Results:
    environment: dict[str, Any]
    settings: dict[str, Any]
    cells: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    stopped: dict[str, str] = field(default_factory=dict)
    warm_up: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, cells: Sequence[Cell], goals: Goals) -> None:
        self.cells += [cell_json(cell, goals) for cell in cells]
        self.ratios += [asdict(ratio) for ratio in ratios(cells, goals)]

    @property
    def failed(self) -> int:
        return sum(int(cell["figures"]["failed"]) for cell in self.cells)


def cell_json(cell: Cell, goals: Goals) -> dict[str, Any]:
    run = cell.run()
    return {
        "endpoint": cell.endpoint,
        "level": {**asdict(cell.level), "label": cell.level.label, "load": cell.level.load},
        "figures": summarize(run, goals).to_json(),
        "rounds": [summarize(one, goals).to_json() for one in cell.rounds],
        "quantiles": quantiles(run),
        "timelines": [timeline.to_json() for timeline in cell.timelines],
    }


def write(results: Results, path: Path) -> None:
    content = {"schema": SCHEMA, **asdict(results)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"cannot write {path}: {error.strerror}; name another folder with --out") from error


def read(path: Path) -> Results:
    """Raises ResultsError for a file that is none, or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"cannot read {path}: {error}; give a results.json of `kvasir bench`") from error
    schema = content.pop("schema", None) if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ResultsError(f"{path} has schema {schema!r}; this version compares {SCHEMA!r}: measure again")
    return Results(**content)


def compare(paths: Sequence[Path]) -> Results:
    """The cells of several files together, each endpoint named after its file, with ratios to the first file.

    Those runs did not take turns, so that what else the machine did is in the ratios.
    """
    files = [read(path) for path in paths]
    names = [path.stem if path.stem != "results" else path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    joined = Results(files[0].environment, {"compared": names})
    for name, results in zip(names, files, strict=True):
        several = len({cell["endpoint"] for cell in results.cells}) > 1
        for cell in results.cells:
            joined.cells.append({**cell, "endpoint": f"{name}: {cell['endpoint']}" if several else name})
    joined.ratios = _plain_ratios(joined.cells)
    return joined


def _plain_ratios(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    base: dict[str, Summary] = {}
    found = []
    for cell in cells:
        label, figures = cell["level"]["label"], Summary(**cell["figures"])
        if label not in base:
            base[label] = figures
            continue
        for figure in RATIOS:
            ratio = figure_ratio(figure, base[label], figures)
            if ratio is not None:
                same = {"median": ratio, "least": ratio, "most": ratio, "rounds": 1}
                found.append({"endpoint": cell["endpoint"], "level": label, "figure": figure, **same})
    return found
