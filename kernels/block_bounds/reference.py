"""Definition of the bounds: token by token, and the sum of the larger products, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def update_bounds(k_cache: Tensor, bounds: Tensor, slots: Tensor) -> None:
    for slot in slots.tolist():
        if slot >= 0:
            block, offset = divmod(slot, k_cache.shape[2])
            keys = k_cache[block, :, : offset + 1]  # [H_kv, filled, D]
            bounds[block] = torch.stack([keys.amin(1), keys.amax(1)], dim=1)


def bound_scores(q: Tensor, bounds: Tensor, block_table: Tensor, num_blocks: Tensor, scores: Tensor) -> None:
    """See `kernels.block_bounds.bound_scores`; num_blocks [R] int32. Writes scores [R, H_kv, MB]."""
    scores.fill_(-torch.inf)
    for row, count in enumerate(num_blocks.tolist()):
        grouped = q[row].double().unflatten(0, (bounds.shape[1], 1, -1))  # [H_kv, 1, G, D]
        for place in range(count):
            pair = bounds[block_table[row, place]].double()  # [H_kv, 2, D]
            products = grouped * pair.unsqueeze(2)  # [H_kv, 2, G, D]
            scores[row, :, place] = products.amax(1).sum(-1).amax(1)
