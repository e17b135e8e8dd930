"""Rows whose older tokens are in packed blocks: sealing them, and what a step's attention needs of them.

Knows rows, blocks and tensors. Shape letters: T tokens, R rows, MBp packed blocks, BS block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.compression.attend import RowRange, Segment, plan_rows
from engine.models.batch import ForwardBatch, KVCache
from engine.scheduling.plan import Chunk
from kernels.decoder_step import PackedTokens


@dataclass(slots=True)
class _Row:
    format: str
    places: int  # groups of BS tokens per block
    block_ids: list[int] = field(default_factory=list)
    num_groups: int = 0
    numbers: list[int] = field(default_factory=list)  # of its blocks, counting those that were dropped


class PackedRows:
    """Row -> its packed blocks, from the first sealing on."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._packed: dict[int, _Row] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._packed

    def format(self, row: int) -> str:
        return self._packed[row].format

    def block_tokens(self, row: int) -> int:
        """Tokens in a full packed block."""
        return self._packed[row].places * self._cache.k.shape[3]

    def num_blocks(self, row: int) -> int:
        return len(self._packed[row].block_ids)

    def start(self, row: int, format: str, places: int, block_ids: Sequence[int]) -> None:
        """The row begins with full packed blocks that somebody else has made."""
        numbers = list(range(len(block_ids)))
        self._packed[row] = _Row(format, places, list(block_ids), len(block_ids) * places, numbers)

    def edit(self, row: int, index: int, block_id: int) -> None:
        """Reads another packed block with the same content there."""
        self._packed[row].block_ids[index] = block_id

    def remove(self, row: int) -> None:
        self._packed.pop(row, None)

    def positions(self, row: int) -> Tensor:
        """[n] int64 of the packed tokens of a row that packs its text from the start, on the CPU."""
        packed, block_tokens = self._packed[row], self.block_tokens(row)
        starts = torch.tensor(packed.numbers) * block_tokens
        places = starts.unsqueeze(1) + torch.arange(block_tokens)
        return places.flatten()[: packed.num_groups * self._cache.k.shape[3]]

    def keep_blocks(self, row: int, places: Sequence[int]) -> None:
        """Only the blocks at these places are left; all others were full."""
        packed = self._packed[row]
        packed.num_groups -= (len(packed.block_ids) - len(places)) * packed.places
        packed.block_ids = [packed.block_ids[place] for place in places]
        packed.numbers = [packed.numbers[place] for place in places]

    def seal(self, row: int, format: str, places: int, source: Sequence[int], new_block_ids: Sequence[int]) -> None:
        """Packs the blocks `source` behind what the row has; `new_block_ids` are as many as that needs beyond."""
        packed = self._packed.setdefault(row, _Row(format, places))
        packed.block_ids += new_block_ids
        first = packed.numbers[-1] + 1 if packed.numbers else 0
        packed.numbers += range(first, first + len(new_block_ids))
        groups = range(packed.num_groups, packed.num_groups + len(source))
        kernels.seal_blocks(
            self._cache.k,
            self._cache.v,
            torch.tensor(source, dtype=torch.int64),
            torch.tensor([packed.block_ids[group // places] for group in groups], dtype=torch.int64),
            torch.tensor([group % places for group in groups], dtype=torch.int64),
            format=format,
        )
        packed.num_groups += len(source)

    def segment(self, chunks: Sequence[Chunk], batch: ForwardBatch, first: int) -> PackedSegment:
        """The chunks are those of neighbouring rows of the batch, from row `first`, all of one format."""
        rows = [self._packed[chunk.row] for chunk in chunks]
        table = np.zeros((len(rows), max(len(row.block_ids) for row in rows)), dtype=np.int32)
        for place, row in enumerate(rows):
            table[place, : len(row.block_ids)] = row.block_ids
        lens = np.array([row.num_groups for row in rows], dtype=np.int32) * self._cache.k.shape[3]
        tensors = torch.from_numpy(table), torch.from_numpy(lens)
        return PackedSegment(self._cache, batch, RowRange.of(batch, first, len(rows)), rows[0].format, *tensors)


class PackedSegment(Segment):
    """Rows with packed tokens and, in an ordinary block table, the newer ones: two parts, merged.

    table  [R, MBp] int32 on the CPU
    lens   [R] int32 on the CPU, packed tokens
    """

    def __init__(
        self, cache: KVCache, batch: ForwardBatch, rows: RowRange, format: str, table: Tensor, lens: Tensor
    ) -> None:
        self.rows = rows
        self._cache, self._format = cache, format
        device = cache.k.device
        self._slots = batch.slots[rows.tokens]
        self._where = batch.block_table[rows.rows], batch.seq_lens[rows.rows], rows.starts
        self._batch, self._lens = batch, lens
        self._packed_where = table.to(device), lens.to(device), rows.starts

    @cached_property
    def _plan(self) -> kernels.AttentionPlan:
        return plan_rows(self._batch, self.rows, self._where[1], self._cache.k.shape[2])

    @cached_property
    def _packed_plan(self) -> kernels.AttentionPlan:
        cache = self._cache
        return kernels.plan_packed_attention(
            self.rows.starts.cpu(), self._lens, num_kv_heads=cache.k.shape[2], device=cache.k.device
        )

    def packed(self) -> Sequence[PackedTokens] | None:
        """See `engine.compression.attend.Segment`."""
        table, lens, starts = self._packed_where
        tokens = PackedTokens(
            tokens=self.rows.tokens,
            table=table,
            lens=lens,
            cu_seqlens_q=starts,
            format=self._format,
            plan=self._packed_plan,
        )
        return [tokens] if tokens.fits else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        """See `engine.compression.attend.Segment`. No layer has a window: such models are refused."""
        cache = self._cache
        kernels.kv_write(k, v, *cache.layer(layer), self._slots)
        _, lse = kernels.paged_attention(
            q, *cache.layer(layer), *self._where, out=out, return_lse=True, plan=self._plan, **options
        )
        part, part_lse = kernels.packed_attention(
            q,
            cache.k,
            cache.v,
            *self._packed_where,
            layer=layer,
            scale=options["scale"],
            soft_cap=options["soft_cap"],
            format=self._format,
            plan=self._packed_plan,
        )
        kernels.merge_attention(out, lse, part, part_lse)
