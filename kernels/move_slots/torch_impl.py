"""The move by indexing: gathers the sources of all segments, then scatters them."""

from __future__ import annotations

from torch import Tensor


def move_slots(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    moved = (src >= 0) & (dst >= 0) & (src != dst)
    pool[dst[moved]] = pool[src[moved]]
