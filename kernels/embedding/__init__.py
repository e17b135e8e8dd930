"""Row gathers: token ids -> embeddings, and the rows of hidden states that go through the LM head.

Shape letters: T tokens, V rows of the table, H hidden size, n rows asked for.
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


def _gather(source: Tensor, rows: Tensor, out_dtype: torch.dtype, source_name: str, rows_name: str) -> Tensor:
    if source.ndim != 2 or source.dtype not in _FLOATS or source.stride(1) != 1:
        raise ValueError(f"{source_name} must be [rows, H] float with contiguous rows, got {list(source.shape)}")
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise ValueError(f"{rows_name} must be [n] int64, got {list(rows.shape)} {rows.dtype}")
    out = torch.empty(rows.shape[0], source.shape[1], dtype=out_dtype, device=source.device)
    if out.numel():
        backend.implementation("embedding", source.device).gather(source, rows.contiguous(), out)
    return out
