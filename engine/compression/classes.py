"""Rows whose tokens are packed in several ways at once, each kv head's own choice of them in each.

Knows rows, blocks and tensors. A class has blocks of its own; attention over them and over what is not packed is
merged. Formats that kernels know are read as they are, those of a policy's codec are decoded layer by layer.
Shape letters: T tokens, R rows, L layers, H_kv kv heads, n tokens of a class, g groups, BS block size, MB blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.compression.attend import RowRange, Scored, Segment, plan_rows, score
from engine.compression.writing import Codec
from engine.models.batch import ForwardBatch, KVCache
from engine.scheduling.compression import PackedClass
from engine.scheduling.plan import Chunk


@dataclass(slots=True)
class _Class:
    format: str
    places: int  # groups per block
    codec: Codec | None
    sizes: tuple[int, int] = (0, 0)  # bytes of a group's keys and values, of a codec
    block_ids: list[int] = field(default_factory=list)
    num_groups: int = 0


class ClassRows:
    """Row -> its classes, from the first packing on."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._classes: dict[int, list[_Class]] = {}

    def __contains__(self, row: int) -> bool:
        return row in self._classes

    def remove(self, row: int) -> None:
        self._classes.pop(row, None)

    def formats(self, row: int) -> str:
        """A name for how the row's classes are packed; rows with the same one attend together."""
        return "+".join(f"{each.format}:{each.places}:{id(each.codec)}" for each in self._classes[row])

    def pack(
        self, row: int, classes: Sequence[PackedClass], codecs: Mapping[str, Codec],
        tokens: Sequence[tuple[Tensor, Tensor]], new_block_ids: Sequence[int],
    ) -> None:  # fmt: skip
        """Packs the tokens of each class, [L, H_kv, n, D] keys and values in the pool's type, behind what the row has.

        new_block_ids   as many as all of them need beyond, those of the first class first
        """
        if row not in self._classes:
            self._classes[row] = [_Class(each.format, each.places, codecs.get(each.format)) for each in classes]
        left = list(new_block_ids)
        size = self._cache.k.shape[3]
        for each, (k, v) in zip(self._classes[row], tokens, strict=True):
            groups = range(each.num_groups, each.num_groups + k.shape[2] // size)
            each.num_groups = groups.stop
            num_new = -(-groups.stop // each.places) - len(each.block_ids)
            each.block_ids += left[:num_new]
            del left[:num_new]
            if groups:
                self._write(each, groups, *(_in_groups(x, size) for x in (k, v)))

    def _write(self, each: _Class, groups: range, k: Tensor, v: Tensor) -> None:
        """k, v: [g, L, H_kv, BS, D]."""
        device = k.device
        blocks = torch.tensor([each.block_ids[group // each.places] for group in groups], device=device)
        places = torch.tensor([group % each.places for group in groups], device=device)
        if each.codec is None:
            kernels.seal_groups(self._cache.k, self._cache.v, k, v, blocks, places, format=each.format)
            return
        coded = each.codec.encode(k.float(), v.float())
        each.sizes = coded[0].shape[3], coded[1].shape[3]
        for pool, packed in zip((self._cache.k, self._cache.v), coded, strict=True):
            units = pool.flatten(3).view(torch.uint8)
            size = packed.shape[3]
            offsets = places.unsqueeze(1) * size + torch.arange(size, device=device)
            units[blocks.unsqueeze(1), :, :, offsets] = packed.permute(0, 3, 1, 2)

    def segment(self, chunks: Sequence[Chunk], batch: ForwardBatch, first: int, scored: Scored | None) -> ClassSegment:
        """The chunks are those of neighbouring rows of the batch, from row `first`, all with the same `formats`."""
        rows = [self._classes[chunk.row] for chunk in chunks]
        return ClassSegment(self._cache, batch, RowRange.of(batch, first, len(chunks)), rows, scored)


class ClassSegment(Segment):
    """`staged`: of each layer [C, R, H_kv, S] float32, what `scored` asks for of the slots that are not packed."""

    def __init__(
        self, cache: KVCache, batch: ForwardBatch, rows: RowRange, classes: Sequence[Sequence[_Class]],
        scored: Scored | None,
    ) -> None:  # fmt: skip
        self.rows = rows
        self.staged: list[Tensor] = []
        self._cache, self._scored = cache, scored
        self._slots = batch.slots[rows.tokens]
        self._where = batch.block_table[rows.rows], batch.seq_lens[rows.rows]
        self._num_slots = int(self._where[1].max())
        self._plan = plan_rows(batch, rows, self._where[1], cache.k.shape[2])
        of_classes = zip(*classes, strict=True)
        self._parts = [
            _Part.of(cache, rows, members) for members in of_classes if any(one.num_groups for one in members)
        ]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        """See `engine.compression.attend.Segment`."""
        k_cache, v_cache = self._cache.layer(layer)
        kernels.kv_write(k, v, k_cache, v_cache, self._slots)
        _, lse = kernels.paged_attention(
            q, k_cache, v_cache, *self._where, self.rows.starts, out=out, return_lse=True, plan=self._plan, **options
        )
        for part in self._parts:
            kernels.merge_attention(out, lse, *part.attend(layer, q, options))
        if self._scored is not None:
            where = *self._where, lse
            self.staged.append(score(self._scored, layer, q, k_cache, *where, self._num_slots, options))


@dataclass(frozen=True)
class _Part:
    """One class of some rows: table [R, MB] and lens [R] int32 of tokens, as `kernels.packed_attention` takes them."""

    cache: KVCache
    rows: RowRange
    format: str
    codec: Codec | None
    sizes: tuple[int, int]
    places: int
    table: Tensor
    lens: Tensor

    @staticmethod
    def of(cache: KVCache, rows: RowRange, members: Sequence[_Class]) -> _Part:
        table = np.zeros((len(members), max(len(one.block_ids) for one in members)), dtype=np.int32)
        for place, one in enumerate(members):
            table[place, : len(one.block_ids)] = one.block_ids
        lens = np.array([one.num_groups for one in members], dtype=np.int32) * cache.k.shape[3]
        tensors = (torch.from_numpy(x).to(cache.k.device) for x in (table, lens))
        like, sizes = members[0], max(one.sizes for one in members)
        return _Part(cache, rows, like.format, like.codec, sizes, like.places, *tensors)

    def attend(self, layer: int, q: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Every packed token lies before every query: out [T, H, Dv] and lse [T, H]."""
        if self.codec is not None:
            return self._attend_decoded(self.codec, layer, q, options)
        where = self.table, self.lens, self.rows.starts
        numbers = {"scale": options["scale"], "soft_cap": options["soft_cap"]}
        return kernels.packed_attention(
            q, self.cache.k, self.cache.v, *where, layer=layer, format=self.format, **numbers
        )

    def _attend_decoded(self, codec: Codec, layer: int, q: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Each query is a row of its own over blocks that hold the decoded groups."""
        width = self.table.shape[1] * self.places
        groups = torch.arange(width, device=q.device)
        blocks = self.table.long()[:, groups // self.places].flatten().unsqueeze(1)
        places = (groups % self.places).repeat(len(self.lens)).unsqueeze(1)
        coded = []
        for pool, length in zip((self.cache.k, self.cache.v), self.sizes, strict=True):
            offsets = places * length + torch.arange(length, device=q.device)
            units = pool.flatten(3).view(torch.uint8)
            coded.append(units[blocks, layer, :, offsets].transpose(1, 2))  # [g, H_kv, bytes]
        # what is beyond a row's groups was never written: whatever it decodes to is not read
        k, v = (x.to(q.dtype).contiguous() for x in codec.decode(layer, *coded))
        lengths = self.rows.starts.diff().long()
        table = torch.arange(len(blocks), dtype=torch.int32, device=q.device).view(-1, width)
        return kernels.paged_attention(
            q,
            k,
            v,
            table.repeat_interleave(lengths, dim=0).contiguous(),
            self.lens.repeat_interleave(lengths),
            torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device),
            return_lse=True,
            scale=options["scale"],
            soft_cap=options["soft_cap"],
        )


def _in_groups(tokens: Tensor, size: int) -> Tensor:
    """[L, H_kv, n, D] -> [g, L, H_kv, BS, D]."""
    return tokens.unflatten(2, (-1, size)).permute(2, 0, 1, 3, 4).contiguous()
