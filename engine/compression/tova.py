"""Keep the tokens to which the newest query attends.

Source: Oren et al. 2024, arXiv:2401.06104 ("Transformers are Multi-State RNNs"); score_k = A[last, k], summed over the
query heads of a kv head.
Differs: evicts in bursts of `period` tokens by the query at the end of the burst. The paper averages over all heads of
a layer; so do we with `per_layer`, while the default chooses for every kv head, as all policies here do. The newest
token, which the paper does not treat apart, stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from engine.compression.base import CompactionView, Evidence
from engine.compression.options import Periodic, last_prompt_queries, option
from engine.compression.registry import register
from engine.compression.scoring import ScoringPolicy, newest, window_weights


@register("tova")
@dataclass(frozen=True, kw_only=True)
class TOVA(ScoringPolicy, Periodic):
    """The tokens to which the newest query attends."""

    default_budget: ClassVar[int | None] = 512

    per_layer: bool = option(False, bool, "one choice for all kv heads of a layer, by their sum")

    @property
    def evidence(self) -> Evidence:
        return Evidence(resets=True)

    def num_queries(self, num_prompt_tokens: int, first_point: int) -> int:
        return last_prompt_queries(num_prompt_tokens, first_point, 1)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return window_weights(positions, next_point - 1, next_point)

    def importance(self, view: CompactionView) -> Tensor:
        scores = view.scores[0]
        return scores.sum(1, keepdim=True).expand_as(scores) if self.per_layer else scores

    def protected(self, view: CompactionView) -> Tensor:
        return newest(view, 1)
