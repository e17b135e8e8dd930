"""The normalisation through the native library (kernel.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.native import DTYPE_CODES, FLOAT, INT, PTR


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    if weight.dtype != torch.float32:
        weight = weight.float()
    # [T, H] counts as one head.
    num_heads, x_stride_h, out_stride_h = (x.shape[1], x.stride(1), out.stride(1)) if x.dim() == 3 else (1, 0, 0)
    native.function("kvasir_rms_norm", PTR, INT, INT, PTR, INT, INT, INT, INT, INT, INT, PTR, FLOAT, INT)(
        x.data_ptr(),
        x.stride(0),
        x_stride_h,
        out.data_ptr(),
        out.stride(0),
        out_stride_h,
        DTYPE_CODES[x.dtype],
        x.shape[0],
        num_heads,
        x.shape[-1],
        weight.data_ptr(),
        eps,
        native.num_threads(),
    )


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    if weight.dtype != torch.float32:
        weight = weight.float()
    native.function("kvasir_add_rms_norm", PTR, INT, PTR, INT, PTR, INT, INT, INT, PTR, FLOAT, INT)(
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        residual.stride(0),
        out.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.shape[0],
        x.shape[1],
        weight.data_ptr(),
        eps,
        native.num_threads(),
    )
