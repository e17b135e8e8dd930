"""H2O with a forgetting factor: attention of long ago counts less, so that old tokens have no advantage of age.

Source: Jo and Shin 2024, arXiv:2407.20485; S <- alpha * S + A[q, :] for every query q, which is
S_k = sum over q of alpha^(now - q) A[q, k], summed over the query heads of a kv head; recent tokens and the best stay.
alpha = 1 is H2O, alpha = 0 is TOVA.
Differs: evicts in bursts of `period`. Prompt queries whose weight at the prompt's end is below 1e-4 count nothing, with
or without prefix hits: so a hit may cover all others, and the scores are those of the whole sum to within 1e-4 / (1 -
alpha).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from engine.compression.base import CompactionView, Evidence
from engine.compression.options import Periodic, option
from engine.compression.registry import register
from engine.compression.scoring import ScoringPolicy, newest, window_weights

NEGLIGIBLE = 1e-4  # weights of queries below this are not counted


@register("a2sf")
@dataclass(frozen=True, kw_only=True)
class A2SF(ScoringPolicy, Periodic):
    """H2O that forgets: attention counts less with every token since."""

    default_budget: ClassVar[int | None] = 256

    alpha: float = option(0.95, float, "what is left of attention after one more token", at_least=0, at_most=1)
    num_recent: int = option(16, int, "newest tokens, always kept", at_least=0, at_most=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than("num_recent", self.num_recent)

    @property
    def evidence(self) -> Evidence:
        return Evidence(decay=float(self.alpha))

    def num_queries(self, num_prompt_tokens: int, first_point: int) -> int:
        if self.alpha == 1:
            return num_prompt_tokens
        if self.alpha <= NEGLIGIBLE:
            return min(1, num_prompt_tokens)
        return min(num_prompt_tokens, math.ceil(math.log(NEGLIGIBLE) / math.log(self.alpha)))

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        """1 each: what is older is decayed as the evidence says."""
        start = num_prompt_tokens - self.num_queries(num_prompt_tokens, next_point)
        return window_weights(positions, start, next_point)

    def importance(self, view: CompactionView) -> Tensor:
        return view.scores[0]

    def protected(self, view: CompactionView) -> Tensor:
        return newest(view, self.num_recent)
