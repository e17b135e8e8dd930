"""What the scheduler knows of a request's cache policy: at which token counts its cache shrinks, and to what size.

Integers only. When and how much are a function of the request alone, never of chunks, batches or time, so that a
request preempted and computed again goes through the same states. Which tokens stay is decided by the policy, on the
device (`engine.compression`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol


class Realisation(Enum):
    """What becomes of the block table at a compaction."""

    DENSE = "dense"  # nothing is dropped: the policy selects at attention time or changes the format
    SLOTS = "slots"  # every kv head of every layer keeps as many tokens, gathered into private blocks
    BLOCKS = "blocks"  # whole blocks leave the table, the others stay where they are, shared ones too
    LAYERS = "layers"  # a number of tokens per layer, in tables per layer
    PACKED = "packed"  # what is older than the kept slots changes its format, in packed blocks
    HEADS = "heads"  # a number of tokens per kv head, in tables per (layer, kv head)


@dataclass(frozen=True, slots=True)
class PackedClass:
    """Tokens that are packed in one way, in blocks of their own, alike for all layers and kv heads.

    format   how, a name that kernels know or that of a policy's own codec
    places   blocks of tokens that a packed block holds
    first    tokens that join it at the first point, in whole blocks of tokens
    later    tokens that join it at each later point, likewise
    """

    format: str
    places: int
    first: int
    later: int = 0


@dataclass(frozen=True, slots=True)
class CachePlan:
    """
    policy         the name that clients use
    realisation    see there
    first_point    number of computed tokens at which the cache shrinks for the first time; None: it never does
    period         it shrinks again each time so many more tokens are computed; 0: only once
    kept           slots that remain: one number, or one per layer, or per (layer, kv head), layer by layer
    places         blocks of tokens that a packed block holds; 0: nothing is packed
    format         how they are packed
    num_evicted    tokens that go at the first point, before anything is packed; 0: none. So `kept` counts what is not
                   packed, from `packs_at` on
    packs_at       point from which on tokens are packed, where that is not the first
    drops          (point, packed tokens that go there, in whole packed blocks), ascending
    classes        where the policy says at each point which tokens are packed in which way; what stays unpacked, too
    is_sealed      what is packed is a function of the tokens before it: others may read it, in a namespace of its own
    is_adaptive    `kept` are upper bounds: how many slots remain is found out at the first point, the only one
    side_tokens    tokens for whose side data one more block is taken; 0: there are none
    num_provided   first prompt tokens whose keys and values the policy supplies, so that they are not computed
    steps_singly   generated tokens are computed one by one, also after a preemption: each reads the cache in its own
                   way. So only blocks of the prompt are what their tokens say, and may be shared. Guesses may be
                   computed with one where each continues the one before it
    num_filtered   tokens that a first pass over the prompt leaves of it before anything is generated; None: no such
    is_private     what the prompt's keys and values are depends on more than its tokens: none are shared with anybody
    num_queries    last prompt tokens that must be computed, not taken from the prefix cache: the policy looks at them
    """

    policy: str
    realisation: Realisation
    first_point: int | None
    period: int
    kept: tuple[int, ...]
    num_queries: int = 0
    num_filtered: int | None = None
    places: int = 0
    steps_singly: bool = False
    format: str = ""
    num_evicted: int = 0
    packs_at: int | None = None
    is_private: bool = False
    drops: tuple[tuple[int, int], ...] = ()
    classes: tuple[PackedClass, ...] = ()
    is_sealed: bool = False
    is_adaptive: bool = False
    side_tokens: int = 0
    num_provided: int = 0

    def next_point(self, num_computed: int) -> int | None:
        """The first point after so many computed tokens."""
        if self.first_point is None or num_computed < self.first_point:
            return self.first_point
        start = self._start
        if num_computed < start:
            point: int | None = start
        elif not self.period:
            point = None
        else:
            point = start + ((num_computed - start) // self.period + 1) * self.period
        drop = next((at for at, _ in self.drops if at > num_computed), None)
        return point if drop is None else drop if point is None else min(point, drop)

    def next_choice(self, num_computed: int) -> int | None:
        """The first point after so many computed tokens at which the policy chooses by what it has seen."""
        if not self.places or self.classes:
            return self.next_point(num_computed)
        has_chosen = self.first_point is None or num_computed >= self.first_point
        return None if has_chosen or not self.num_evicted else self.first_point

    @property
    def num_groups(self) -> int:
        """Block tables after the first compaction."""
        return len(self.kept) if self.realisation in (Realisation.LAYERS, Realisation.HEADS) else 1

    def is_point(self, num_computed: int) -> bool:
        """Whether the cache shrinks when so many tokens have been computed."""
        return num_computed > 0 and self.next_point(num_computed - 1) == num_computed

    def drops_at(self, num_computed: int) -> bool:
        """Whether packed tokens go when so many tokens have been computed."""
        return any(at == num_computed for at, _ in self.drops)

    def slots_at(self, num_tokens: int, group: int = 0) -> int:
        """Slots of a table once so many tokens are computed and the points up to there are past."""
        if self.first_point is None or num_tokens < self.first_point:
            return num_tokens
        if num_tokens < self._start:
            return num_tokens - self.num_evicted
        since = (num_tokens - self._start) % self.period if self.period else num_tokens - self._start
        return min(self.kept[group], num_tokens - since) + since

    def packed_slots_at(self, num_tokens: int) -> int:
        """Tokens in packed blocks, likewise: always whole blocks."""
        if not self.places or self.first_point is None or num_tokens < self.first_point:
            return 0
        num_dropped = sum([count for at, count in self.drops if at <= num_tokens])
        return num_tokens - self.slots_at(num_tokens) - self.num_evicted - num_dropped

    def class_slots_at(self, num_tokens: int) -> tuple[int, ...]:
        """Of them, those of each class."""
        if self.first_point is None or num_tokens < self.first_point:
            return (0,) * len(self.classes)
        num_later = (num_tokens - self.first_point) // self.period if self.period else 0
        return tuple([each.first + num_later * each.later for each in self.classes])

    def packed_blocks_at(self, num_tokens: int, block_size: int) -> int:
        """Packed blocks of a request that has computed so many tokens."""
        if not self.classes:
            num_slots = self.packed_slots_at(num_tokens)
            return -(-num_slots // (block_size * self.places)) if num_slots else 0
        counts = zip(self.class_slots_at(num_tokens), self.classes, strict=True)
        return sum([-(-count // (block_size * each.places)) for count, each in counts])

    @property
    def seals(self) -> bool:
        """Whether packed blocks are shared."""
        return self.is_sealed and self.first_point is not None

    def settled(self, kept: tuple[int, ...]) -> CachePlan:
        """An adaptive plan once it is known how many slots remain."""
        return replace(self, kept=kept, is_adaptive=False)

    def peak_after(self, num_tokens: int, group: int = 0) -> int:
        """The most slots of a table after the first point, while so many tokens are computed in all."""
        assert self.first_point is not None
        most_unpacked = min(num_tokens, self._start) - self.num_evicted if self._start > self.first_point else 0
        added = max(0, num_tokens - self._start)
        if not self.period:
            return min(self.kept[group], self.first_point) + added
        return max(most_unpacked, min(num_tokens, self.kept[group] + min(added, self.period)))

    @property
    def _start(self) -> int:
        """Where the periods are counted from."""
        assert self.first_point is not None
        return self.first_point if self.packs_at is None else self.packs_at


class PolicyResolver(Protocol):
    """The engine's table of policies, as the scheduler sees it."""

    def resolve(self, choice: Mapping[str, Any] | None, num_prompt_tokens: int) -> ResolvedPolicy | None:
        """The policy of a request, None for the full cache.

        choice   the request's `kv_policy`; None: the server's default
        Raises InvalidParameter for an unknown name or option, and for what cannot be honoured.
        """


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    plan: CachePlan
    bits_per_value: float  # what one number of a key or value takes, scales included
    policy: object  # an `engine.compression.base.Policy`, which the scheduler only hands on

    def within(self, num_tokens: int) -> ResolvedPolicy:
        """For a request with at most so many tokens in the end: a point that it cannot reach asks for nothing."""
        plan = self.plan
        if plan.first_point is None or plan.first_point < num_tokens:
            return self
        num_queries = plan.num_queries if plan.steps_singly else 0  # each generated token may want what they told
        return replace(self, plan=replace(plan, first_point=None, num_queries=num_queries))
