"""Definition of the block copy."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(pool: Tensor, pairs: Tensor) -> None:
    for source, destination in pairs.tolist():
        pool[destination] = pool[source]
