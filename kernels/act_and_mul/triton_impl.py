"""Gated activations on GPUs. One program computes one tile of one row; bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x) without an overflow on either side."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """The activation of `act_and_mul`, in float32."""
    if ACTIVATION == "silu":
        value = gate * _sigmoid(gate)
    elif ACTIVATION == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        value = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    return value


@triton.jit
def _act_and_mul_kernel(
    gate_up_ptr,
    out_ptr,
    size,  # columns of the result
    gate_up_stride,  # elements between rows
    ACTIVATION: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)  # [TILE]
    mask = column < size
    gate = tl.load(gate_up_ptr + row * gate_up_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_stride + size + column, mask=mask, other=0.0).to(tl.float32)
    value = activated(gate, ACTIVATION) * up
    tl.store(out_ptr + row * size + column, value.to(out_ptr.dtype.element_ty), mask=mask)


def act_and_mul(gate_up: Tensor, activation: str, out: Tensor) -> None:
    rows, size = out.shape
    tile = min(1024, triton.next_power_of_2(size))
    _act_and_mul_kernel[(rows, triton.cdiv(size, tile))](
        gate_up, out, size, gate_up.stride(0), ACTIVATION=activation, TILE=tile
    )
