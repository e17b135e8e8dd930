"""The grouped product on GPUs, in two kernels: inner vectors of all tokens, then what they add to y.

A program takes up to BLOCK_ROWS tokens of one adapter and a tile of one part's rank, or of its columns, and finds the
adapter's matrices through the addresses in the table. Bound by reading the matrices for few tokens and by latency for
one or two; no split along K, so that a token's result does not depend on the batch.
Scheme: Chen et al. 2023, arXiv:2310.18547 (Punica's SGMV), with tiles of the matrix units instead of vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.lora.plan import BLOCK_ROWS, LoraPlan
from kernels.lora.table import ENTRY_FIELDS, LoraTable

BLOCK_RANK, BLOCK_K, BLOCK_N = 16, 64, 64

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _shrink_kernel(
    x_ptr,
    rows_ptr,
    blocks_ptr,
    entries_ptr,
    scales_ptr,
    inner_ptr,  # [n, NUM_PARTS, max_rank] float32
    max_rank,
    x_stride_t,  # elements between tokens
    NUM_PARTS: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    K: tl.constexpr,  # few values per model
    DTYPE: tl.constexpr,  # of the matrices
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    adapter = tl.load(blocks_ptr + block * 3)
    first = tl.load(blocks_ptr + block * 3 + 1)
    num_rows = tl.load(blocks_ptr + block * 3 + 2)
    entry_ptr = entries_ptr + (adapter * NUM_PARTS + part) * NUM_FIELDS
    rank = tl.load(entry_ptr + 3)
    j = tl.program_id(2) * BLOCK_RANK + tl.arange(0, BLOCK_RANK).to(tl.int64)  # [BLOCK_RANK]
    if tl.program_id(2) * BLOCK_RANK < rank:
        i = tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        token = tl.load(rows_ptr + first + i, mask=i < num_rows, other=0)
        a_ptr = tl.load(entry_ptr).to(tl.pointer_type(DTYPE))
        sums = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)  # [BLOCK_K]
            x_mask = (i < num_rows)[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + token[:, None] * x_stride_t + k[None, :], mask=x_mask, other=0.0)
            a_mask = (j < rank)[None, :] & (k < K)[:, None]
            a = tl.load(a_ptr + j[None, :] * K + k[:, None], mask=a_mask, other=0.0)
            if x.dtype != a.dtype:
                x, a = x.to(tl.float32), a.to(tl.float32)
            sums += tl.dot(x, a, input_precision="ieee")
        sums *= tl.load(scales_ptr + adapter * NUM_PARTS + part)
        inner_ptrs = inner_ptr + ((first + i)[:, None] * NUM_PARTS + part) * max_rank + j[None, :]
        tl.store(inner_ptrs, sums, mask=(i < num_rows)[:, None] & (j < rank)[None, :])


@triton.jit
def _expand_kernel(
    y_ptr,
    rows_ptr,
    blocks_ptr,
    entries_ptr,
    inner_ptr,
    max_rank,
    y_stride_t,
    NUM_PARTS: tl.constexpr,
    NUM_FIELDS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    adapter = tl.load(blocks_ptr + block * 3)
    first = tl.load(blocks_ptr + block * 3 + 1)
    num_rows = tl.load(blocks_ptr + block * 3 + 2)
    entry_ptr = entries_ptr + (adapter * NUM_PARTS + part) * NUM_FIELDS
    rank = tl.load(entry_ptr + 3)
    num_columns = tl.load(entry_ptr + 5)
    column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
    if (rank > 0) & (tl.program_id(2) * BLOCK_N < num_columns):
        i = tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        token = tl.load(rows_ptr + first + i, mask=i < num_rows, other=0)
        b_ptr = tl.load(entry_ptr + 1).to(tl.pointer_type(DTYPE))
        sums = tl.zeros((BLOCK_ROWS, BLOCK_N), dtype=tl.float32)
        for j0 in range(0, rank, BLOCK_RANK):
            j = j0 + tl.arange(0, BLOCK_RANK)  # [BLOCK_RANK]
            inner_ptrs = inner_ptr + ((first + i)[:, None] * NUM_PARTS + part) * max_rank + j[None, :]
            inner = tl.load(inner_ptrs, mask=(i < num_rows)[:, None] & (j < rank)[None, :], other=0.0)
            b_mask = (j < rank)[:, None] & (column < num_columns)[None, :]
            b = tl.load(b_ptr + j[:, None] * num_columns + column[None, :], mask=b_mask, other=0.0)
            sums += tl.dot(inner, b.to(tl.float32), input_precision="ieee")
        y_ptrs = y_ptr + token[:, None] * y_stride_t + (tl.load(entry_ptr + 4) + column)[None, :]
        mask = (i < num_rows)[:, None] & (column < num_columns)[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0)
        tl.store(y_ptrs, (y.to(tl.float32) + sums).to(y.dtype), mask=mask)


def add_lora(y: Tensor, x: Tensor, table: LoraTable, plan: LoraPlan) -> None:
    if table.dtype is None:
        raise ValueError("the Triton product needs a table of one type; give LoraTable a dtype")
    inner = torch.empty(plan.num_rows, table.num_parts, table.max_rank, dtype=torch.float32, device=x.device)
    num_blocks = plan.blocks.shape[0]
    _shrink_kernel[(num_blocks, table.num_parts, triton.cdiv(table.max_rank, BLOCK_RANK))](
        x,
        plan.rows,
        plan.blocks,
        table.entries,
        table.scales,
        inner,
        table.max_rank,
        x.stride(0),
        NUM_PARTS=table.num_parts,
        NUM_FIELDS=len(ENTRY_FIELDS),
        K=table.in_features,
        DTYPE=_TYPES[table.dtype],
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_RANK=BLOCK_RANK,
        BLOCK_K=BLOCK_K,
    )
    _expand_kernel[(num_blocks, table.num_parts, triton.cdiv(table.max_columns, BLOCK_N))](
        y,
        plan.rows,
        plan.blocks,
        table.entries,
        inner,
        table.max_rank,
        y.stride(0),
        NUM_PARTS=table.num_parts,
        NUM_FIELDS=len(ENTRY_FIELDS),
        DTYPE=_TYPES[table.dtype],
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_RANK=BLOCK_RANK,
        BLOCK_N=BLOCK_N,
    )
