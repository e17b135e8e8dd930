"""The cache policies of the running rows: what evidence they have, and the compactions that follow from it.

Knows rows, chunks and tensors. When and how much a cache shrinks was settled by the scheduler; which tokens stay is
settled here. Evidence of a step is staged while it runs and counts once it has succeeded.
Shape letters: C channels, L layers, H_kv kv heads, T tokens, n slots.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, cast

import msgspec
import torch

from engine.compression.attend import MixedAttention, RowRange, Scored, Segment, TableSegment, VirtualKeys
from engine.compression.base import Evidence, Policy
from engine.compression.classes import ClassRows, ClassSegment
from engine.compression.compactions import Compactions
from engine.compression.drafted import DraftedQueries, watched
from engine.compression.evidence import ask, count
from engine.compression.hooked import HookedRows, HookedSegment, Watcher
from engine.compression.hooks import hooks_of
from engine.compression.packed import PackedRows
from engine.compression.quest import Quest
from engine.compression.raas import RaaS
from engine.compression.selecting import BoundedRows, BoundedSegment
from engine.compression.side import SideRows
from engine.compression.split import SplitRows
from engine.compression.state import RowState
from engine.errors import EngineError
from engine.execution.rows import RowTable
from engine.models.batch import AttentionHook, ForwardBatch, HiddenHook, KVCache, WriteHook
from engine.scheduling.plan import Chunk, ChunkResult, NewRow

logger = logging.getLogger(__name__)


class Kind(IntEnum):
    """How rows attend, in the order in which they stand in a batch."""

    SCORED = 0  # as usual, and evidence is summed up
    PLAIN = 1  # as without any policy
    SPLIT = 2  # with tables per layer or kv head
    PACKED = 3  # older tokens are in packed blocks
    BOUNDED = 4  # with a look at the bounds of blocks
    HOOKED = 5  # as the policy says, layer by layer
    CLASSED = 6  # tokens are packed in several ways, and evidence of the others may be summed up


class _Way(NamedTuple):
    """Rows of one way are neighbours in a batch."""

    kind: Kind
    evidence: Evidence | None = Evidence()  # of SCORED, and of CLASSED, where it may be none
    format: str = ""  # of PACKED and CLASSED
    number: int = 0  # tables of SPLIT, dense layers of BOUNDED
    has_draft: bool = False  # of SCORED: what counts is known after the step


class PolicyRows:
    """All methods belong to the thread of the step loop."""

    def __init__(self, cache: KVCache, rows: RowTable) -> None:
        self._cache = cache
        self._rows = rows
        self._states: dict[int, RowState] = {}
        self._num_layers = cache.k.shape[1]
        self._device = cache.k.device
        self._split = SplitRows(cache)
        self._packed = PackedRows(cache)
        self._bounded = BoundedRows(cache)
        self._hooked = HookedRows(cache)
        self._classes = ClassRows(cache)
        self._side = SideRows(cache, rows)
        tables = self._split, self._packed, self._bounded, self._classes, self._side
        self._compactions = Compactions(cache, rows, *tables)
        self._selecting: list[tuple[BoundedSegment, list[Chunk]]] = []  # of the step that runs
        self._noting: list[tuple[HookedSegment, list[Chunk]]] = []  # likewise
        self._classed: list[tuple[ClassSegment, list[int]]] = []  # likewise, with indices of their chunks
        self._tap: WriteHook | None = None  # likewise
        self._scoring: TableSegment | None = None  # likewise
        self._asked: list[list[int]] = []  # whom it scores: indices of chunks
        self._drafted: list[DraftedQueries] = []  # whom it scores once drafts are judged

    def add(self, new: NewRow) -> None:
        self.remove(new.row)
        if new.policy is None:
            return
        policy = cast(Policy, new.policy.policy)
        hooks = hooks_of(policy)
        notes = new.policy.plan.side_tokens > 0
        if new.policy.plan.first_point is None and not isinstance(policy, Quest | RaaS) and not hooks and not notes:
            return  # its cache stays as it is
        plan = new.policy.plan
        self._states[new.row] = RowState(policy, plan, new.num_prompt_tokens, new.sampling.seed)
        if new.packed:
            self._packed.start(new.row, plan.format, plan.places, new.packed)
            self._rows.compact(new.row, (), new.num_computed)
        if isinstance(policy, Quest | RaaS):
            self._bounded.add(new.row, policy, new.num_prompt_tokens)
        if notes:
            self._side.add(new, policy)
            self._states[new.row].side = self._side.reader(new.row)
        if hooks:
            self._hooked.add(new.row, self._states[new.row])

    def adopt(self, chunk: Chunk, num_prompt_tokens: int, seed: int) -> None:
        """The row has another policy than it came with. Doing it twice is harmless."""
        known = self._states.get(chunk.row)
        if chunk.policy is None or (known is not None and known.plan is chunk.policy.plan):
            return
        policy = cast(Policy, chunk.policy.policy)
        if known is not None:
            known.policy, known.plan = policy, chunk.policy.plan
            return
        self._states[chunk.row] = RowState(policy, chunk.policy.plan, num_prompt_tokens, seed)

    def take_blocks(self, chunk: Chunk) -> None:
        """What has changed in the row's blocks beside its table. Doing it twice is harmless."""
        for index, block_id in chunk.packed_edits:
            self._packed.edit(chunk.row, index, block_id)
        if chunk.new_side:
            self._side.take(chunk)

    def remove(self, row: int) -> None:
        self._states.pop(row, None)
        self._split.remove(row)
        self._packed.remove(row)
        self._bounded.remove(row)
        self._hooked.remove(row)
        self._classes.remove(row)
        self._side.remove(row)

    def has_own_tables(self, row: int) -> bool:
        """Whether the row's layers or heads have tables of their own, in which drafts are settled here."""
        return row in self._split

    def order(self, chunks: Sequence[Chunk]) -> list[int] | None:
        """An order in which rows that attend in the same way are neighbours; None where all attend as usual."""
        if not self._states:
            return None
        ways: dict[_Way, list[int]] = {}
        for i, chunk in enumerate(chunks):
            ways.setdefault(self._way(chunk), []).append(i)
        if list(ways) == [_Way(Kind.PLAIN)]:
            return None
        return [i for way in sorted(ways, key=lambda way: way.kind) for i in ways[way]]

    def begin(self, chunks: Sequence[Chunk], batch: ForwardBatch) -> AttentionHook | None:
        """Who attends in this step, where not all rows do as usual; the chunks are in the order of `order`."""
        self._scoring, self._asked, self._drafted, self._selecting, self._noting = None, [], [], [], []
        self._classed, self._tap = [], None
        if not self._states:
            return None
        ways = [self._way(chunk) for chunk in chunks]
        segments: list[Segment] = []
        scored: list[Scored] = []
        first = num_tables = 0
        while first < len(chunks):
            way, end = ways[first], first + ways.count(ways[first])
            members = chunks[first:end]
            if way.has_draft:
                assert way.evidence is not None
                drafted = watched(way.evidence, members, self._states, RowRange.of(batch, first, len(members)), batch)
                self._drafted += [] if drafted is None else [drafted]
            elif way.kind is Kind.SCORED:
                assert way.evidence is not None
                found = ask(way.evidence, members, self._states, RowRange.of(batch, first, len(members)))
                if found is not None:
                    scored.append(found)
                    self._asked.append(list(range(first, end)))
            elif way.kind is not Kind.PLAIN:
                segments.append(self._segment(way, members, batch, first))
            if way.kind <= Kind.PLAIN:
                num_tables = end
            first = end
        self._tap = self._side.hook(chunks, batch)
        if not segments and not scored and not self._drafted and self._tap is None:
            return None
        if num_tables:
            rows = RowRange.of(batch, 0, num_tables)
            self._scoring = TableSegment(batch, self._cache, rows, scored, self._drafted)
            segments.insert(0, self._scoring)
        return MixedAttention(segments)

    @property
    def watcher(self) -> HiddenHook | None:
        """Who looks at hidden states in the step that `begin` began."""
        watching = [segment for segment, _ in self._noting if segment.sees_hidden]
        return Watcher(watching) if watching else None

    @property
    def tap(self) -> WriteHook | None:
        """Who looks at keys and values as they are made, in the step that `begin` began."""
        return self._tap

    def commit(self, chunks: Sequence[Chunk], results: list[ChunkResult]) -> None:
        """The step has succeeded: its evidence counts, and caches shrink. A policy that fails ends its own request."""
        if self._scoring is not None:
            for members, staged in zip(self._asked, self._scoring.staged, strict=True):
                for place, i in enumerate(members):
                    if results[i].error is None:
                        end = chunks[i].start + chunks[i].num_tokens
                        num_slots = end - self._rows.num_dropped(chunks[i].row)
                        count(self._states[chunks[i].row], chunks[i], staged, place, num_slots)
        self._scoring = None
        for classed, members in self._classed:
            for place, i in enumerate(members):
                if classed.staged and results[i].error is None:
                    num_slots = chunks[i].start + chunks[i].num_tokens - self._rows.num_dropped(chunks[i].row)
                    count(self._states[chunks[i].row], chunks[i], classed.staged, place, num_slots)
        self._classed = []
        places = {chunk.row: i for i, chunk in enumerate(chunks)}
        for drafted in self._drafted:
            self._count_drafted(drafted, places, results)
        self._drafted = []
        for segment, members_chunks in self._selecting:
            accepted = [results[places[chunk.row]].accepted for chunk in members_chunks]
            self._bounded.commit(members_chunks, segment, accepted)
        self._selecting = []
        for hooked, members_chunks in self._noting:
            self._hooked.commit(members_chunks, hooked, [results[places[chunk.row]] for chunk in members_chunks])
        self._noting = []
        for i, chunk in enumerate(chunks):
            if chunk.row in self._split:
                num_nodes = 0 if chunk.draft is None else len(chunk.draft)
                self._split.advance(chunk.row, chunk.num_tokens - num_nodes - results[i].is_deferred)
                if chunk.draft is not None:
                    self._split.keep(chunk.row, results[i].accepted)
            if chunk.compaction is None or results[i].error is not None or results[i].is_deferred:
                continue
            try:
                facts = self._compactions.make(chunk, chunk.compaction, self._states[chunk.row])
            except Exception:
                logger.exception("a cache policy failed; its request is ended with an error, the others continue")
                results[i] = ChunkResult(error=EngineError.code)
                continue
            if facts:
                results[i] = msgspec.structs.replace(results[i], **facts)

    def _way(self, chunk: Chunk) -> _Way:
        """How a chunk's row attends."""
        row, state = chunk.row, self._states.get(chunk.row)
        if state is None:
            return _Way(Kind.PLAIN)
        if row in self._packed:
            return _Way(Kind.PACKED, format=self._packed.format(row))
        if row in self._classes:
            evidence = None if state.next_choice(chunk.start) is None else state.policy.evidence
            return _Way(Kind.CLASSED, evidence=evidence, format=self._classes.formats(row))
        if row in self._split:
            return _Way(Kind.SPLIT, number=self._split.num_groups(row))
        if state.policy.evidence is not None and state.next_choice(chunk.start) is not None:
            return _Way(Kind.SCORED, evidence=state.policy.evidence, has_draft=chunk.draft is not None)
        if self._hooked.takes(chunk):
            return _Way(Kind.HOOKED)
        num_dense = self._bounded.way(chunk, chunk.start + chunk.num_tokens - self._rows.num_dropped(row))
        return _Way(Kind.PLAIN) if num_dense is None else _Way(Kind.BOUNDED, number=num_dense)

    def _segment(self, way: _Way, chunks: Sequence[Chunk], batch: ForwardBatch, first: int) -> Segment:
        """Attention of neighbouring rows of the batch, from row `first`, that is not as usual."""
        if way.kind is Kind.PACKED:
            return self._packed.segment(chunks, batch, first)
        if way.kind is Kind.BOUNDED:
            bounded = self._bounded.segment(chunks, batch, first, way.number)
            self._selecting.append((bounded, list(chunks)))
            return bounded
        if way.kind is Kind.CLASSED:
            rows = RowRange.of(batch, first, len(chunks))
            asked = None if way.evidence is None else ask(way.evidence, chunks, self._states, rows)
            classed = self._classes.segment(chunks, batch, first, asked)
            self._classed.append((classed, list(range(first, first + len(chunks)))))
            return classed
        if way.kind is Kind.HOOKED:
            hooked = self._hooked.segment(chunks, batch, first)
            self._noting.append((hooked, list(chunks)))
            return hooked
        for chunk in chunks:
            self._split.append(chunk)
        segment = self._split.segment(chunks, batch, first)
        segment.virtual = self._virtual_keys(chunks)
        return segment

    def _virtual_keys(self, chunks: Sequence[Chunk]) -> list[VirtualKeys] | None:
        """Of each layer, what stands for the dropped tokens of these rows; None where nothing does."""
        states = [self._states[chunk.row] for chunk in chunks]
        if not any(state.dropped for state in states):
            return None
        empty = self._compactions.no_compensation()
        layers = []
        for layer in range(self._num_layers):
            parts = [(state.dropped[layer] if state.dropped else empty).virtual() for state in states]
            layers.append(VirtualKeys(*[torch.stack(tensors) for tensors in zip(*parts, strict=True)]))
        return layers

    def _count_drafted(self, drafted: DraftedQueries, places: Mapping[int, int], results: list[ChunkResult]) -> None:
        """places: of the rows, indices of their results. Tokens are chosen by now: a failure ends these requests."""
        members = [places[chunk.row] for chunk in drafted.chunks]
        num_dropped = [self._rows.num_dropped(chunk.row) for chunk in drafted.chunks]
        try:
            drafted.count([results[i].accepted for i in members], num_dropped, self._states, self._cache)
        except Exception:
            logger.exception("attention of drafts cannot be summed up; their requests are ended with an error")
            for i in members:
                results[i] = ChunkResult(error=EngineError.code)
