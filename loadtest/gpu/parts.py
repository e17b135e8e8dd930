"""The parts of `make gpu`, in the order in which they run, and the seconds that each may take. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """`function` of module `loadtest.gpu.<module>` takes a `record.Run`."""

    name: str
    module: str
    function: str
    seconds: int

    def load(self) -> Callable[[Any], None]:
        function: Callable[[Any], None] = getattr(importlib.import_module(f"loadtest.gpu.{self.module}"), self.function)
        return function


# The sum of the seconds stays below nine minutes; a part starts in a fresh process, whose imports count.
PARTS = (
    Part("limits", "checks", "measure_limits", 20),
    Part("checks", "checks", "run_checks", 110),
    Part("decode", "attention", "measure_decode", 60),
    Part("prefill", "attention", "measure_prefill", 35),
    Part("operations", "operations", "measure_operations", 45),
    Part("engine", "engine", "measure_engine", 80),
    Part("moe", "engine", "measure_moe", 50),
    Part("memory", "memory", "measure_memory", 60),
    Part("quest", "memory", "measure_quest", 25),
    Part("speculation", "speculation", "measure_speculation", 20),
    Part("transformers", "continuous", "measure_transformers", 30),
)


def chosen(names: list[str] | None) -> list[Part]:
    """Those of these names in the usual order, all for None. Every other part needs the limits: they come along."""
    known = {part.name for part in PARTS}
    if unknown := sorted(set(names or ()) - known):
        raise ValueError(f"unknown part {unknown[0]!r}; known: {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if names is None or part.name in names or part.name == "limits"]
