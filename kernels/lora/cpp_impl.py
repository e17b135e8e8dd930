"""The grouped product through the native library (kernel.cpp): float32 activations, matrices of any float type."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.lora.plan import LoraPlan
from kernels.lora.table import LoraTable
from kernels.native import INT, PTR


def add_lora(y: Tensor, x: Tensor, table: LoraTable, plan: LoraPlan) -> None:
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}; the native product takes torch.float32 activations")
    inner = torch.empty(plan.num_rows, table.num_parts, table.max_rank)  # written before it is read
    native.function("kvasir_lora", *[PTR, INT] * 2, INT, PTR, *[PTR, INT] * 2, PTR, PTR, *[INT] * 3)(
        y.data_ptr(),
        y.stride(0),
        x.data_ptr(),
        x.stride(0),
        table.in_features,
        plan.rows.data_ptr(),
        plan.blocks.data_ptr(),
        plan.blocks.shape[0],
        table.entries.data_ptr(),
        table.num_parts,
        table.scales.data_ptr(),
        inner.data_ptr(),
        table.max_rank,
        table.max_columns,
        native.num_threads(),
    )
