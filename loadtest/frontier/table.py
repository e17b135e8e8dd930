"""The frontier as one table for people and as JSON. Knows results only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtest.frontier.engine import Cost, Quality
from loadtest.frontier.policies import Setting

Column = tuple[str, str]  # task and mode


@dataclass
class Row:
    """What one policy at one budget came to."""

    setting: Setting
    quality: dict[Column, Quality] = field(default_factory=dict)
    cost: Cost | None = None

    @property
    def budget(self) -> str:
        return "" if self.setting.ratio is None else f"{self.setting.ratio:g}"

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.setting.label,
            "ratio": self.setting.ratio,
            "quality": {"/".join(column): asdict(found) for column, found in self.quality.items()},
            "cost": None if self.cost is None else asdict(self.cost),
        }


def columns(rows: Sequence[Row]) -> list[Column]:
    """Tasks and modes in the order of the first row, which has all of them."""
    return list(rows[0].quality)


def markdown(rows: Sequence[Row]) -> str:
    """One row per policy and budget. Bytes per token are of the first column's task."""
    found = columns(rows)
    heads = ["policy", "share", *(f"{task}, {mode}" for task, mode in found)]
    heads += ["bytes per token", "peak blocks", "steady blocks", "tokens/s", "TTFT ms"]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for row in rows:
        cells = [f"`{row.setting.label}`", row.budget]
        cells += [_quality(row.quality.get(column), column) for column in found]
        first = row.quality.get(found[0])
        cells.append("" if first is None else f"{first.bytes_per_token:.0f}")
        if row.cost is None:
            cells += [""] * 4
        else:
            cost = row.cost
            cells += [f"{cost.peak_blocks}", f"{cost.steady_blocks}", f"{cost.tokens_per_s:.0f}", f"{cost.ttft_ms:.0f}"]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _quality(found: Quality | None, column: Column) -> str:
    if found is None:
        return ""
    return f"{found.quality:.1f}" if is_perplexity(column) else f"{found.quality:.2f}"


def is_perplexity(column: Column) -> bool:
    return column[0] == "perplexity"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
