"""The definition of attention scores: one query head at a time, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sampling.reference import gumbel, token_word


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
    num_heads, block_size = q.shape[1], k_cache.shape[2]
    num_kv_heads = out.shape[2]
    for row in range(out.shape[1]):
        first, last = int(cu_seqlens_q[row]), int(cu_seqlens_q[row + 1])
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            table = block_table[row, kv_head] if block_table.dim() == 3 else block_table[row]
            seq_len = int(seq_lens[row, kv_head] if seq_lens.dim() == 2 else seq_lens[row])
            cache_head = kv_head if k_cache.shape[1] > 1 else 0
            for token in range(first, last):
                end = seq_len - (last - token) + 1  # its own slot is the last one seen
                begin = max(0, end - window) if window > 0 else 0
                if begin >= end or not weights[:, token].any():
                    continue
                slots = torch.arange(begin, end, device=q.device)
                keys = k_cache[table[slots // block_size].long(), cache_head, slots % block_size].double()  # [n, D]
                x = keys @ q[token, head].double() * scale
                if soft_cap > 0:
                    x = soft_cap * torch.tanh(x / soft_cap)
                if noise_keys is not None and temperature is not None:
                    key = int(noise_keys[token, head])
                    noise = [gumbel(token_word(key, slot)) for slot in range(begin, end)]
                    x = (x + torch.tensor(noise, dtype=torch.float64, device=q.device)) / temperature[token].double()
                    p = x.softmax(0)
                else:
                    p = torch.exp(x - lse[token, head].double())
                if kind == "count":
                    p = (p * (end - begin) < 1 - 1e-4).double()
                out[:, row, kv_head, begin:end] += (weights[:, token, None].double() * p).float()
