"""The move through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.native import INT, PTR


def move_slots(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    src, dst = src.contiguous(), dst.contiguous()
    native.function("kvasir_move_slots", PTR, INT, PTR, PTR, INT, INT, INT)(
        pool.data_ptr(),
        pool.stride(0) * pool.element_size(),
        src.data_ptr(),
        dst.data_ptr(),
        *src.shape,
        native.num_threads(),
    )
