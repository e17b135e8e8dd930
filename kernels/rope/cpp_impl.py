"""Rotation through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import DTYPE_CODES, INT, PTR


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    positions = positions.contiguous()
    native.function("kvasir_apply_rope", PTR, INT, INT, INT, INT, INT, INT, PTR, PTR, INT, INT, INT)(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.stride(0),
        x.stride(1),
        *x.shape,
        positions.data_ptr(),
        cos_sin.data_ptr(),
        cos_sin.shape[1],
        interleaved,
        native.num_threads(),
    )
