"""Division of a step into the tiles of triton_impl.py; no kernels.

Rows are in four classes by their number of queries alone, so that a row is computed alike in every batch: decode (1),
few (a draft being verified), a tree (a large draft) and many (a prompt chunk). All but the last are divided by keys. A
decoding step that is captured in a graph has room for a fixed number of items, filled in before each replay
(`FixedWork`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.paged_attention.plan import MAX_TREE_NODES, Row

SPLIT_KEYS = 512  # slots of one split; a multiple of every key tile
MAX_FEW_QUERIES = 16
MAX_TREE_QUERIES = 1 + MAX_TREE_NODES
FEW_TILE_ROWS = 64  # queries times heads that share a kv head, of one tile
MANY_TILE_ROWS = 128
MANY_TILE_ROWS_WIDE = 64  # where a head has more than 128 dims and registers are short


@dataclass(frozen=True)
class Tiles:
    """Work of one launch. A tile is (row, first query); an item is one range of slots of a tile."""

    num_queries: int  # queries of a tile
    items: Tensor  # [n, 4] int32: row (-1: no work), first query, first slot, end of slots
    tiles: Tensor  # [m, 4] int32: row, first query, first item, items
    is_split: bool  # some tile has several items: results go through the merge


class Work:
    """The launches of a step. Tiles of several queries depend on the model's heads and are made at the first layer."""

    def __init__(self, rows: tuple[Row, ...], device: torch.device) -> None:
        self._device = device
        self._few = [(i, row) for i, row in enumerate(rows) if 1 < row.num_queries <= MAX_FEW_QUERIES]
        trees = range(MAX_FEW_QUERIES + 1, MAX_TREE_QUERIES + 1)
        self._trees = [(i, row) for i, row in enumerate(rows) if row.num_queries in trees]
        self._many = [(i, row) for i, row in enumerate(rows) if row.num_queries > MAX_TREE_QUERIES]
        decode = [i for i, row in enumerate(rows) if row.num_queries == 1]
        self._decode = decode_tiles(decode, [rows[i].seq_len for i in decode], device) if decode else None
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
        queries = max(1, (MANY_TILE_ROWS_WIDE if wide else MANY_TILE_ROWS) // group)
        if self._trees:
            made.append(make_tiles(self._trees, queries, self._device, split=True))
        if self._many:
            made.append(make_tiles(self._many, queries, self._device, split=False))
        return made


class FixedWork:
    """One launch for decoding rows with room for `num_items` items, whose addresses stay the same."""

    def __init__(self, num_rows: int, num_items: int, device: torch.device) -> None:
        self._num_rows, self._num_items = num_rows, num_items
        self._table = torch.empty(num_items + num_rows, 4, dtype=torch.int32, device=device)
        items, tiles = self._table.split([num_items, num_rows])
        self._tiles = Tiles(num_queries=1, items=items, tiles=tiles, is_split=num_items > num_rows)

    def launches(self, group: int, *, wide: bool) -> Iterator[Tiles]:
        """The one launch, whatever the model's heads."""
        yield self._tiles

    def fill(self, seq_lens: np.ndarray) -> None:
        """Items of these rows; the copy to the device is queued behind what runs there. Raises ValueError when there
        is no room for them.
        """
        items, tiles = decode_items(np.arange(self._num_rows), seq_lens)
        if len(items) > self._num_items:
            raise ValueError(f"the rows take {len(items)} items, the plan has room for {self._num_items}")
        unused = np.full((self._num_items - len(items), 4), -1, dtype=np.int32)
        self._table.copy_(on_host(np.concatenate([items, unused, tiles]), self._table.device), non_blocking=True)


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> Work:
    """Decoding rows' tiles at once, the others when the model's heads are known."""
    return Work(rows, device)


def fixed_plan(num_rows: int, num_items: int, device: torch.device) -> FixedWork:
    """See `kernels.paged_attention.fixed_decode_plan`."""
    return FixedWork(num_rows, num_items, device)


def num_decode_items(seq_lens: Sequence[int] | np.ndarray) -> int:
    """Items that decoding rows of these lengths take."""
    return int(_num_splits(np.asarray(seq_lens)).sum())


def _num_splits(seq_lens: np.ndarray) -> np.ndarray:
    return np.maximum(1, -(-seq_lens // SPLIT_KEYS))


def decode_items(rows: np.ndarray, seq_lens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items [n, 4] and tiles [m, 4] of rows of one query, those with most slots first."""
    order = np.argsort(-seq_lens, kind="stable")
    rows, counts = rows[order], _num_splits(seq_lens[order])
    firsts = np.cumsum(counts) - counts
    tiles = np.stack([rows, np.zeros_like(rows), firsts, counts], axis=1)
    begin = (np.arange(counts.sum()) - np.repeat(firsts, counts)) * SPLIT_KEYS
    items = np.stack([np.repeat(rows, counts), np.zeros_like(begin), begin, begin + SPLIT_KEYS], axis=1)
    return items.astype(np.int32), tiles.astype(np.int32)


def decode_tiles(rows: Sequence[int], seq_lens: Sequence[int], device: torch.device) -> Tiles:
    """Tiles of rows of one query."""
    items, tiles = decode_items(np.asarray(rows), np.asarray(seq_lens))
    table = on_host(np.concatenate([items, tiles]), device).to(device, non_blocking=True)
    on_device = table.split([len(items), len(tiles)])
    return Tiles(num_queries=1, items=on_device[0], tiles=on_device[1], is_split=len(items) > len(tiles))


def on_host(values: np.ndarray | list[tuple[int, int, int, int]], device: torch.device) -> Tensor:
    """int32, in pinned memory if it will be copied to a GPU: then nobody waits for the copy."""
    tensor = torch.from_numpy(np.asarray(values, dtype=np.int32))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def make_tiles(rows: list[tuple[int, Row]], num_queries: int, device: torch.device, *, split: bool) -> Tiles:
    """Tiles of `num_queries` queries of rows that have several, those with most slots first."""
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
        items=on_host(items, device).to(device, non_blocking=True),
        tiles=on_host(tiles, device).to(device, non_blocking=True),
        is_split=len(items) > len(tiles),
    )
