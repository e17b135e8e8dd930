"""Let an early layer choose the part of the prompt that matters, and start again with that alone.

Source: Shi et al. 2024, arXiv:2409.17422. Layers 0 .. r run on the prompt; at layer r, s_k = sum over heads of
q_last . k_k (rotated, no softmax), smoothed over `kernel` neighbours; the top tokens in their order become the prompt,
at positions from 0 on.
Differs: the first and the last tokens are always part of it, as the score alone does not ensure that the token which
begins a text or the question survives. Where no calibration names r, it is 13 layers of 32, as for Llama-3.1-8B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from engine.compression.base import CacheShape
from engine.compression.options import MOST_TOKENS, Budgeted, option
from engine.compression.registry import Hook, register
from engine.compression.scoring import KeepsEverything, pool, protect, top_k
from engine.scheduling.compression import CachePlan, Realisation


@register("gemfilter", needs=(Hook.PROMPT_FILTER,))
@dataclass(frozen=True, kw_only=True)
class GemFilter(KeepsEverything, Budgeted):
    """Shortens the prompt to what an early layer attends to, then starts again with that."""

    default_budget: ClassVar[int | None] = 1024

    budget: int | None = option(None, int, "prompt tokens that stay", at_least=1, at_most=MOST_TOKENS)
    layer: int | None = option(
        None, int, "layer that chooses, from 0; by default 13/32 of the depth", at_least=0, at_most=1023
    )
    kernel: int = option(5, int, "neighbours over which scores are smoothed; 1: off", at_least=1, at_most=255, odd=True)
    num_first: int = option(1, int, "first prompt tokens, always kept", at_least=0, at_most=4096)
    num_recent: int = option(32, int, "last prompt tokens, always kept", at_least=0, at_most=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.more_than("num_first + num_recent", self.num_first + self.num_recent)

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        budget = self.budget_for(num_prompt_tokens)
        num_filtered = budget if budget < num_prompt_tokens else None
        return CachePlan(self.name, Realisation.DENSE, None, 0, (), num_filtered=num_filtered)

    def layer_of(self, num_layers: int) -> int:
        """The layer that chooses; a layer beyond the last means the last."""
        return min(num_layers * 13 // 32 if self.layer is None else self.layer, num_layers - 1)

    def choose(self, logits: Tensor) -> Tensor | None:
        """Indices of the prompt tokens that stay: [k] int64 ascending; None: the prompt is within the budget.

        logits  [n] float32, see `filter_logits`
        """
        num_tokens = len(logits)
        num_kept = self.budget_for(num_tokens)
        if num_tokens <= num_kept:
            return None
        place = torch.arange(num_tokens, device=logits.device)
        # of a ratio of a short prompt the last tokens take what the first leave
        num_first = min(self.num_first, num_kept)
        num_recent = min(self.num_recent, num_kept - num_first)
        forced = (place < num_first) | (place >= num_tokens - num_recent)
        return top_k(protect(pool(logits, self.kernel, "avg"), forced), num_kept)


def filter_logits(query: Tensor, keys: Tensor) -> Tensor:
    """Sum of q.k over all heads: [n] float32. query [H, D] of the last prompt token, keys [H_kv, n, D], rotated."""
    summed = query.float().unflatten(0, (keys.shape[0], -1)).sum(1)  # [H_kv, D]
    return torch.einsum("hd,hnd->n", summed, keys.float())
