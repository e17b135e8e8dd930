"""What the mechanism keeps of a row with a cache policy between steps. Shapes as in `engine.compression.base`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from engine.compression.base import Policy
from engine.compression.razor_attention import Compensation
from engine.scheduling.compression import CachePlan


@dataclass(slots=True)
class RowState:
    """What a row with a policy has come to.

    scores          [C, L, H_kv, n] float32 of the slots that had evidence so far
    num_scored      tokens whose queries have been counted in it
    scored_for      the point at which these scores count as they are
    positions       [L, H_kv, n'] int64 of the slots that the last compaction left; those after them are in order
    num_positioned  tokens computed at that compaction
    dropped         of each layer, what stands for the tokens that are gone, for policies that have something do so
    """

    policy: Policy
    plan: CachePlan
    num_prompt_tokens: int
    seed: int
    scores: Tensor | None = None
    num_scored: int = 0
    scored_for: int = 0
    positions: Tensor | None = None
    num_positioned: int = 0
    dropped: list[Compensation] = field(default_factory=list)
