"""The transform through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import DTYPE_CODES, FLOAT, INT, PTR


def hadamard(x: Tensor, scale: float, out: Tensor) -> None:
    """x, out [N, size]."""
    native.function("kvasir_hadamard", PTR, INT, INT, INT, FLOAT, PTR, INT)(
        x.data_ptr(), x.shape[0], x.shape[1], DTYPE_CODES[x.dtype], scale, out.data_ptr(), native.num_threads()
    )
