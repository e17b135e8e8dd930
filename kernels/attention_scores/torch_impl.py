"""Attention scores in plain torch, row by row: gather the row's keys, one matrix product, float32 inside.

The fallback where no compiler exists. Holds the scores of one row's weighted queries at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sampling.torch_impl import random_bits

NOT_BELOW = 1 - 1e-4  # of 1 / visible: equality up to rounding is not below it


def attention_scores(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    lse: Tensor,
    weights: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    kind: str,
    noise_keys: Tensor | None,
    temperature: Tensor | None,
) -> None:
    """See `kernels.attention_scores.attention_scores`; noise_keys is [T, H]. Adds to out [C, R, H_kv, S]."""
    num_kv_heads = out.shape[2]
    starts = cu_seqlens_q.tolist()
    is_weighted = (weights != 0).any(0)
    for row in range(out.shape[1]):
        tokens = starts[row] + is_weighted[starts[row] : starts[row + 1]].nonzero().squeeze(1)
        lengths = seq_lens[row].expand(num_kv_heads)  # [H_kv]
        longest = max(0, int(lengths.max()))
        if len(tokens) == 0 or longest == 0:
            continue
        end = lengths[:, None] - (starts[row + 1] - tokens) + 1  # [H_kv, n], of what each query sees
        begin = end - window if window > 0 else torch.zeros_like(end)
        slots = torch.arange(longest, device=q.device)
        visible = ((slots >= begin[..., None]) & (slots < end[..., None])).unsqueeze(1)  # [H_kv, 1, n, S]
        keys = _gather(k_cache, block_table[row], visible.any(2).squeeze(1))
        queries = q[tokens].float().unflatten(1, (num_kv_heads, -1))  # [n, H_kv, G, D]
        x = torch.einsum("nhgd,hsd->hgns", queries, keys) * scale
        if soft_cap > 0:
            x = soft_cap * torch.tanh(x / soft_cap)
        if noise_keys is not None and temperature is not None:
            noise = _gumbel(noise_keys[tokens].flatten(), longest).view(len(tokens), num_kv_heads, -1, longest)
            x = (x + noise.permute(1, 2, 0, 3)) / temperature[tokens, None]
            norm = x.masked_fill(~visible, -torch.inf).logsumexp(-1)  # [H_kv, G, n]
        else:
            norm = lse[tokens].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0)
        p = torch.exp(x - norm[..., None])
        if kind == "count":
            p = (p * visible.sum(-1, keepdim=True) < NOT_BELOW).float()
        p = p.masked_fill(~visible, 0.0)
        out[:, row, :, :longest] += torch.einsum("cn,hgns->chs", weights[:, tokens], p)


def _gumbel(keys: Tensor, num_slots: int) -> Tensor:
    """[N, num_slots] float32 for keys [N] int64."""
    u = (random_bits(keys, num_slots).double() + 0.5) * 2.0**-32
    return -(-u.log()).log().float()


def _gather(cache: Tensor, table: Tensor, used: Tensor) -> Tensor:
    """The row's slots in order, [H_kv, S, D] float32; zero where they are not used [H_kv, S]."""
    slots = torch.arange(used.shape[1], device=used.device)
    heads = torch.arange(used.shape[0], device=used.device)[:, None] if cache.shape[1] > 1 else 0
    table = table.expand(used.shape[0], -1)[:, slots // cache.shape[2]]
    blocks = table.long().where(used, 0)
    return cache[blocks, heads, slots % cache.shape[2]].float().masked_fill(~used[..., None], 0.0)
