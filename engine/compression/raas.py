"""For long reasoning: the prompt stays, and of the generated blocks those that were used lately.

Source: Hu et al. 2025, arXiv:2502.11147. Each step every resident block is scored by the bound that Quest uses, and
blocks that matter get the step as their stamp; when there are more generated blocks than the budget, the one with the
oldest stamp goes. Whole blocks leave, so nothing moves and the prompt's blocks stay shared.
Decided: the budget counts generated tokens, in whole blocks, beyond the prompt's blocks (the last of which may hold the
first generated tokens). What matters is the top `share` of the resident blocks, or with `alpha` those whose estimated
probability, a softmax over the bounds, is at least that. One decision for all layers and kv heads: a block is as fresh
as in the head that used it last. The newest block is always in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.compression.base import CacheShape, CompactionView, Evidence, Keep
from engine.compression.options import MOST_TOKENS, Options, option
from engine.compression.registry import Hook, register
from engine.compression.scoring import indices, ranks
from engine.scheduling.compression import CachePlan, Realisation


@register("raas", needs=(Hook.STAMPS,))
@dataclass(frozen=True, kw_only=True)
class RaaS(Options):
    """Keeps the prompt, and of what was generated the blocks that were used last; for long reasoning.

    `CompactionView.scores` are stamps: at every slot the position of the last query that used the slot's block, made by
    `used` and `stamped` for each generated token.
    """

    budget: int = option(
        1024, int, "generated tokens kept, in whole blocks, beyond the prompt", at_least=1, at_most=MOST_TOKENS
    )
    share: float = option(0.5, float, "share of the blocks that count as used in a step", above=0, at_most=1)
    alpha: float | None = option(None, float, "instead: the least estimated probability", above=0, at_most=1)

    @property
    def evidence(self) -> Evidence | None:
        return None

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        size = shape.block_size
        kept = -(-num_prompt_tokens // size) * size + max(1, self.budget // size) * size
        return CachePlan(self.name, Realisation.BLOCKS, kept + size, size, (kept,), steps_singly=True)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return torch.zeros(1, len(positions), device=positions.device)

    def used(self, bounds: Tensor) -> Tensor:
        """Which blocks a query uses: [..., NB] bool. bounds [..., NB] float32 of the scaled logits, -inf for none."""
        is_block = bounds > -torch.inf
        if self.alpha is not None:
            used = bounds.softmax(-1) >= self.alpha
        else:
            used = ranks(bounds) < (is_block.sum(-1, keepdim=True) * self.share + 0.5).long().clamp(min=1)
        is_last = torch.arange(bounds.shape[-1], device=bounds.device) == is_block.sum(-1, keepdim=True) - 1
        return (used & is_block) | is_last

    def keep(self, view: CompactionView) -> Keep:
        size = self._block_size(view)
        stamps = view.scores[0].unflatten(-1, (-1, size)).amax((0, 1, 3))  # [NB]
        starts = view.positions[0, 0, ::size]
        blocks = survivors(stamps, starts < view.num_prompt_tokens, int(view.num_kept.max()) // size)
        slots = (blocks.unsqueeze(1) * size + torch.arange(size, device=blocks.device)).flatten()
        return Keep(slots.expand(*view.positions.shape[:2], -1))

    def _block_size(self, view: CompactionView) -> int:
        """A point is one block beyond what is kept."""
        return view.positions.shape[-1] - int(view.num_kept.max())


def stamped(stamps: Tensor, used: Tensor, position: int) -> Tensor:
    """Stamps [..., NB] after a query at `position` that used the blocks `used` [..., NB]."""
    return torch.where(used, torch.full_like(stamps, position), stamps)


def survivors(stamps: Tensor, pinned: Tensor, num_kept: int) -> Tensor:
    """The blocks that stay: [num_kept] int64 ascending. Of equal stamps the older block goes; the last block stays.

    stamps [NB]; pinned [NB] bool: blocks of the prompt
    """
    is_last = torch.arange(len(stamps), device=stamps.device) == len(stamps) - 1
    places = ranks(stamps.float().masked_fill(pinned | is_last, torch.inf))
    return indices(places < num_kept, num_kept)
