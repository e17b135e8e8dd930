"""Makes compactions: shows the policy what is there, and moves, packs or lets go of the rest as it says.

Knows rows, tables and tensors. Shape letters: L layers, H_kv kv heads, n slots present.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, cast

import msgspec
import numpy as np
import torch
from torch import Tensor

import kernels
from engine.compression import registry
from engine.compression.apply import SlotMap, flat, move, part_of
from engine.compression.base import CompactionView, Keep
from engine.compression.classes import ClassRows
from engine.compression.composed import Composed, choose_blocks, format_of
from engine.compression.formats import PackedPolicy
from engine.compression.packed import PackedRows
from engine.compression.razor_attention import Compensation
from engine.compression.registry import Hook
from engine.compression.scoring import ScoringPolicy, indices
from engine.compression.selecting import BoundedRows
from engine.compression.side import SideRows
from engine.compression.split import SplitRows
from engine.compression.state import RowState
from engine.compression.writing import codecs_of
from engine.execution.rows import RowTable
from engine.models.batch import KVCache
from engine.scheduling.compression import CachePlan, Realisation
from engine.scheduling.plan import Chunk, Compaction


class Compactions:
    def __init__(
        self, cache: KVCache, rows: RowTable, split: SplitRows, packed: PackedRows, bounded: BoundedRows,
        classes: ClassRows, side: SideRows,
    ) -> None:  # fmt: skip
        self._cache = cache
        self._rows = rows
        self._split = split
        self._packed = packed
        self._bounded = bounded
        self._classes = classes
        self._side = side
        self._num_layers = cache.k.shape[1]
        self._device = cache.k.device

    def make(self, chunk: Chunk, compaction: Compaction, state: RowState) -> dict[str, Any]:
        """Makes the compaction of a chunk that has been computed.

        Returns the fields of the chunk's result that the scheduler learns from it.
        """
        row = chunk.row
        end = chunk.start + chunk.num_tokens
        packing = format_of(state.policy)
        is_evicting = packing is None or (end == state.plan.first_point and state.plan.num_evicted > 0)
        if compaction.num_packed is not None:
            return self._drop_packed(row, compaction.num_packed, state, end)
        if packing is not None and not is_evicting:
            self._pack(chunk, compaction, packing, state.plan.places)
            return {}
        is_split = row in self._split
        tables = self._split.tables(row) if is_split else [self._rows.block_ids(row).tolist()]
        num_slots = self._split.num_slots(row) if is_split else np.array([end - self._rows.num_dropped(row)])
        source = SlotMap(self._cache, tables)
        num_kept = compaction.kept if packing is None else (end - state.plan.num_evicted,)
        view = self._view(state, source, end, self._per_head(num_slots), self._per_head(num_kept))
        if row in self._bounded:
            view = replace(view, scores=self._bounded.stamps(row, view.positions.shape[2]))
        keep = state.policy.keep(view)
        if row in self._side:
            self._side.keep(row, keep.index)
        if state.plan.is_adaptive:
            compaction = _settled(compaction, keep, self._cache.k.shape[3])
        if state.plan.realisation is Realisation.BLOCKS:
            return self._keep_blocks(row, state, view, keep)
        if packing is None and Hook.COMPENSATION in registry.needs(state.policy):
            self._compensate(state, view, keep)
        facts: dict[str, Any] = {} if keep.merge_to is None else {"num_merged": _num_merged(keep.merge_to)}
        if packing is not None:
            state.scores = None  # it has chosen for good
            self._pack_survivors(row, source, compaction, keep, packing, state.plan.places)
            self._rows.compact(row, compaction.tables[0], end - compaction.kept[0])
            return facts
        if state.plan.is_adaptive:
            facts["kept"] = compaction.kept
        if state.plan.classes:
            self._pack_classes(row, source, state, keep, view.num_packed, compaction.packed)
        move(self._cache, source, SlotMap(self._cache, compaction.tables), keep)
        state.positions = view.positions.gather(2, keep.index.clamp_min(0)).masked_fill(keep.index < 0, -1)
        state.num_positioned = end
        if state.policy.evidence is not None:
            kept = keep.index.clamp_min(0).expand(view.scores.shape[0], -1, -1, -1)
            state.scores = None if state.policy.evidence.resets else view.scores.gather(3, kept)
            state.num_scored = state.scored_for = end
        if len(compaction.tables) > 1:
            self._split.set(row, compaction)
        else:
            self._rows.compact(row, compaction.tables[0], end - compaction.kept[0])
        return facts

    def _pack(self, chunk: Chunk, compaction: Compaction, policy: PackedPolicy, places: int) -> None:
        """The oldest blocks of the row's table are packed and leave it."""
        row, end, num_kept = chunk.row, chunk.start + chunk.num_tokens, compaction.kept[0]
        num_packed = (end - self._rows.num_dropped(row) - num_kept) // self._cache.k.shape[3]
        source = self._rows.block_ids(row).tolist()
        self._packed.seal(row, policy.format, places, source[:num_packed], compaction.packed)
        copies = [pair for pair in zip(source[num_packed:], compaction.tables[0], strict=True) if pair[0] != pair[1]]
        kernels.copy_blocks(self._cache.k, self._cache.v, torch.tensor(copies, dtype=torch.int64).view(-1, 2))
        self._rows.compact(row, compaction.tables[0], end - num_kept)

    def _pack_survivors(
        self, row: int, source: SlotMap, compaction: Compaction, keep: Keep, policy: PackedPolicy, places: int
    ) -> None:
        """Survivors go, some blocks at a time, through the row's new blocks into packed ones; the newest stay there."""
        table, size = compaction.tables[0], self._cache.k.shape[3]
        through = SlotMap(self._cache, [table])
        num_packed, num_survivors = keep.index.shape[2] - compaction.kept[0], keep.index.shape[2]
        for first in range(0, num_packed, len(table) * size):
            last = min(first + len(table) * size, num_packed)
            move(self._cache, source, through, part_of(keep, first, last))
            new_blocks = () if first else compaction.packed
            self._packed.seal(row, policy.format, places, table[: (last - first) // size], new_blocks)
        move(self._cache, source, through, part_of(keep, num_packed, num_survivors))

    def _pack_classes(
        self, row: int, source: SlotMap, state: RowState, keep: Keep, counts: Sequence[int], block_ids: Sequence[int]
    ) -> None:
        """What the policy has put into classes, of each kv head its own tokens, goes into their packed blocks."""
        if keep.cls is None:
            raise ValueError("the plan has classes, and keep returned no cls")
        tokens = []
        for number, count in enumerate(counts, start=1):
            chosen = keep.cls == number
            if not bool((chosen.sum(-1) == count).all()):
                raise ValueError(f"class {number} takes {count} tokens of every layer and kv head")
            addresses = source.addresses(indices(chosen, count))
            tokens.append((flat(self._cache.k)[addresses], flat(self._cache.v)[addresses]))
        self._classes.pack(row, state.plan.classes, codecs_of(state.policy), tokens, block_ids)

    def _drop_packed(self, row: int, num_kept: int, state: RowState, end: int) -> dict[str, Any]:
        """Whole packed blocks leave; nothing is moved."""
        assert isinstance(state.policy, Composed), "a rung that evicts from what a format has packed"
        positions = self._packed.positions(row).to(self._device)
        shape = self._num_layers, self._cache.k.shape[2], len(positions)
        counts = torch.full(shape[:2], len(positions), dtype=torch.int64, device=self._device)
        block_tokens = self._packed.block_tokens(row)
        view = CompactionView(
            scores=torch.zeros(1, *shape, device=self._device),
            positions=positions.expand(shape),
            num_present=counts,
            num_kept=(counts - (self._packed.num_blocks(row) - num_kept) * block_tokens),
            num_prompt_tokens=state.num_prompt_tokens,
            num_tokens=end,
            seed=state.seed,
            keys=_nothing,
            values=_nothing,
        )
        places = choose_blocks(cast(ScoringPolicy, state.policy.base), view, block_tokens, num_kept)
        self._packed.keep_blocks(row, places)
        return {"kept_blocks": tuple(places)}

    def _keep_blocks(self, row: int, state: RowState, view: CompactionView, keep: Keep) -> dict[str, Any]:
        """Whole blocks leave the table; the others stay where they are."""
        block_size = self._cache.k.shape[3]
        places = (keep.index[0, 0, ::block_size] // block_size).tolist()
        block_ids = self._rows.block_ids(row)[places].tolist()
        self._rows.compact(row, block_ids, view.num_tokens - keep.index.shape[2])
        if row in self._bounded:
            self._bounded.keep_blocks(row, places)
        state.positions = view.positions.gather(2, keep.index)
        state.num_positioned = view.num_tokens
        return {"kept_blocks": tuple(places)}

    def _compensate(self, state: RowState, view: CompactionView, keep: Keep) -> None:
        """What is about to be dropped joins what stands for it."""
        num_slots = view.positions.shape[2]
        slots = torch.arange(num_slots, device=self._device)
        for layer in range(self._num_layers):
            if len(state.dropped) == layer:
                state.dropped.append(self.no_compensation())
            index = keep.index[layer]
            num_kept = torch.zeros_like(view.positions[layer]).scatter_add(1, index.clamp_min(0), (index >= 0).long())
            is_dropped = (slots < view.num_present[layer].unsqueeze(1)) & (num_kept == 0)  # [H_kv, n]
            keys, values = (rows.where(is_dropped.unsqueeze(2), 0.0) for rows in (view.keys(layer), view.values(layer)))
            state.dropped[layer] = state.dropped[layer].add(keys, values, is_dropped)

    def no_compensation(self) -> Compensation:
        k, v = self._cache.k, self._cache.v
        return Compensation.none(k.shape[2], k.shape[4], v.shape[4], self._device)

    def _per_head(self, counts: Sequence[int] | np.ndarray) -> Tensor:
        """One number, one per layer, or one per (layer, kv head) -> [L, H_kv] int64."""
        num_heads = self._cache.k.shape[2]
        values = torch.as_tensor(counts, dtype=torch.int64).to(self._device)
        if len(values) == self._num_layers * num_heads:
            return values.view(self._num_layers, num_heads)
        return values.view(-1, 1).expand(self._num_layers, num_heads)

    def _view(self, state: RowState, source: SlotMap, end: int, present: Tensor, num_kept: Tensor) -> CompactionView:
        num_slots = int(present.max())
        shape = *present.shape, num_slots
        num_channels = 1 if state.policy.evidence is None else state.policy.evidence.channels
        scores = torch.zeros(num_channels, *shape, dtype=torch.float32, device=self._device)
        if state.scores is not None:
            scores[..., : state.scores.shape[3]] = state.scores
        return CompactionView(
            scores=scores,
            positions=self._positions(state, end, present, num_slots),
            num_present=present,
            num_kept=num_kept,
            num_prompt_tokens=state.num_prompt_tokens,
            num_tokens=end,
            seed=state.seed,
            keys=lambda layer: source.layer(self._cache.k, layer, num_slots),
            values=lambda layer: source.layer(self._cache.v, layer, num_slots),
            num_packed=_num_to_pack(state.plan, end),
            side=None if state.side is None else partial(_side_of, state.side, num_slots),
        )

    def _positions(self, state: RowState, end: int, present: Tensor, num_slots: int) -> Tensor:
        """[L, H_kv, n] int64 of all slots, -1 where a head has fewer."""
        slots = torch.arange(num_slots, device=self._device).expand(*present.shape, -1)
        positions = slots + end - present.unsqueeze(2)  # the newest slot has the newest token, and so on back
        if state.positions is not None:
            num_kept = present - (end - state.num_positioned)
            known = state.positions.shape[2]
            is_older = slots[..., :known] < num_kept.unsqueeze(2)
            positions[..., :known] = torch.where(is_older, state.positions, positions[..., :known])
        return positions.masked_fill(slots >= present.unsqueeze(2), -1)


def _num_merged(merge_to: Tensor) -> int:
    """Tokens merged into others, on average over layers and kv heads. merge_to [L, H_kv, n]"""
    return round(float((merge_to >= 0).sum()) / merge_to[..., 0].numel())


def _num_to_pack(plan: CachePlan, end: int) -> tuple[int, ...]:
    """Of each class, the slots that join it at this point."""
    return tuple([each.first if end == plan.first_point else each.later for each in plan.classes])


def _side_of(read: Callable[[int, int], Tensor], num_slots: int, layer: int) -> Tensor:
    return read(layer, num_slots)


def _settled(compaction: Compaction, keep: Keep, block_size: int) -> Compaction:
    """With as many slots as the policy really keeps; the plan says at most."""
    counts = (keep.index >= 0).sum(-1)  # [L, H_kv]
    num_groups = len(compaction.kept)
    by_group = counts.reshape(num_groups, -1)
    if bool((by_group != by_group[:, :1]).any()) or int(by_group.min()) < 1:
        raise ValueError("keep must leave as many slots, at least one, to all heads that share a table")
    kept = tuple(by_group[:, 0].tolist())
    if any(count > bound for count, bound in zip(kept, compaction.kept, strict=True)):
        raise ValueError(f"keep left {kept} slots, the plan says at most {compaction.kept}")
    tables = [table[: -(-count // block_size)] for table, count in zip(compaction.tables, kept, strict=True)]
    return msgspec.structs.replace(compaction, kept=kept, tables=tuple(tables))


def _nothing(layer: int) -> NoReturn:
    raise AssertionError("packed keys are not shown: a rung over a format chooses by position")
