"""Definition of the row gather."""

from __future__ import annotations

from torch import Tensor


def gather(source: Tensor, rows: Tensor, out: Tensor) -> None:
    for i, row in enumerate(rows.tolist()):
        out[i] = source[row]
