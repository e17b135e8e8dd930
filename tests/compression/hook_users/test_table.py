"""What the documentation says goes with what is what the engine does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.compression.resolver import Policies
from engine.config import CacheConfig
from engine.errors import InvalidParameter
from engine.models.batch import KVSpec
from engine.scheduling.compression import CachePlan

DOCS = (Path(__file__).resolve().parents[3] / "docs" / "policies.md").read_text().split("### What goes with what")[1]
ROWS = [
    [cell.strip(" `") for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", DOCS, re.MULTILINE)
]
SPEC = KVSpec(4, 2, 32, 32)


def plan_of(name: str, *, windows: tuple[int, ...] = (), shows_hidden: bool = True, **options: str) -> CachePlan | None:
    """Of a prompt that exceeds all budgets; None where the engine refuses."""
    policies = Policies(CacheConfig(), replace(SPEC, windows=windows), torch.float32, shows_hidden=shows_hidden)
    try:
        found = policies.resolve({"name": name, **options}, 5000)
    except InvalidParameter:
        return None
    assert found is not None
    return found.plan


@pytest.mark.parametrize("row", ROWS[2:], ids=lambda row: row[1])
def test_the_table_is_true(row: list[str]) -> None:
    _, name, *cells = row
    plan = plan_of(name)
    assert plan is not None
    facts = {
        "its prompt is shared": not plan.is_private,
        "sliding windows": plan_of(name, windows=(0, 8, 0, 8)) is not None,
        "models through transformers": plan_of(name, shows_hidden=False) is not None,
        "format": plan_of(name, format="int8") is not None,
    }
    expected = {what: "yes" if holds else "no" for what, holds in facts.items()}
    expected["guesses"] = "chains" if plan.steps_singly else "trees"
    assert dict(zip(ROWS[0][2:], cells, strict=True)) == expected


def test_every_kind_of_policy_is_in_it() -> None:
    assert len(ROWS) == 2 + 10
