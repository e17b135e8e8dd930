"""The bounds in plain torch: gathers whole blocks, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def update_bounds(k_cache: Tensor, bounds: Tensor, slots: Tensor) -> None:
    block_size = k_cache.shape[2]
    blocks = slots.div(block_size, rounding_mode="floor")
    is_last = torch.ones_like(slots, dtype=torch.bool)
    is_last[:-1] = blocks[:-1] != blocks[1:]  # the last token of a block says how far it is filled
    last = slots[is_last & (slots >= 0)]
    blocks, offsets = last // block_size, last % block_size
    unfilled = (torch.arange(block_size, device=slots.device) > offsets[:, None])[:, None, :, None]
    keys = k_cache[blocks]  # [n, H_kv, BS, D]
    smallest = keys.masked_fill(unfilled, torch.inf).amin(2)
    largest = keys.masked_fill(unfilled, -torch.inf).amax(2)
    bounds[blocks] = torch.stack([smallest, largest], dim=2)


def bound_scores(q: Tensor, bounds: Tensor, block_table: Tensor, num_blocks: Tensor, scores: Tensor) -> None:
    """See `kernels.block_bounds.bound_scores`; num_blocks [R] int32. Writes scores [R, H_kv, MB]."""
    is_used = torch.arange(block_table.shape[1], device=q.device) < num_blocks[:, None]  # [R, MB]
    pairs = bounds[block_table.long().where(is_used, 0)].float()  # [R, MB, H_kv, 2, D]
    grouped = q.float().unflatten(1, (bounds.shape[1], -1))  # [R, H_kv, G, D]
    smallest, largest = pairs.unbind(3)
    products = torch.einsum("rhgd,rbhd->rhgb", grouped.clamp(max=0), smallest)
    products += torch.einsum("rhgd,rbhd->rhgb", grouped.clamp(min=0), largest)
    scores.copy_(products.amax(2).masked_fill(~is_used[:, None], -torch.inf))
