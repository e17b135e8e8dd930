"""Drop, in large bursts, the tokens that the last queries have ignored most often.

Source: Liu et al. 2023, arXiv:2305.17118, algorithm 2: when a cache is full, count for each token how many of the last
w queries attend to it with less than the mean, 1 / (visible keys); of equal counts the older goes; the last r stay.
Decided where the paper leaves it open or we could not confirm it: a burst drops half of the budget (`drop_share`); all
layers have the same budget (the paper gives later ones more); a query counts for the tokens that it sees.
Differs: the count starts anew after each burst, so that the window is never longer than a burst. `budget` is the size
at which a cache is full, as in the paper: it holds between (1 - drop_share) * budget and budget tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from engine.compression.base import CacheShape, CompactionView, Evidence
from engine.compression.options import Budgeted, last_prompt_queries, option, slots_plan
from engine.compression.registry import register
from engine.compression.scoring import ScoringPolicy, newest, window_weights
from engine.scheduling.compression import CachePlan


@register("scissorhands")
@dataclass(frozen=True, kw_only=True)
class Scissorhands(ScoringPolicy, Budgeted):
    """Drops in bursts what the last queries ignored most often."""

    default_ratio: ClassVar[float | None] = 0.5

    window: int = option(400, int, "last queries that are counted", at_least=1, at_most=65536)
    drop_share: float = option(0.5, float, "share of a full cache that a burst drops", above=0, at_most=0.9)
    num_recent: int = option(10, int, "newest tokens, always kept", at_least=0, at_most=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than("num_recent", self.num_recent)

    @property
    def evidence(self) -> Evidence:
        return Evidence(kind="count", resets=True)

    def num_queries(self, num_prompt_tokens: int, first_point: int) -> int:
        return last_prompt_queries(num_prompt_tokens, first_point, self.window)

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        budget = self.budget_for(num_prompt_tokens)
        burst = max(1, min(budget - 1, int(self.drop_share * budget + 0.5)))
        first_point = max(num_prompt_tokens, budget + 1)
        return slots_plan(self, num_prompt_tokens, max(1, budget - burst), first_point, burst)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return window_weights(positions, next_point - self.window, next_point)

    def importance(self, view: CompactionView) -> Tensor:
        return -view.scores[0]

    def protected(self, view: CompactionView) -> Tensor:
        return newest(view, self.num_recent)
