"""Cache writes through the native library (kernel.cpp)."""

from __future__ import annotations

import ctypes

from torch import Tensor

from kernels import native
from kernels.native import DTYPE_CODES, INT, PTR


class Rows(ctypes.Structure):
    """Field by field the Rows of kernel.cpp."""

    _fields_ = (("data", PTR), *((name, INT) for name in ("stride_token", "stride_head", "num_heads", "head_dim")))


class Cache(ctypes.Structure):
    """Field by field the Cache of kernel.cpp."""

    _fields_ = (("data", PTR), *((name, INT) for name in ("stride_block", "stride_head", "block_size")))


def kv_write(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    slots = slots.contiguous()
    native.function("kvasir_kv_write", PTR, INT, PTR, INT, PTR, INT, INT)(
        ctypes.byref(_rows(x)),
        DTYPE_CODES[x.dtype],
        ctypes.byref(_cache(cache)),
        DTYPE_CODES[cache.dtype],
        slots.data_ptr(),
        x.shape[0],
        native.num_threads(),
    )


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    interleaved: bool,
) -> None:
    positions, slots = positions.contiguous(), slots.contiguous()
    arguments = (PTR, PTR, PTR, INT, PTR, PTR, INT, INT, PTR, PTR, INT, PTR, INT, INT)
    native.function("kvasir_rope_kv_write", *arguments)(
        ctypes.byref(_rows(q)),
        ctypes.byref(_rows(k)),
        ctypes.byref(_rows(v)),
        DTYPE_CODES[q.dtype],
        positions.data_ptr(),
        cos_sin.data_ptr(),
        cos_sin.shape[1],
        interleaved,
        ctypes.byref(_cache(k_cache)),
        ctypes.byref(_cache(v_cache)),
        DTYPE_CODES[k_cache.dtype],
        slots.data_ptr(),
        q.shape[0],
        native.num_threads(),
    )


def _rows(x: Tensor) -> Rows:
    return Rows(x.data_ptr(), x.stride(0), x.stride(1), x.shape[1], x.shape[2])


def _cache(cache: Tensor) -> Cache:
    return Cache(cache.data_ptr(), cache.stride(0), cache.stride(1), cache.shape[2])
