"""Keep random tokens: the yardstick that every policy has to beat.

A token's score is a random number keyed by (seed, layer, kv head, position): so it does not depend on when the cache
shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from engine.compression.base import CompactionView
from engine.compression.options import Periodic, option
from engine.compression.registry import register
from engine.compression.scoring import ScoringPolicy, newest, random_words
from engine.noise import Purpose


@register("random")
@dataclass(frozen=True, kw_only=True)
class RandomEviction(ScoringPolicy, Periodic):
    """Random tokens and the newest few; for comparison."""

    by_position: ClassVar[bool] = True
    default_ratio: ClassVar[float | None] = 0.25

    num_recent: int = option(4, int, "newest tokens, always kept", at_least=0, at_most=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than("num_recent", self.num_recent)

    def importance(self, view: CompactionView) -> Tensor:
        num_layers, num_heads, _ = view.positions.shape
        device = view.positions.device
        words = random_words(view.seed, (num_layers, num_heads), view.num_tokens, Purpose.EVICTION, device)
        # 24 bits are exact in float32
        return (words.gather(-1, view.positions.clamp(min=0)) >> 8).float()

    def protected(self, view: CompactionView) -> Tensor:
        return newest(view, self.num_recent)
