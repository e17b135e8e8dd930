"""Keep what the end of the prompt looks at, with its neighbours, and the end itself. Once, when the prompt is read.

Source: Li et al. 2024, arXiv:2404.14469. With w the window and n prompt tokens: a_k = sum over the last w queries of
A[q, k] for k < n - w, smoothed over `kernel` neighbours (zeros beyond the ends count); the best budget - w of them
stay, and the last w.
Differs: one choice per kv head (the sum over the query heads of its group, before smoothing; the reference repeats keys
for every query head first). The reference repeats nothing in decode, nor do we: generated tokens are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from engine.compression.base import CompactionView, Evidence
from engine.compression.options import Budgeted, Once, last_prompt_queries, option
from engine.compression.registry import register
from engine.compression.scoring import ScoringPolicy, newest, pool, window_weights


@dataclass(frozen=True, kw_only=True)
class ObservationWindow(ScoringPolicy, Budgeted):
    """What SnapKV and its relatives share: the window, its scores and their smoothing."""

    default_budget: ClassVar[int | None] = 1024

    window: int = option(32, int, "last prompt tokens: their queries choose, and they stay", at_least=1, at_most=4096)
    kernel: int = option(5, int, "neighbours over which scores are smoothed; 1: off", at_least=1, at_most=255, odd=True)
    pooling: str = option("avg", str, "how they are smoothed", choices=("avg", "max"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than("window", self.window)

    @property
    def evidence(self) -> Evidence:
        return Evidence()

    def num_queries(self, num_prompt_tokens: int, first_point: int) -> int:
        return last_prompt_queries(num_prompt_tokens, first_point, self.window)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return window_weights(positions, num_prompt_tokens - self.window, num_prompt_tokens)

    def importance(self, view: CompactionView) -> Tensor:
        before_window = view.positions < view.num_prompt_tokens - self.window
        return pool(view.scores[0] * before_window, self.kernel, "avg" if self.pooling == "avg" else "max")

    def protected(self, view: CompactionView) -> Tensor:
        """The window, less of it where a ratio of a short prompt leaves room for no other token."""
        return newest(view, (view.num_kept - 1).clamp(1, self.window))


@register("snapkv")
@dataclass(frozen=True, kw_only=True)
class SnapKV(ObservationWindow, Once):
    """What the end of the prompt attends to, with its neighbours, and that end; chosen once, after the prompt."""
