"""How much attention each cached slot got: probabilities summed over queries, for policies that drop or select tokens.

A pass of its own after attention, over keys only: probabilities follow from the log of the softmax denominator that
attention returns. So w queries cost about w / n of what attending from all n costs.
Knows block tables, slot positions and lengths; no requests, no policies.
Shape letters: C channels, T new tokens, R rows (requests), H query heads, H_kv kv heads, D head dim, NB blocks of BS
slots, S slots of the longest row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import backend
from kernels.attention_scores.noise import head_keys

Kind = Literal["sum", "count", "noisy"]

KINDS = ("sum", "count", "noisy")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def attention_scores(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    lse: Tensor,
    weights: Tensor,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    kind: Kind = "sum",
    noise_keys: Tensor | None = None,
    layer: int = 0,
    temperature: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sums, for every slot that a kv head has in a row, over the row's queries and the G heads that share the kv head.

    q, k_cache, block_table, seq_lens, cu_seqlens_q, scale, window, soft_cap  as for `paged_attention`
    lse          [T, H] float32, contiguous: what `paged_attention` returned for them
    weights      [C, T] float32, contiguous: weight of each query in each sum; queries without any cost nothing
    kind         what is summed, times the weight; p is the probability of a slot for one query head:
                   "sum"    p
                   "count"  1 where p is less than 1 / (slots that the query sees), by more than rounding (1e-4 of it)
                   "noisy"  p of softmax((x + g) / temperature), x the scaled and capped q.k, g standard Gumbel noise;
                            without sinks, lse is not used
    noise_keys   [T] int64, for "noisy": a key for each query. Slot s of head h in a layer has the noise of "token" s
                 under the key subkey(subkey(key, layer), h) (`kernels.sampling`; `kernels.attention_scores.noise`)
    layer        for the noise
    temperature  [T] float32, for "noisy", positive
    out          [C, R, H_kv, S] float32, contiguous, is added to; S at least every row's length. None: zeros
                 of the longest row's length, which on a GPU waits for the device

    Returns out [C, R, H_kv, S]. Nothing is added at slots that no query of the row sees.
    Sums run over the queries in order and start from `out`: in the C++ implementation a row's result is bit for bit the
    same in every batch, for every number of threads, and for every division of its queries into calls that pass `out`
    on. (Without `out`, sums of calls differ from the sum of one call by rounding.)
    Raises ValueError when shapes, types or options disagree.
    """
    num_kv_heads = block_table.shape[1] if block_table.dim() == 3 else k_cache.shape[1]
    _check(q, k_cache, block_table, seq_lens, cu_seqlens_q, lse, weights, num_kv_heads)
    _check_noise(kind, noise_keys, temperature, q)
    if out is None:
        num_slots = max(0, int(seq_lens.max())) if seq_lens.numel() else 0
        shape = weights.shape[0], seq_lens.shape[0], num_kv_heads, num_slots
        out = torch.zeros(shape, dtype=torch.float32, device=q.device)
    else:
        _check_out(out, weights.shape[0], seq_lens, num_kv_heads)
    if out.numel() and q.shape[0]:
        keys = None if noise_keys is None else head_keys(noise_keys, layer, q.shape[1])
        backend.implementation("attention_scores", q.device).attention_scores(
            *(q, k_cache, block_table, seq_lens, cu_seqlens_q, lse, weights, out),
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            kind=kind,
            noise_keys=keys,
            temperature=temperature,
        )
    return out


def _check(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    lse: Tensor,
    weights: Tensor,
    num_kv_heads: int,
) -> None:
    if q.dtype not in _FLOATS or k_cache.dtype not in _FLOATS or q.dtype not in (torch.float32, k_cache.dtype):
        raise ValueError(f"q is {q.dtype} and the cache {k_cache.dtype}; q must be float32 or of the cache's type")
    if k_cache.shape[1] != num_kv_heads and k_cache.shape[1] != 1:
        raise ValueError(f"block_table has {num_kv_heads} heads, the cache {k_cache.shape[1]}; need as many, or one")
    if q.shape[1] % num_kv_heads != 0 or q.shape[2] != k_cache.shape[3] or q.stride(2) != 1:
        raise ValueError(f"q {list(q.shape)} (last dim contiguous) does not fit {num_kv_heads} kv heads of the cache")
    if k_cache.stride(3) != 1 or k_cache.stride(2) != k_cache.shape[3]:
        raise ValueError(f"the last two dims of the cache must be contiguous, got strides {k_cache.stride()}")
    num_rows = seq_lens.shape[0]
    if block_table.shape[0] != num_rows or cu_seqlens_q.shape[0] != num_rows + 1:
        raise ValueError(
            f"seq_lens has {num_rows} entries, block_table {block_table.shape[0]} and cu_seqlens_q "
            f"{cu_seqlens_q.shape[0]}; need R, R and R+1"
        )
    if not block_table.dtype == seq_lens.dtype == cu_seqlens_q.dtype == torch.int32:
        raise ValueError("block_table, seq_lens and cu_seqlens_q must be int32")
    if cu_seqlens_q.stride(0) != 1 or block_table.stride(-1) != 1:
        raise ValueError("cu_seqlens_q and the rows of block_table must be contiguous")
    if seq_lens.dim() == 2 and seq_lens.shape[1] != num_kv_heads:
        raise ValueError(f"seq_lens {list(seq_lens.shape)} does not fit {num_kv_heads} kv heads")
    if lse.shape != q.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"lse is {list(lse.shape)} {lse.dtype}, need {list(q.shape[:2])} float32, contiguous")
    if weights.dim() != 2 or weights.shape[1] != q.shape[0] or weights.dtype != torch.float32:
        raise ValueError(f"weights is {list(weights.shape)} {weights.dtype}, need [C, {q.shape[0]}] float32")
    if not weights.is_contiguous():
        raise ValueError(f"weights must be contiguous, got strides {weights.stride()}")


def _check_noise(kind: str, noise_keys: Tensor | None, temperature: Tensor | None, q: Tensor) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if kind != "noisy":
        if noise_keys is not None or temperature is not None:
            raise ValueError(f"noise_keys and temperature are for the kind 'noisy', not {kind!r}")
        return
    for name, values, dtype in (("noise_keys", noise_keys, torch.int64), ("temperature", temperature, torch.float32)):
        if values is None or values.shape != q.shape[:1] or values.dtype != dtype or not values.is_contiguous():
            found = None if values is None else f"{list(values.shape)} {values.dtype}"
            raise ValueError(f"{name} is {found}, the kind 'noisy' needs [{q.shape[0]}] {dtype}, contiguous")


def _check_out(out: Tensor, num_channels: int, seq_lens: Tensor, num_kv_heads: int) -> None:
    shape = num_channels, seq_lens.shape[0], num_kv_heads
    if out.dim() != 4 or out.shape[:3] != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)} {out.dtype}, need {[*shape]} + [S] float32, contiguous")
