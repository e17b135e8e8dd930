"""Rows whose policies act while layers attend: they select what is read, rewrite attention or look at hidden states.

Knows rows, tables and tensors. A policy is asked once per layer for each part of a prompt and for each generated token
(`turns.py`); what all of them answered is run together, whole rows, lists of blocks and lists of tokens in one call of
the attention kernel each (`lists.py`). What they note counts where their tokens are accepted.
Shape letters: T tokens, R rows, H query heads, H_kv kv heads, D head_dim, M hidden size, n slots, P parts.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

import kernels
from engine.compression.attend import RowRange, Segment
from engine.compression.base import (
    HiddenPolicy,
    Part,
    QueryView,
    Rewrite,
    RewritingPolicy,
    SameAs,
    SelectingPolicy,
    Selection,
)
from engine.compression.hooks import acts_on_prompt, hooks_of
from engine.compression.lists import ListAttention, listed, virtual_part
from engine.compression.registry import Hook
from engine.compression.state import RowState
from engine.compression.turns import Presence, Turn
from engine.models.batch import ForwardBatch, KVCache, SeenHidden
from engine.scheduling.plan import Chunk, ChunkResult


@dataclass(slots=True)
class _Row:
    """
    memory      what the policy has noted
    from_layer  [n] int64 of the row's slots: the layer from which on their tokens are halted; None: none is
    """

    state: RowState
    memory: dict[Any, Any] = field(default_factory=dict)
    from_layer: Tensor | None = None


class HookedRows:
    """Row -> its policy and what that has noted."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._lists: ListAttention | None = None  # made with the first row that needs it
        self._states: dict[int, _Row] = {}

    def add(self, row: int, state: RowState) -> None:
        if self._lists is None:
            self._lists = ListAttention(self._cache)
        self._states[row] = _Row(state)

    def remove(self, row: int) -> None:
        self._states.pop(row, None)

    def takes(self, chunk: Chunk) -> bool:
        """Whether the chunk's policy has something to see or to say."""
        found = self._states.get(chunk.row)
        if found is None:
            return False
        policy = found.state.policy
        return _acts(found.state, chunk) or Hook.HIDDEN in hooks_of(policy)

    def segment(self, chunks: Sequence[Chunk], batch: ForwardBatch, first: int) -> HookedSegment:
        """The chunks are those of neighbouring rows of the batch from row `first`."""
        assert self._lists is not None
        rows = RowRange.of(batch, first, len(chunks))
        ends = batch.seq_lens[rows.rows].tolist()
        turns: list[Turn] = []
        for place, (chunk, start, end) in enumerate(zip(chunks, rows.starts[:-1].tolist(), ends, strict=True)):
            turns += self._turns(chunk, place, start, end, batch, rows)
        return HookedSegment(batch, self._cache, self._lists, rows, turns)

    def commit(self, chunks: Sequence[Chunk], segment: HookedSegment, results: Sequence[ChunkResult]) -> None:
        """The step has succeeded: what policies noted for tokens that are part of the text counts."""
        starts = segment.rows.starts[:-1].tolist()
        for place, (chunk, first, result) in enumerate(zip(chunks, starts, results, strict=True)):
            if result.error is not None:
                continue
            num_nodes = 0 if chunk.draft is None else len(chunk.draft)
            end = first + chunk.num_tokens - num_nodes - result.is_deferred + len(result.accepted)
            row, turns = self._states[chunk.row], [turn for turn in segment.turns if turn.row == place]
            kept = [turn for turn in turns if turn.tokens.stop <= end]
            for turn in kept:
                row.memory.update(turn.memory.maps[0])
            if kept and not kept[-1].presence.is_whole:
                row.from_layer = kept[-1].presence.from_layer[: kept[-1].num_slots].clone()

    def _turns(
        self, chunk: Chunk, place: int, first: int, num_slots: int, batch: ForwardBatch, rows: RowRange
    ) -> list[Turn]:
        """What the policy looks at together; the token whose logits choose the next one by itself, as it may have to be
        run again.
        """
        row = self._states[chunk.row]
        num_nodes = 0 if chunk.draft is None else len(chunk.draft)
        num_single = num_nodes + (chunk.is_sampling or num_nodes > 0)
        sizes = [chunk.num_tokens - num_single] * (chunk.num_tokens > num_single) + [1] * num_single
        blocks = batch.block_table[rows.first + place].long()
        before = num_slots - chunk.num_tokens
        num_layers = self._cache.k.shape[1]
        from_layer = torch.full((num_slots,), num_layers, device=blocks.device)
        if row.from_layer is not None:
            from_layer[:before] = row.from_layer[:before]
        presence = Presence(from_layer, is_whole=row.from_layer is None)
        turns: list[Turn] = []
        memory: ChainMap[Any, Any] = ChainMap(row.memory)
        for size in sizes:
            before += size
            memory = memory.new_child()
            tokens = slice(first, first + size)
            first += size
            positions = batch.positions[rows.tokens][tokens]
            acts = _acts(row.state, chunk)
            turns.append(Turn(place, tokens, before, acts, row.state, presence, blocks, positions, memory))
        return turns


