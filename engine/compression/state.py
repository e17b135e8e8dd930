"""What the mechanism keeps of a row with a cache policy between steps. Shapes as in `engine.compression.base`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from engine.compression.base import Policy
from engine.compression.hooks import hooks_of
from engine.compression.razor_attention import Compensation
from engine.compression.registry import Hook
from engine.scheduling.compression import CachePlan


@dataclass(slots=True)
class RowState:
    """What a row with a policy has come to.

    scores          [C, L, H_kv, n] float32 of the slots that had evidence so far
    num_scored      tokens whose queries have been counted in it
    scored_for      the point at which these scores count as they are
    positions       [L, H_kv, n'] int64 of the slots that the last compaction left; those after them are in order
    num_positioned  tokens computed at that compaction
    side            (layer, n) -> [H_kv, n, W]: what the policy has noted of the first slots; None without
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
    side: Callable[[int, int], Tensor] | None = None

    def next_choice(self, num_computed: int) -> int | None:
        """The first point after so many computed tokens for which attention is summed up; None: it is not any more.

        A policy that rewrites attention wants the sums of the prompt, whose end is a point, too.
        """
        point = self.plan.next_choice(num_computed)
        if Hook.REWRITE not in hooks_of(self.policy) or num_computed >= self.num_prompt_tokens:
            return point
        return self.num_prompt_tokens if point is None else min(point, self.num_prompt_tokens)
