"""Keep the tokens that have received the most attention (heavy hitters), and the newest.

Source: Zhang et al. 2023, arXiv:2306.14048; S_k = sum over all queries q of A[q, k], per layer and kv head (summed over
the query heads of its group). The cache has room for k_h heavy and k_r recent tokens.
Differs: evicts in bursts of `period` tokens, not one per step; positions stay (the paper's streaming variant renumbers
them). The sum starts at the first prompt token, so the prompt cannot come from the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.compression.base import CompactionView, Evidence
from engine.compression.options import Periodic, option
from engine.compression.registry import register
from engine.compression.scoring import ScoringPolicy, newest, share


@register("h2o")
@dataclass(frozen=True, kw_only=True)
class H2O(ScoringPolicy, Periodic):
    """The tokens that received the most attention from all queries so far, and the newest."""

    default_ratio: ClassVar[float | None] = 0.2

    recent_share: float = option(0.5, float, "share of the budget that is for the newest tokens", at_least=0, at_most=1)

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def num_queries(self, num_prompt_tokens: int, first_point: int) -> int:
        return num_prompt_tokens

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return torch.ones(1, len(positions), device=positions.device)

    def importance(self, view: CompactionView) -> Tensor:
        return view.scores[0]

    def protected(self, view: CompactionView) -> Tensor:
        return newest(view, share(view.num_kept, self.recent_share))
