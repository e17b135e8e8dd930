"""Attention scores through the native library (kernel.cpp)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import native

SPLIT_KEYS = 256  # as kSplitKeys in kernel.cpp
MIN_WORK_PER_THREAD = 100_000  # multiply-adds (some microseconds) for which waking another thread pays
NOISY_BYTES = 32 << 20  # noisy logits kept between two passes, at most; with more they are made twice
LANES = 16  # no vector of kernel.cpp is longer
KIND_CODES = {"sum": 0, "count": 1, "noisy": 2}


class Params(ctypes.Structure):
    """Field by field the Params of kernel.cpp."""

    _fields_ = (
        *((name, native.PTR) for name in ("q", "k_cache", "block_table", "seq_lens", "cu_seqlens_q", "lse", "weights")),
        *((name, native.PTR) for name in ("noise_keys", "temperature", "norm", "partials", "noisy", "out")),
        *((name, native.INT) for name in ("num_channels", "num_tokens", "num_rows", "num_heads", "num_kv_heads")),
        *((name, native.INT) for name in ("head_dim", "block_size", "num_slots")),
        *((name, native.INT) for name in ("q_stride_token", "q_stride_head", "k_stride_block", "k_stride_head")),
        *((name, native.INT) for name in ("table_stride_row", "table_stride_head")),
        *((name, native.INT) for name in ("lens_stride_row", "lens_stride_head")),
        *((name, native.INT) for name in ("q_dtype", "cache_dtype", "kind", "window", "num_threads")),
        *((name, native.FLOAT) for name in ("scale", "soft_cap")),
    )


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
    num_tokens, num_heads, head_dim = q.shape
    num_channels, num_rows, num_kv_heads, num_slots = out.shape
    per_head_table = block_table.dim() == 3
    is_noisy = noise_keys is not None
    # Where the noise has its own softmax: its denominators, and for each split of keys (largest, sum).
    norm = torch.empty(num_tokens, num_heads) if is_noisy else None
    num_splits = -(-num_slots // SPLIT_KEYS)
    partials = torch.empty(num_tokens, num_heads, num_splits, 2) if is_noisy else None
    noisy_size = num_tokens * num_heads * (-(-num_slots // LANES) * LANES)
    noisy = torch.empty(noisy_size) if is_noisy and 4 * noisy_size <= NOISY_BYTES else None
    work = num_tokens * num_heads * num_slots * head_dim
    params = Params(
        q=q.data_ptr(),
        k_cache=k_cache.data_ptr(),
        block_table=block_table.data_ptr(),
        seq_lens=seq_lens.data_ptr(),
        cu_seqlens_q=cu_seqlens_q.data_ptr(),
        lse=lse.data_ptr(),
        weights=weights.data_ptr(),
        noise_keys=None if noise_keys is None else noise_keys.data_ptr(),
        temperature=None if temperature is None else temperature.data_ptr(),
        norm=None if norm is None else norm.data_ptr(),
        partials=None if partials is None else partials.data_ptr(),
        noisy=None if noisy is None else noisy.data_ptr(),
        out=out.data_ptr(),
        num_channels=num_channels,
        num_tokens=num_tokens,
        num_rows=num_rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=k_cache.shape[2],
        num_slots=num_slots,
        q_stride_token=q.stride(0),
        q_stride_head=q.stride(1),
        k_stride_block=k_cache.stride(0),
        k_stride_head=0 if per_head_table and k_cache.shape[1] == 1 else k_cache.stride(1),
        table_stride_row=block_table.stride(0),
        table_stride_head=block_table.stride(1) if per_head_table else 0,
        lens_stride_row=seq_lens.stride(0),
        lens_stride_head=seq_lens.stride(1) if seq_lens.dim() == 2 else 0,
        q_dtype=native.DTYPE_CODES[q.dtype],
        cache_dtype=native.DTYPE_CODES[k_cache.dtype],
        kind=KIND_CODES[kind],
        window=window,
        num_threads=max(1, min(native.num_threads(), work // MIN_WORK_PER_THREAD)),
        scale=scale,
        soft_cap=soft_cap,
    )
    native.function("kvasir_attention_scores", native.PTR)(ctypes.addressof(params))
