"""The definition of the logits: one query head at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_logits(
    q: Tensor, k_cache: Tensor, block_table: Tensor, rows: Tensor, visible: Tensor, channels: Tensor | None,
    out: Tensor, *, scale: float, soft_cap: float,
) -> None:  # fmt: skip
    """See `kernels.attention_logits.attention_logits`; of each token its row and how many slots it sees, [T] int32."""
    out.fill_(-torch.inf)
    group, block_size = q.shape[1] // k_cache.shape[1], k_cache.shape[2]
    for token, (row, count) in enumerate(zip(rows.tolist(), visible.tolist(), strict=True)):
        slots = torch.arange(count, device=q.device)
        blocks, offsets = block_table[row, slots // block_size].long(), slots % block_size
        for head in range(q.shape[1]):
            keys, query = k_cache[blocks, head // group, offsets].double(), q[token, head].double()  # [n, D], [D]
            if channels is not None:
                chosen = channels[head // group]
                keys, query = keys[:, chosen], query[chosen]
            logits = keys @ query * scale
            out[token, head, :count] = soft_cap * torch.tanh(logits / soft_cap) if soft_cap > 0 else logits
