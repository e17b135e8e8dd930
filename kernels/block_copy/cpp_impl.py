"""Block copy through the native library (kernel.cpp): one memcpy a pair."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import INT, PTR


def copy_blocks(pool: Tensor, pairs: Tensor) -> None:
    pairs = pairs.contiguous()
    native.function("kvasir_copy_blocks", PTR, INT, PTR, INT)(
        pool.data_ptr(), pool.stride(0) * pool.element_size(), pairs.data_ptr(), pairs.shape[0]
    )
