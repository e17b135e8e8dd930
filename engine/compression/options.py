"""Options of cache policies: dataclass fields that know their bounds, checked and described in one place. Torch-free.

Also the integer half that most policies share: a budget in tokens or as a share of the prompt, and the compaction
points that follow from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from engine.compression.base import CacheShape
from engine.errors import ConfigError
from engine.scheduling.compression import CachePlan, Realisation

MOST_TOKENS = 1 << 24  # no context is longer, and float32 counts tokens exactly up to here


class OptionError(ConfigError):
    """An option has a value outside of its bounds; `option` is its name."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


@dataclass(frozen=True, slots=True)
class Bounds:
    """What values an option takes. kind is one of int, float, bool and str; None is always "not given"."""

    kind: type
    about: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    odd: bool = False
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return ", ".join(self.choices)
        kind = ("odd " if self.odd else "") + ("integer" if self.kind is int else "number")
        limits = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most))
        return ", ".join([kind, *(f"{word} {limit}" for word, limit in limits if limit is not None)])

    def allow(self, value: Any) -> bool:
        if self.kind is bool or self.kind is str:
            return isinstance(value, self.kind) and (not self.choices or value in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            return False
        return (
            (not isinstance(value, float) or math.isfinite(value))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (not self.odd or value % 2 == 1)
        )


def option(default: Any, kind: type, about: str, **bounds: Any) -> Any:
    """A dataclass field that clients may set. bounds: see `Bounds`."""
    return field(default=default, metadata={"bounds": Bounds(kind, about, **bounds)})


@dataclass(frozen=True, slots=True)
class Described:
    """An option as errors and the documentation show it."""

    name: str
    default: str
    bounds: Bounds

    def __str__(self) -> str:
        return f"{self.name} ({self.bounds}; default {self.default})"


def describe(policy: type) -> tuple[Described, ...]:
    """The options of a policy class, in the order of its fields."""
    found = []
    for item in fields(policy):
        if "bounds" in item.metadata:
            default = getattr(policy, f"default_{item.name}", item.default)
            text = "none" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
            found.append(Described(item.name, text, item.metadata["bounds"]))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of all policies: fields made by `option` are checked when an instance is made."""

    name: ClassVar[str] = ""  # set by the registry

    def __post_init__(self) -> None:
        """Raises OptionError for a value out of bounds."""
        for item in fields(self):
            bounds, value = item.metadata.get("bounds"), getattr(self, item.name)
            if bounds is not None and not (value is None and item.default is None) and not bounds.allow(value):
                raise OptionError(item.name, f"{item.name} is {value!r}, allowed: {bounds}")


@dataclass(frozen=True, kw_only=True)
class Budgeted(Options):
    """Tokens kept per layer and kv head: a number, or a share of the prompt. Without either, the policy's default."""

    default_budget: ClassVar[int | None] = None
    default_ratio: ClassVar[float | None] = None

    budget: int | None = option(None, int, "tokens kept per layer and kv head", at_least=1, at_most=MOST_TOKENS)
    ratio: float | None = option(None, float, "instead of `budget`: share of the prompt's tokens", above=0, at_most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.ratio is not None:
            raise OptionError("ratio", f"budget ({self.budget}) and ratio ({self.ratio}) are both given, give one")

    def budget_for(self, num_prompt_tokens: int) -> int:
        """At least 1; a share is rounded to the nearest integer."""
        ratio = self.ratio
        if self.budget is None and ratio is None:
            if self.default_budget is not None:
                return self.default_budget
            ratio = self.default_ratio
        if ratio is None:
            assert self.budget is not None
            return self.budget
        return max(1, int(ratio * num_prompt_tokens + 0.5))

    def more_than(self, option_name: str, num_tokens: int) -> None:
        """Raises OptionError when the budget has no room for anything but what `option_name` protects."""
        budget = self.default_budget if self.budget is None and self.ratio is None else self.budget
        if budget is not None and budget <= num_tokens:
            raise OptionError(
                "budget",
                f"budget is {budget}, it must exceed {option_name} ({num_tokens}): raise the one or lower the other",
            )

    def num_queries(self, num_prompt_tokens: int, first_point: int) -> int:
        """How many of the prompt's last queries the scores at the points are made of."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Once(Budgeted):
    """Compresses at the end of the prompt when that exceeds the budget; what is generated is added and stays."""

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        budget = self.budget_for(num_prompt_tokens)
        return slots_plan(self, num_prompt_tokens, budget, num_prompt_tokens if num_prompt_tokens > budget else None, 0)


@dataclass(frozen=True, kw_only=True)
class Periodic(Budgeted):
    """Goes on while tokens are generated: the cache grows by `period` beyond the budget and is cut back to it.

    The papers evict one token per step. A burst per block of tokens moves as much memory as one step does, and the
    newest `period` tokens are seen in full, which only adds to what the papers keep.
    """

    period: int = option(
        16, int, "new tokens between two compactions; 0: only one, at the prompt's end", at_least=0, at_most=65536
    )

    def first_point(self, num_prompt_tokens: int, budget: int) -> int | None:
        if num_prompt_tokens > budget:
            return num_prompt_tokens
        return budget + self.period if self.period else None

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        budget = self.budget_for(num_prompt_tokens)
        return slots_plan(self, num_prompt_tokens, budget, self.first_point(num_prompt_tokens, budget), self.period)


def slots_plan(policy: Budgeted, num_prompt_tokens: int, kept: int, first_point: int | None, period: int) -> CachePlan:
    """The same number of tokens in every layer and kv head."""
    num_queries = 0 if first_point is None else policy.num_queries(num_prompt_tokens, first_point)
    return CachePlan(policy.name, Realisation.SLOTS, first_point, period, (kept,), num_queries)


def last_prompt_queries(num_prompt_tokens: int, first_point: int, window: int) -> int:
    """How many prompt queries are among the last `window` before the first point."""
    return max(0, num_prompt_tokens - max(0, first_point - window))
