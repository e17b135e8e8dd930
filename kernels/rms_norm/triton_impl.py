"""The normalisation on GPUs. One program takes a few rows, whole, into registers; bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE_ELEMENTS = 2048  # of one program: several short rows (q and k norms) or one long one


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,  # tokens * heads
    num_heads,
    x_stride_t,  # elements between tokens, between heads
    x_stride_h,
    residual_stride_t,
    out_stride_t,
    out_stride_h,
    eps,
    SIZE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,  # then num_heads is 1
    ROWS: tl.constexpr,
    TILE: tl.constexpr,  # SIZE rounded up to a power of two
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, TILE)  # [TILE]
    token, head = row // num_heads, row % num_heads
    mask = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    x = tl.load(x_ptr + (token * x_stride_t + head * x_stride_h)[:, None] + column[None, :], mask=mask, other=0.0)
    values = x.to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + (token * residual_stride_t)[:, None] + column[None, :]
        rounded = (values + tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(residual_ptrs, rounded, mask=mask)
        values = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / SIZE + eps)  # [ROWS]
    out_ptrs = out_ptr + (token * out_stride_t + head * out_stride_h)[:, None] + column[None, :]
    tl.store(out_ptrs, (values * scale[:, None] * weight[None, :]).to(x.dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    _launch(x, None, weight, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    _launch(x, residual, weight, eps, out)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    num_heads, x_stride_h, out_stride_h = (x.shape[1], x.stride(1), out.stride(1)) if x.dim() == 3 else (1, 0, 0)
    size = x.shape[-1]
    num_rows = x.shape[0] * num_heads
    tile = triton.next_power_of_2(size)
    rows = max(1, TILE_ELEMENTS // tile)
    _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        residual,
        weight,
        out,
        num_rows,
        num_heads,
        x.stride(0),
        x_stride_h,
        residual.stride(0) if residual is not None else 0,
        out.stride(0),
        out_stride_h,
        eps,
        SIZE=size,
        HAS_RESIDUAL=residual is not None,
        ROWS=rows,
        TILE=tile,
        num_warps=4 if tile <= 4096 else 8,
    )
