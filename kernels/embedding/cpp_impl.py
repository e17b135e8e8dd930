"""Row gathers through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import DTYPE_CODES, INT, PTR


def gather(source: Tensor, rows: Tensor, out: Tensor) -> None:
    native.function("kvasir_gather_rows", PTR, INT, INT, PTR, INT, INT, PTR, INT)(
        source.data_ptr(),
        source.stride(0),
        DTYPE_CODES[source.dtype],
        rows.data_ptr(),
        rows.shape[0],
        source.shape[1],
        out.data_ptr(),
        DTYPE_CODES[out.dtype],
    )


def gather_last(x: Tensor, cu_seqlens: Tensor, out: Tensor) -> bool:
    function = native.function("kvasir_gather_last", PTR, INT, INT, PTR, INT, INT, PTR, restype=INT)
    num_rows, size = out.shape
    return bool(
        function(x.data_ptr(), x.stride(0), DTYPE_CODES[x.dtype], cu_seqlens.data_ptr(), num_rows, size, out.data_ptr())
    )
