"""The bounds through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import DTYPE_CODES, INT, PTR


def update_bounds(k_cache: Tensor, bounds: Tensor, slots: Tensor) -> None:
    native.function("kvasir_update_bounds", *[PTR, INT, INT] * 2, PTR, *[INT] * 6)(
        *(k_cache.data_ptr(), k_cache.stride(0), k_cache.stride(1)),
        *(bounds.data_ptr(), bounds.stride(0), bounds.stride(1)),
        slots.data_ptr(),
        slots.shape[0],
        *k_cache.shape[1:],
        DTYPE_CODES[k_cache.dtype],
        native.num_threads(),
    )


def bound_scores(q: Tensor, bounds: Tensor, block_table: Tensor, num_blocks: Tensor, scores: Tensor) -> None:
    """See `kernels.block_bounds.bound_scores`; num_blocks [R] int32. Writes scores [R, H_kv, MB]."""
    native.function("kvasir_bound_scores", *[PTR, INT, INT, INT] * 2, PTR, INT, PTR, PTR, *[INT] * 6)(
        *(q.data_ptr(), q.stride(0), q.stride(1), DTYPE_CODES[q.dtype]),
        *(bounds.data_ptr(), bounds.stride(0), bounds.stride(1), DTYPE_CODES[bounds.dtype]),
        *(block_table.data_ptr(), block_table.stride(0)),
        num_blocks.data_ptr(),
        scores.data_ptr(),
        *scores.shape,
        q.shape[1],
        q.shape[2],
        native.num_threads(),
    )
