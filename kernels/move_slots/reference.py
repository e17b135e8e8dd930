"""Definition of the move: segment by segment, a copy of all sources first."""

from __future__ import annotations

from torch import Tensor


def move_slots(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    for sources, destinations in zip(src.tolist(), dst.tolist(), strict=True):
        pairs = [(s, d) for s, d in zip(sources, destinations, strict=True) if s >= 0 and d >= 0]
        read = [pool[source].clone() for source, _ in pairs]
        for row, (_, destination) in zip(read, pairs, strict=True):
            pool[destination] = row
