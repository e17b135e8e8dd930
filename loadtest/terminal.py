"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.measure import RATIOS
from loadtest.report import Summary, troubles
from loadtest.result_file import Results

HEADS = (
    "endpoint",
    "load",
    "ok",
    "failed",
    "output tok/s",
    "req/s",
    "goodput",
    "TTFT p50 / p99",
    "ITL p50 / p99",
    "latency p50 / p99",
)


def cell_row(cell: Mapping[str, Any]) -> list[str]:
    """The columns of HEADS; latencies in milliseconds."""
    figures = cell["figures"]
    done = figures["requests"] - figures["failed"]
    pairs = [figures[name] for name in ("ttft_ms", "inter_token_ms", "latency_ms")]
    return [
        cell["endpoint"],
        cell["level"]["label"],
        str(done),
        str(figures["failed"]),
        f"{figures['output_tokens_per_s']:.1f}",
        f"{figures['requests_per_s']:.2f}",
        f"{figures['goodput_requests_per_s']:.2f}",
        *(f"{pair['p50']:.1f} / {pair['p99']:.1f}" for pair in pairs),
    ]


def ratio_rows(results: Results) -> list[list[str]]:
    """One row per endpoint and level: figures as multiples of the first endpoint's, with the extremes of the rounds."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for ratio in results.ratios:
        spread = f" ({ratio['least']:.2f}-{ratio['most']:.2f})" if ratio["rounds"] > 1 else ""
        row = rows.setdefault((ratio["endpoint"], ratio["level"]), {})
        row[ratio["figure"]] = f"{ratio['median']:.2f}{spread}"
    return [[*place, *(row.get(figure, "") for figure in RATIOS)] for place, row in rows.items()]


def text(results: Results) -> str:
    parts = [grid(HEADS, [cell_row(cell) for cell in results.cells])]
    for cell in results.cells:
        place = f"{cell['endpoint']}, {cell['level']['label']}"
        parts += [f"{place}: {line}" for line in troubles(Summary(**cell["figures"]))]
    for name, figures in results.warm_up.items():
        if figures["failed"]:
            parts.append(f"{name}: {figures['failed']} of {figures['requests']} requests before the measurement failed")
    if results.ratios:
        first = results.cells[0]["endpoint"]
        parts.append(f"\nAs multiples of {first} (above 1 is better; medians over rounds, extremes in brackets)")
        parts.append(grid(("endpoint", "load", *RATIOS), ratio_rows(results)))
    parts += [f"{endpoint}: the sweep ended: {reason}" for endpoint, reason in results.stopped.items()]
    return "\n".join(parts)


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; numbers to the right."""
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (heads, *rows)
    ]
    return "\n".join(lines)
