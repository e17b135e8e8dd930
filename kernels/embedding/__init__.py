"""Row gathers: token ids -> embeddings, and the rows of hidden states that go through the LM head.

Shape letters: T tokens, V rows of the table, H hidden size, n rows asked for, R segments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows `ids` of `table`.

    ids    [T] int64, 0 <= id < V: not checked here, the engine refuses others at admission
    table  [V, H] float, rows contiguous
    Returns [T, H]: float32 on CPU, where activations are float32 whatever the weights are; the table's type on GPUs.
    Raises ValueError when shapes or types disagree.
    """
    out_dtype = torch.float32 if table.device.type == "cpu" else table.dtype
    return _gather(table, ids, out_dtype, "table", "ids")


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `rows` of `x`, in its own type.

    x     [T, H] float, rows contiguous
    rows  [n] int64, 0 <= row < T: not checked
    Returns [n, H]. Raises ValueError when shapes or types disagree.
    """
    return _gather(x, rows, x.dtype, "x", "rows")


def gather_last(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, bool]:
    """The last row of every segment of `x`, in its own type, and whether every element of `x` is finite.

    x           [T, H] float, rows contiguous
    cu_seqlens  [R + 1] int32: segment r is the rows [cu_seqlens[r], cu_seqlens[r + 1]), at least one: not checked
    Returns [R, H] and the verdict. Raises ValueError when shapes or types disagree.
    """
    if x.ndim != 2 or x.dtype not in _FLOATS or x.stride(1) != 1:
        raise ValueError(f"x must be [rows, H] float with contiguous rows, got {list(x.shape)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [R + 1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    out = torch.empty(cu_seqlens.shape[0] - 1, x.shape[1], dtype=x.dtype, device=x.device)
    is_finite = backend.implementation("embedding", x.device).gather_last(x, cu_seqlens.contiguous(), out)
    return out, is_finite


def _gather(source: Tensor, rows: Tensor, out_dtype: torch.dtype, source_name: str, rows_name: str) -> Tensor:
    if source.ndim != 2 or source.dtype not in _FLOATS or source.stride(1) != 1:
        raise ValueError(f"{source_name} must be [rows, H] float with contiguous rows, got {list(source.shape)}")
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"{rows_name} must be [n] int64, got {list(rows.shape)} {rows.dtype}")
    out = torch.empty(rows.shape[0], source.shape[1], dtype=out_dtype, device=source.device)
    if out.numel():
        backend.implementation("embedding", source.device).gather(source, rows.contiguous(), out)
    return out
