"""The definition of paged attention: one query head at a time, in float64."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from kernels.paged_attention.plan import AttentionPlan, Row


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> None:
    """No work list: the definition walks over the rows."""


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    plan: AttentionPlan,
    layout: Hashable,
) -> None:
    """See `kernels.paged_attention.paged_attention`; writes out [T, H, Dv] and lse [T, H]."""
    num_heads, block_size = q.shape[1], k_cache.shape[2]
    num_kv_heads = block_table.shape[1] if block_table.dim() == 3 else k_cache.shape[1]
    for row in range(len(plan.rows)):
        first, last = int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            table = block_table[row, kv_head] if block_table.dim() == 3 else block_table[row]
            seq_len = int(seq_lens[row, kv_head] if seq_lens.dim() == 2 else seq_lens[row])
            cache_head = kv_head if k_cache.shape[1] > 1 else 0
            for token in range(first, last):
                slots = _seen(plan, token, seq_len - (last - first), token - first)
                slots = slots[max(0, len(slots) - window) if window > 0 else 0 :].to(q.device)
                blocks, offsets = table[slots // block_size].long(), slots % block_size
                keys = k_cache[blocks, cache_head, offsets].double()  # [S, D]
                values = v_cache[blocks, cache_head, offsets].double()  # [S, Dv]
                scores = keys @ q[token, head].double() * scale
                if soft_cap > 0:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                logits = scores if sinks is None else torch.cat([scores, sinks[head : head + 1].double()])
                out[token, head] = logits.softmax(0)[: len(scores)] @ values
                if lse is not None:
                    lse[token, head] = logits.logsumexp(0) if len(logits) else -torch.inf


def _seen(plan: AttentionPlan, token: int, num_before: int, index: int) -> Tensor:
    """Slots that a token sees without a window, in the order of the text: its own is the last."""
    path = [] if plan.paths is None else plan.paths[token].tolist()
    if path and path[0] > 0:
        return torch.tensor([*range(num_before), *(num_before + node for node in path[1 : 1 + path[0]])])
    return torch.arange(max(0, num_before + index + 1))
