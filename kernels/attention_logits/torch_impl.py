"""The logits in plain torch: gathers the keys of each token, float32 inside."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_logits(
    q: Tensor, k_cache: Tensor, block_table: Tensor, rows: Tensor, visible: Tensor, channels: Tensor | None,
    out: Tensor, *, scale: float, soft_cap: float,
) -> None:  # fmt: skip
    """See `kernels.attention_logits.attention_logits`; of each token its row and how many slots it sees, [T] int32."""
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_slots = out.shape[2]
    slots = torch.arange(num_slots, device=q.device)
    grouped = q.float().unflatten(1, (num_kv_heads, -1))  # [T, H_kv, G, D]
    if channels is not None:
        grouped = grouped.gather(3, channels[:, None].expand(*grouped.shape[:3], -1))
    for token, (row, count) in enumerate(zip(rows.tolist(), visible.tolist(), strict=True)):
        seen = slots[:count]
        blocks = block_table[row, seen // block_size].long()
        keys = k_cache[blocks, :, seen % block_size].float().transpose(0, 1)  # [H_kv, n, D]
        if channels is not None:
            keys = keys.gather(2, channels[:, None].expand(-1, count, -1))
        logits = torch.einsum("hgd,hnd->hgn", grouped[token], keys).flatten(0, 1) * scale
        out[token, :, :count] = soft_cap * torch.tanh(logits / soft_cap) if soft_cap > 0 else logits
        out[token, :, count:] = -torch.inf
