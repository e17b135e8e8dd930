"""The merge through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import DTYPE_CODES, INT, PTR


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    native.function("kvasir_merge_attention", *[PTR, INT, INT, INT] * 2, PTR, PTR, *[INT] * 4)(
        *(out_a.data_ptr(), DTYPE_CODES[out_a.dtype], out_a.stride(0), out_a.stride(1)),
        *(out_b.data_ptr(), DTYPE_CODES[out_b.dtype], out_b.stride(0), out_b.stride(1)),
        *(lse_a.data_ptr(), lse_b.data_ptr()),
        *out_a.shape,
        native.num_threads(),
    )
