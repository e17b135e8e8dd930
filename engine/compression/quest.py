"""Read only the blocks whose keys could have the largest logits. Nothing is dropped: memory stays, reading shrinks.

Source: Tang et al. 2024, arXiv:2406.10774. Per block and kv head the channelwise minimum and maximum of the keys; a
query's bound on any of its logits there is the sum over channels of max(q m-, q m+); the top budget / block_size blocks
are read, the newest always, all of them in the first layers and during the prompt.
Differs: one list per kv head, by the maximum of the bound over the query heads of its group (safe: no head's best block
has a smaller bound). At least 3 blocks, as in the reference's evaluation. Ties: the newer block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from engine.compression.base import CacheShape
from engine.compression.options import MOST_TOKENS, Budgeted, option
from engine.compression.registry import Hook, register
from engine.compression.scoring import KeepsEverything, protect, top_k
from engine.scheduling.compression import CachePlan

MIN_BLOCKS = 3


@register("quest", needs=(Hook.SELECTION,))
@dataclass(frozen=True, kw_only=True)
class Quest(KeepsEverything, Budgeted):
    """Keeps everything and reads, for each token, only the blocks that could matter most."""

    default_budget: ClassVar[int | None] = 1024

    budget: int | None = option(None, int, "tokens read per layer and kv head", at_least=1, at_most=MOST_TOKENS)
    num_dense_layers: int = option(2, int, "first layers, which read everything", at_least=0, at_most=1024)

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return replace(super().plan(num_prompt_tokens, shape), steps_singly=True)

    def is_dense(self, layer: int) -> bool:
        return layer < self.num_dense_layers

    def num_blocks(self, num_prompt_tokens: int, block_size: int) -> int:
        """Blocks read per kv head and token; with as many or fewer in its table a row is dense."""
        return max(MIN_BLOCKS, self.budget_for(num_prompt_tokens) // block_size)


def select_blocks(bounds: Tensor, num_present: Tensor, num_blocks: Tensor | int) -> Tensor:
    """The blocks to read: [R, H_kv, K] int64, places in the row's table, ascending, -1 at the end.

    bounds       [R, H_kv, MB] float32, see `key_bounds`
    num_present  [R] int64, at least 1: blocks in the row's table; the last of them is always read
    num_blocks   how many to read: an integer or [R] int64, at least 1; a row with fewer reads all it has
    """
    place = torch.arange(bounds.shape[-1], device=bounds.device)
    present = num_present.view(-1, 1, 1)
    scores = protect(bounds.masked_fill(place >= present, -torch.inf), place == present - 1)
    num_read = torch.minimum(num_present, torch.as_tensor(num_blocks, device=bounds.device))
    return top_k(scores, num_read.unsqueeze(1).expand(bounds.shape[:2]))


def key_bounds(queries: Tensor, minimum: Tensor, maximum: Tensor) -> Tensor:
    """Upper bounds of q.k over the keys of each block: [H_kv, NB] float32, the largest over the query heads of a group.

    queries [H, D]; minimum, maximum [H_kv, NB, D]
    """
    grouped = queries.float().unflatten(0, (minimum.shape[0], -1))  # [H_kv, G, D]
    positive, negative = grouped.clamp(min=0), grouped.clamp(max=0)
    bounds = positive @ maximum.float().transpose(1, 2) + negative @ minimum.float().transpose(1, 2)
    return bounds.amax(1)
