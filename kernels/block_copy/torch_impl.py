"""Block copy by indexing: gathers all sources, then scatters them."""

from __future__ import annotations

from torch import Tensor


def copy_blocks(pool: Tensor, pairs: Tensor) -> None:
    pool[pairs[:, 1]] = pool[pairs[:, 0]]
