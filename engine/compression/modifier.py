"""The base class of modifiers: policies that change what another policy scores or chooses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from engine.compression.base import CacheShape, CompactionView, Evidence, Policy
from engine.compression.options import Options
from engine.compression.scoring import ScoringPolicy
from engine.scheduling.compression import CachePlan


class Modifiable(Policy, Protocol):
    """A policy that tells scores and protection apart, see `ScoringPolicy`."""

    def temperatures(self, positions: Tensor, num_prompt_tokens: int) -> Tensor: ...

    def importance(self, view: CompactionView) -> Tensor: ...

    def protected(self, view: CompactionView) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Modifier(ScoringPolicy, Options):
    """Everything that is not overridden is the base's."""

    base: Modifiable = field()

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return replace(self.base.plan(num_prompt_tokens, shape), policy=self.name)

    @property
    def evidence(self) -> Evidence | None:
        return self.base.evidence

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return self.base.query_weights(positions, num_prompt_tokens, next_point)

    def temperatures(self, positions: Tensor, num_prompt_tokens: int) -> Tensor:
        return self.base.temperatures(positions, num_prompt_tokens)

    def importance(self, view: CompactionView) -> Tensor:
        return self.base.importance(view)

    def protected(self, view: CompactionView) -> Tensor:
        return self.base.protected(view)
