"""The table of `kvasir bench --speculation` as markdown, and its place in a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BEGIN, END = "<!-- speculation table: begin -->", "<!-- speculation table: end -->"
OFF = "off"
NAMES = {
    "chat": "Chat",
    "code": "Code completion",
    "edit": "Copy-heavy editing",
    "summary": "Summarising",
    "json": "JSON after a schema",
}


@dataclass(frozen=True)
class Gain:
    """Tokens per second to those without speculation; tokens per step that checked a guess, None when none did."""

    ratio: float
    acceptance_length: float | None


def markdown(
    gains: Mapping[tuple[str, str, int], Gain],
    missing: Sequence[str],
    kinds: Sequence[str],
    batches: Sequence[int],
    about: str,
) -> str:
    """One table per kind of work: a row for each setting, a column for each batch size."""
    labels = [label for label in dict.fromkeys(label for label, _, _ in gains) if label != OFF]
    parts = [about]
    for kind in kinds:
        best = {
            batch: max((g.ratio for (_, k, b), g in gains.items() if (k, b) == (kind, batch)), default=0.0)
            for batch in batches
        }
        parts.append(f"**{NAMES.get(kind, kind)}**\n")
        parts[-1] += "\n| drafter | " + " | ".join(f"batch {batch}" for batch in batches) + " |"
        parts[-1] += "\n|---" + "|---" * len(batches) + "|"
        for label in labels:
            cells = [_cell(gains.get((label, kind, batch)), best[batch]) for batch in batches]
            parts[-1] += f"\n| {_name(label)} | " + " | ".join(cells) + " |"
        for label in missing:
            parts[-1] += f"\n| {_name(label)} | not offered |" + " |" * (len(batches) - 1)
    return "\n\n".join(parts)


def replaced(text: str, table: str) -> str:
    """The document with this table. Raises ValueError when it has no place for it."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document has no lines {BEGIN} and {END}; add them where the table is to stand")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def _name(label: str) -> str:
    name, separator, budget = label.partition(", ")
    return f"`{name}`{separator}{budget}" + (" budget" if budget else "")


def _cell(gain: Gain | None, best: float) -> str:
    if gain is None:
        return "not measured"
    ratio = f"**{gain.ratio:.2f}**" if gain.ratio >= max(best, 1.0) else f"{gain.ratio:.2f}"
    length = "none" if gain.acceptance_length is None else f"{gain.acceptance_length:.2f}"
    return f"{ratio} ({length})"