def _acts(state: RowState, chunk: Chunk) -> bool:
    return chunk.start >= state.num_prompt_tokens or acts_on_prompt(state.policy)


@dataclass(slots=True)
class _Lists:
    """Queries of one kernel call, with their tables: tensors of several turns, one after the other."""

    tokens: list[Tensor] = field(default_factory=list)  # of the segment
    tables: list[Tensor] = field(default_factory=list)
    lens: list[Tensor] = field(default_factory=list)

    def add(self, turn: Turn, table: Tensor, lens: Tensor) -> None:
        self.tokens.append(torch.arange(turn.tokens.start, turn.tokens.stop, device=table.device))
        self.tables.append(table)
        self.lens.append(lens)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat(self.tokens), *_joined(self.tables, self.lens)


class HookedSegment(Segment):
    """See `engine.compression.attend.Segment`; also told of hidden states."""

    def __init__(
        self, batch: ForwardBatch, cache: KVCache, lists: ListAttention, rows: RowRange, turns: Sequence[Turn]
    ) -> None:
        self.rows = rows
        self.turns = turns
        self.sees_hidden = any(Hook.HIDDEN in hooks_of(turn.state.policy) for turn in turns)
        self._cache = cache
        self._lists = lists
        self._written = batch.slots[rows.tokens]
        self._table = batch.block_table[rows.rows]

    def on_hidden(self, layer: int, hidden: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """hidden [T, M] of the segment's tokens, which may be written to. Returns tokens whose states have changed, and
        which of all are halted, [T] bool; None: none is.
        """
        changed: list[Tensor] = []
        halted: Tensor | None = None
        for turn in self.turns:
            own = turn.own_slots
            if Hook.HIDDEN in hooks_of(turn.state.policy):
                view = turn.hidden_view(layer, self._cache.k.shape[1], hidden[turn.tokens])
                change = cast(HiddenPolicy, turn.state.policy).on_hidden(view)
                if change is not None and not turn.acts:
                    raise RuntimeError("a policy changes hidden states of a prompt, but does not say acts_on_prompt")
                if change is not None and change.hidden is not None:
                    hidden[turn.tokens] = torch.where(view.active.unsqueeze(1), change.hidden, view.hidden)
                    changed.append(torch.arange(turn.tokens.start, turn.tokens.stop, device=own.device))
                if change is not None and change.active is not None:
                    halts = view.active & ~change.active
                    turn.presence.from_layer[own] = turn.presence.from_layer[own].masked_fill(halts, layer)
                    turn.presence.is_whole &= not bool(halts.any())
            if not turn.presence.is_whole:
                halted = torch.zeros(len(hidden), dtype=torch.bool, device=own.device) if halted is None else halted
                halted[turn.tokens] = turn.presence.from_layer[own] <= layer
        return changed, halted

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        """See `Segment`."""
        kernels.kv_write(k, v, *self._cache.layer(layer), self._slots(layer))
        whole: list[Turn] = []
        of_blocks, of_tokens = _Lists(), _Lists()
        for turn in self.turns:
            rewrite, selection = self._answer(turn, layer, q[turn.tokens], options)
            if rewrite is not None:
                out[turn.tokens] = self._rewritten(rewrite, turn, layer, q[turn.tokens], options).to(out.dtype)
            elif selection is None and turn.presence.is_whole:
                whole.append(turn)
            elif selection is not None and selection.of_blocks and turn.presence.is_whole:
                of_blocks.add(turn, *self._blocks(selection, turn))
            else:
                of_tokens.add(turn, *self._tokens(selection, turn, layer))
        if whole:
            self._attend_whole(whole, layer, q, out, options)
        if of_blocks.tokens:
            tokens, table, lens = of_blocks.joined()
            out[tokens] = self._lists.run_blocks(layer, q[tokens], table, lens, options)
        if of_tokens.tokens:
            tokens, table, lens = of_tokens.joined()
            out[tokens], _ = self._lists.run_tokens(layer, layer, q[tokens], table, lens, options)

    def _slots(self, layer: int) -> Tensor:
        """Where tokens go: those that are halted nowhere."""
        if all(turn.presence.is_whole for turn in self.turns):
            return self._written
        slots = self._written.clone()
        for turn in self.turns:
            slots[turn.tokens] = slots[turn.tokens].masked_fill(turn.presence.from_layer[turn.own_slots] <= layer, -1)
        return slots

    def _answer(
        self, turn: Turn, layer: int, q: Tensor, options: dict[str, Any]
    ) -> tuple[Rewrite | None, Selection | None]:
        """What the policy says for these tokens in this layer."""
        hooks = hooks_of(turn.state.policy)
        if not turn.acts or not hooks & {Hook.REWRITE, Hook.SELECTION}:
            return None, None
        view: QueryView = turn.view(layer, q, self._cache, options)
        if Hook.REWRITE in hooks:
            turn.queries[layer] = q.clone()  # the model may use the memory again
            rewrite = cast(RewritingPolicy, turn.state.policy).rewrite(view)
            if rewrite is not None:
                return rewrite, None
        found: Selection | SameAs | None = None
        if Hook.SELECTION in hooks:
            found = cast(SelectingPolicy, turn.state.policy).select(view)
        is_reused = isinstance(found, SameAs)
        if isinstance(found, SameAs):
            if found.layer not in turn.selected:
                raise RuntimeError(f"layer {layer} wants what layer {found.layer} selected, which has not selected yet")
            found = turn.selected[found.layer]
        turn.selected[layer] = found
        return None, None if found is None or (found.is_for_later and not is_reused) else found

    def _attend_whole(self, turns: Sequence[Turn], layer: int, q: Tensor, out: Tensor, options: dict[str, Any]) -> None:
        device = q.device
        tokens = torch.cat([torch.arange(turn.tokens.start, turn.tokens.stop, device=device) for turn in turns])
        starts = torch.tensor([0, *[turn.num_tokens for turn in turns]]).cumsum(0).int()
        lens = torch.tensor([turn.num_slots for turn in turns], dtype=torch.int32)
        plan = kernels.plan_attention(starts, lens, num_kv_heads=self._cache.k.shape[2], device=device)
        table = self._table[torch.tensor([turn.row for turn in turns], device=device)]
        where = table, lens.to(device), starts.to(device)
        out[tokens] = kernels.paged_attention(q[tokens], *self._cache.layer(layer), *where, plan=plan, **options)

    def _blocks(self, selection: Selection, turn: Turn) -> tuple[Tensor, Tensor]:
        """Tables and slots for `ListAttention.run_blocks`."""
        num_slots = turn.own_slots + 1
        newest = (num_slots - 1) // self._block_size
        count = -(-turn.num_slots // self._block_size)
        chosen = listed(selection.index, newest, count)
        chosen |= torch.arange(count, device=newest.device) == newest.view(-1, 1, 1)
        return self._lists.of_blocks(chosen, selection.index.shape[2] + 1, turn.blocks, num_slots)

    def _tokens(self, selection: Selection | None, turn: Turn, layer: int) -> tuple[Tensor, Tensor]:
        """Tables and slots for `ListAttention.run_tokens`. None: all that are present."""
        own = turn.own_slots.view(-1, 1, 1)
        slots = torch.arange(turn.num_slots, device=own.device)
        newest = own // self._block_size * self._block_size  # first slot of the newest block
        if selection is None:
            chosen, width = slots <= own, turn.num_slots
        else:
            size = self._block_size if selection.of_blocks else 1
            named = listed(selection.index, newest.flatten() // size, -(-turn.num_slots // size))
            chosen = named.repeat_interleave(size, dim=2)[..., : turn.num_slots]
            chosen = chosen | ((slots >= newest) & (slots <= own))
            width = selection.index.shape[2] * size + self._block_size
        if not turn.presence.is_whole:
            chosen = chosen & turn.presence.at(layer, turn.num_slots)
        return self._lists.of_tokens(chosen, width, turn.blocks)

    def _rewritten(self, rewrite: Rewrite, turn: Turn, layer: int, q: Tensor, options: dict[str, Any]) -> Tensor:
        """[T, H, Dv] of one turn's queries q [T, H, D]."""
        listed_parts = [(place, part) for place, part in enumerate(rewrite.parts) if isinstance(part, Part)]
        results: dict[int, tuple[Tensor, Tensor]] = {}
        for of_layer in {part.layer for _, part in listed_parts}:
            places = [place for place, part in listed_parts if part.layer == of_layer]
            found = self._parts([cast(Part, rewrite.parts[place]) for place in places], turn, layer, q, options)
            results |= dict(zip(places, found, strict=True))
        for place, part in enumerate(rewrite.parts):
            if not isinstance(part, Part):
                results[place] = virtual_part(q, part.keys, part.values, part.bias, options)
        outs = [results[place][0] for place in range(len(rewrite.parts))]
        sinks = options["sinks"]
        if len(outs) == 1 and rewrite.weights is None and sinks is None:
            return outs[0]
        lses = torch.stack([results[place][1] for place in range(len(outs))])  # [P, T, H]
        if rewrite.weights is not None:
            if sinks is not None:
                raise RuntimeError("a policy weights the parts of attention itself, and the model's sinks are in none")
            weights = rewrite.weights(lses)
        elif sinks is not None:  # one more part, without a value
            weights = torch.cat([lses, sinks.expand(1, *lses.shape[1:])]).softmax(0)[:-1]
        else:
            weights = lses.softmax(0)
        return torch.einsum("pth,pthd->thd", weights, torch.stack([out.float() for out in outs]))

    def _parts(
        self, parts: Sequence[Part], turn: Turn, layer: int, q: Tensor, options: dict[str, Any]
    ) -> list[tuple[Tensor, Tensor]]:
        """Results [T, H, Dv] and denominators [T, H] of parts whose weights are of one layer, from one call."""
        key_layer = layer if parts[0].layer is None else parts[0].layer
        tables, lens = [], []
        for part in parts:
            chosen = listed(part.index, turn.own_slots + 1, turn.num_slots)
            if not turn.presence.is_whole:
                chosen &= turn.presence.at(max(layer, key_layer), turn.num_slots)
            table, counts = self._lists.of_tokens(chosen, part.index.shape[2], turn.blocks)
            tables.append(table)
            lens.append(counts)
        queries = q if key_layer == layer else turn.queries[key_layer]
        run = self._lists.run_tokens(
            *(layer, key_layer, queries.repeat(len(parts), 1, 1), *_joined(tables, lens)), {**options, "sinks": None}
        )
        return list(zip(*(result.split(turn.num_tokens) for result in run), strict=True))

    @property
    def _block_size(self) -> int:
        return self._cache.k.shape[3]


class Watcher:
    """See `engine.models.batch.HiddenHook`: the segments whose policies look at hidden states."""

    def __init__(self, segments: Sequence[HookedSegment]) -> None:
        self._segments = segments

    def on_hidden(self, layer: int, hidden: Tensor) -> SeenHidden:
        changed: list[Tensor] = []
        halted: Tensor | None = None
        for segment in self._segments:
            tokens = segment.rows.tokens
            own_changed, own_halted = segment.on_hidden(layer, hidden[tokens])
            changed += [index + tokens.start for index in own_changed]
            if own_halted is not None:
                halted = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device) if halted is None else halted
                halted[tokens] = own_halted
        return SeenHidden(torch.cat(changed) if changed else None, halted)


def _joined(tables: Sequence[Tensor], lens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(table.shape[2] for table in tables)
    padded = [torch.nn.functional.pad(table, (0, width - table.shape[2])) for table in tables]
    return torch.cat(padded), torch.cat(list(lens))
