"""Logits of attention themselves, over all channels of the keys or over some: evidence for policies that select tokens.

Knows block tables, slot positions and lengths; not what is selected. With a few channels it reads a part of each key,
and what it returns is an estimate (Yang et al. 2024, Double Sparsity, arXiv:2408.07092).
Shape letters: T new tokens, R rows (requests), H query heads, H_kv kv heads, D head dim, C channels, NB blocks of BS
slots, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def attention_logits(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    soft_cap: float = 0.0,
    channels: Tensor | None = None,
    num_slots: int | None = None,
) -> Tensor:
    """scale * q.k of every query with every slot that it sees: [T, H, S] float32, -inf at the other slots.

    q             [T, H, D]           float; any strides, last dim contiguous
    k_cache       [NB, H_kv, BS, D]   float; any strides, last two dims contiguous
    block_table   [R, MB] int32       block of slots i*BS to (i+1)*BS - 1
    seq_lens      [R] int32           slots visible to the row's last query
    cu_seqlens_q  [R+1] int32         row r owns tokens cu_seqlens_q[r] to cu_seqlens_q[r+1]
    scale         factor on the sum over channels; soft_cap > 0 then makes it soft_cap * tanh(logit / soft_cap)
    channels      [H_kv, C] int64     the sum runs over these channels of a kv head's keys only; None: over all
    num_slots     S, at least every row's length. None: the longest, which on a GPU waits for the device

    Queries see slots as in `paged_attention`. Slots and table entries beyond a row's length are never read.
    A logit is bit for bit the same in every batch and for every number of threads.
    Raises ValueError when shapes or types disagree.
    """
    _check(q, k_cache, block_table, seq_lens, cu_seqlens_q)
    if channels is not None and (channels.dtype != torch.int64 or channels.shape[:1] != k_cache.shape[1:2]):
        raise ValueError(f"channels is {list(channels.shape)} {channels.dtype}, need [{k_cache.shape[1]}, C] int64")
    if num_slots is None:
        num_slots = max(0, int(seq_lens.max())) if seq_lens.numel() else 0
    out = torch.empty(*q.shape[:2], num_slots, dtype=torch.float32, device=q.device)
    if out.numel():
        index = torch.arange(seq_lens.shape[0], dtype=torch.int32, device=q.device)
        rows = index.repeat_interleave(cu_seqlens_q.diff(), output_size=q.shape[0])
        tokens = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
        visible = (seq_lens[rows] - cu_seqlens_q[1:][rows] + tokens + 1).clamp(0, num_slots).int()
        if channels is not None:
            channels = channels.contiguous()
        backend.implementation("attention_logits", q.device).attention_logits(
            *(q, k_cache, block_table, rows, visible, channels, out),
            scale=scale,
            soft_cap=soft_cap,
        )
    return out


def _check(q: Tensor, k_cache: Tensor, block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor) -> None:
    if q.dtype not in _FLOATS or k_cache.dtype not in _FLOATS or q.dtype not in (torch.float32, k_cache.dtype):
        raise ValueError(f"q is {q.dtype} and the cache {k_cache.dtype}; q must be float32 or of the cache's type")
    if q.dim() != 3 or q.shape[1] % k_cache.shape[1] or q.shape[2] != k_cache.shape[3] or q.stride(2) != 1:
        raise ValueError(f"q {list(q.shape)} (last dim contiguous) does not fit a cache of {list(k_cache.shape)}")
    if k_cache.stride(3) != 1 or k_cache.stride(2) != k_cache.shape[3]:
        raise ValueError(f"the last two dims of the cache must be contiguous, got strides {k_cache.stride()}")
    num_rows = seq_lens.shape[0]
    if block_table.dim() != 2 or block_table.shape[0] != num_rows or cu_seqlens_q.shape[0] != num_rows + 1:
        raise ValueError(
            f"seq_lens has {num_rows} entries, block_table {list(block_table.shape)} and cu_seqlens_q "
            f"{cu_seqlens_q.shape[0]}; need R, [R, MB] and R+1"
        )
    if not block_table.dtype == seq_lens.dtype == cu_seqlens_q.dtype == torch.int32 or block_table.stride(1) != 1:
        raise ValueError("block_table, seq_lens and cu_seqlens_q must be int32, rows of block_table contiguous")
