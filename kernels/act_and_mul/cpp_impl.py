"""Gated activations through the native library (kernel.cpp)."""

from __future__ import annotations

from torch import Tensor

from kernels import native
from kernels.act_and_mul import ACTIVATIONS
from kernels.native import DTYPE_CODES, INT, PTR


def act_and_mul(gate_up: Tensor, activation: str, out: Tensor) -> None:
    native.function("kvasir_act_and_mul", PTR, INT, INT, INT, INT, INT, PTR, INT)(
        gate_up.data_ptr(),
        gate_up.stride(0),
        out.shape[0],
        out.shape[1],
        DTYPE_CODES[out.dtype],
        ACTIVATIONS.index(activation),
        out.data_ptr(),
        native.num_threads(),
    )
