"""Division of a step into the tiles of triton_impl.py; no kernels.

Rows are in three classes by their number of queries alone, so that a row is computed alike in every batch: decode (1),
few (a draft being verified) and many (a prompt chunk). The first two are divided by keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged_attention.plan import Row

SPLIT_KEYS = 512  # slots of one split; a multiple of every key tile
MAX_FEW_QUERIES = 16
FEW_TILE_ROWS = 64  # queries times heads that share a kv head, of one tile
MANY_TILE_ROWS = 128
MANY_TILE_ROWS_WIDE = 64  # where a head has more than 128 dims and registers are short


@dataclass(frozen=True)
class Tiles:
    """Work of one launch. A tile is (row, first query); an item is one range of slots of a tile."""

    num_queries: int  # queries of a tile
    items: Tensor  # [n, 4] int32: row, first query, first slot, end of slots
    tiles: Tensor  # [m, 4] int32: row, first query, first item, items
    is_split: bool  # some tile has several items: results go through the merge


class Work:
    """The launches of a step. Tiles of several queries depend on the model's heads and are made at the first layer."""

    def __init__(self, rows: tuple[Row, ...], device: torch.device) -> None:
        self._device = device
        self._few = [(i, row) for i, row in enumerate(rows) if 1 < row.num_queries <= MAX_FEW_QUERIES]
        self._many = [(i, row) for i, row in enumerate(rows) if row.num_queries > MAX_FEW_QUERIES]
        decode = [(i, row) for i, row in enumerate(rows) if row.num_queries == 1]
        self._decode = make_tiles(decode, 1, device, split=True) if decode else None
        self._others: dict[tuple[int, bool], list[Tiles]] = {}

    def launches(self, group: int, *, wide: bool) -> Iterator[Tiles]:
        """Tiles for `group` query heads per kv head, at most one launch per class."""
        if self._decode is not None:
            yield self._decode
        key = group, wide
        if key not in self._others:
            self._others[key] = self._make_others(group, wide)
        yield from self._others[key]

    def _make_others(self, group: int, wide: bool) -> list[Tiles]:
        made = []
        if self._few:
            queries = min(MAX_FEW_QUERIES, max(1, FEW_TILE_ROWS // group))
            made.append(make_tiles(self._few, queries, self._device, split=True))
        if self._many:
            queries = max(1, (MANY_TILE_ROWS_WIDE if wide else MANY_TILE_ROWS) // group)
            made.append(make_tiles(self._many, queries, self._device, split=False))
        return made


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> Work:
    """Decoding rows' tiles at once, the others when the model's heads are known."""
    return Work(rows, device)


def make_tiles(rows: list[tuple[int, Row]], num_queries: int, device: torch.device, *, split: bool) -> Tiles:
    """Tiles of `num_queries` queries, those with most slots first."""
    tiles: list[tuple[int, int, int, int]] = []
    items: list[tuple[int, int, int, int]] = []
    spans = [  # end of slots, row, first query
        (max(1, seq_len - count + min(first + num_queries, count)), index, first)
        for index, (count, seq_len) in rows
        for first in range(0, count, num_queries)
    ]
    for end, index, first in sorted(spans, key=lambda span: -span[0]):
        step = SPLIT_KEYS if split else end
        ranges = [(index, first, slot, slot + step) for slot in range(0, end, step)]
        tiles.append((index, first, len(items), len(ranges)))
        items.extend(ranges)
    return Tiles(
        num_queries=num_queries,
        items=torch.tensor(items, dtype=torch.int32).to(device, non_blocking=True),
        tiles=torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True),
        is_split=len(items) > len(tiles),
    )
