"""One token stream as the scheduler sees it: tokens, progress, cache blocks, status. Integers only.

An `EngineRequest` becomes a `Family` of `num_choices` requests that share prompt, deadline and tenant.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.scheduling.compression import CachePlan, ResolvedPolicy
from engine.scheduling.prefix_cache import HashChain
from engine.speculation.options import Speculating
from engine.types import EngineRequest, PoolingParams, Rung, SamplingParams, TokenLogprob

MAX_FORCED_TOKENS = 16  # more at once are scheduled as a prompt is


class Status(enum.Enum):
    """Where a request is. Its only ways: PARKED -> WAITING <-> RUNNING, and from each of them to FINISHED."""

    PARKED = "parked"  # waits until another choice of its family has computed the prompt
    WAITING = "waiting"  # in the queue, holding nothing
    RUNNING = "running"  # has a row and blocks
    FINISHED = "finished"


@dataclass(slots=True)
class BlockTable:
    """Where one group of layers keeps a request's keys and values. A dense request has one group.

    `num_slots` counts what is stored and rules attention length and block arithmetic. It is not the logical position:
    a policy that drops tokens lowers it, and only it.
    """

    block_ids: list[int] = field(default_factory=list)
    num_slots: int = 0
    num_sent: int = 0  # leading entries that the runner knows
    edits: list[tuple[int, int]] = field(default_factory=list)  # (index, block id) among those, replaced since


@dataclass(slots=True, eq=False)
class Family:
    """The choices of one EngineRequest."""

    request: EngineRequest
    number: int  # arrival order
    arrival_s: float
    stop_ids: frozenset[int]  # token ids that end a choice
    max_tokens: int  # the asked number, cut to what the context length leaves
    adapter: int = 0  # index of its low-rank adapter, 0 for none
    policy: ResolvedPolicy | None = None  # how the caches of its choices are kept
    may_shrink: bool = False  # a whole cache may be compressed when memory is short
    choices: dict[int, Request] = field(default_factory=dict)  # those not finished, by choice

    @property
    def request_id(self) -> str:
        return self.request.request_id


@dataclass(slots=True, eq=False)
class Request:
    """One choice. `num_computed_tokens` chases `num_tokens`; there is no prefill or decode mode."""

    family: Family
    choice: int
    token_ids: list[int]  # prompt, then outputs
    num_prompt_tokens: int
    chain: HashChain | None  # None: neither reads nor enters the prefix cache
    policy: ResolvedPolicy | None = None  # how its cache is kept: its family's, or, for good, another under pressure
    status: Status = Status.PARKED
    tables: list[BlockTable] = field(default_factory=lambda: [BlockTable()])  # by group; [0] is the dense one
    reserved: list[list[int]] = field(default_factory=list)  # tables to come: of the compaction in the step in flight
    packed: list[int] = field(default_factory=list)  # blocks with its older tokens, in another format
    num_packed: int = 0  # tokens in them
    packed_edits: list[tuple[int, int]] = field(default_factory=list)  # (index, block id) of those, replaced since
    side: list[int] = field(default_factory=list)  # blocks with what its policy notes of each slot
    num_side_sent: int = 0  # of these, the first ones, which the runner knows
    unsettled: ResolvedPolicy | None = None  # its policy before it was known how many slots remain
    is_compressed: bool = False  # it has tokens that the cache no longer has: nothing more of it may be shared
    num_computed_tokens: int = 0  # logical: tokens whose keys and values have been computed
    awaits_token: bool = False  # its last token stands for the one that the step in flight will choose
    num_published_blocks: int = 0
    row: int | None = None
    waiting_since_s: float = 0.0
    queued_s: float | None = None  # arrival to first scheduling
    num_preemptions: int = 0
    num_cached_tokens: int | None = None  # prompt tokens served by the prefix cache at the first scheduling
    cache_miss: str | None = None  # why not all that could be, then; "" when it was all
    prompt_logprobs: list[TokenLogprob | None] | None = None  # collected so far, None once sent or not asked for
    has_emitted: bool = False
    speculating: Speculating | None = None  # None: without speculation
    peak_slots: int = 0  # the most that its cache has held
    is_filtering: bool = False  # the prompt will be replaced by a part of itself
    num_merged: int = 0  # dropped tokens that live on in the mean of others
    num_blocks_released: int = 0  # given back by compactions, before the end
    rungs: list[Rung] = field(default_factory=list)  # what was done to its cache because memory was short

    @property
    def request_id(self) -> str:
        return self.family.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.family.request.sampling

    @property
    def pooling(self) -> PoolingParams | None:
        return self.family.request.pooling

    @property
    def cache_plan(self) -> CachePlan | None:
        return None if self.policy is None else self.policy.plan

    @property
    def num_dropped(self) -> int:
        """Computed tokens that the cache no longer has, on average over the groups."""
        num_slots = sum(table.num_slots for table in self.tables)
        return self.num_computed_tokens - num_slots // len(self.tables)

    @property
    def num_evicted(self) -> int:
        """Those of them that are gone: the others are packed."""
        return self.num_dropped - self.num_packed

    @property
    def priority(self) -> int:
        return self.family.request.priority

    @property
    def tenant(self) -> str:
        return self.family.request.tenant

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first: priority, arrival, choice."""
        return self.family.request.priority, self.family.number, self.choice

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """What it has to compute is its last choice, with what a grammar forced behind it."""
        remaining = self.num_remaining_tokens
        return remaining == 1 or (remaining <= MAX_FORCED_TOKENS and self.has_computed_prompt)

    @property
    def has_computed_prompt(self) -> bool:
        return self.num_computed_tokens >= self.num_prompt_tokens
