"""Keep the first tokens (attention sinks) and the newest, drop the middle.

Source: Xiao et al. 2023, arXiv:2309.17453; the set kept is {k < num_sink} and the newest budget - num_sink.
Differs: kept keys stay at their RoPE positions, where the paper renumbers them inside the cache: so nothing has to be
rotated again, and a request still ends at the model's context. The prompt is read with its whole cache, and one token
per step becomes a burst per `period`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from engine.compression.base import CompactionView
from engine.compression.options import Periodic, option
from engine.compression.registry import register
from engine.compression.scoring import ScoringPolicy, first_tokens


@register("streaming_llm")
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(ScoringPolicy, Periodic):
    """The first tokens and the newest; the middle goes."""

    by_position: ClassVar[bool] = True
    default_budget: ClassVar[int | None] = 1024

    num_sink: int = option(4, int, "first tokens, always kept", at_least=0, at_most=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than("num_sink", self.num_sink)

    def importance(self, view: CompactionView) -> Tensor:
        return view.positions.float()

    def protected(self, view: CompactionView) -> Tensor:
        return first_tokens(view, (view.num_kept - 1).clamp(max=self.num_sink))
