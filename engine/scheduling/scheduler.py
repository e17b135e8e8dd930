"""Who runs in a step, how many tokens, in which blocks; and what becomes of the results. Integers only.

Between `schedule` and `commit` a step is in flight: nothing that a running request has is given away then, not even
when it is aborted. The README of this folder has the picture and the rules that are not obvious.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from engine.config import CacheConfig, SchedulerConfig
from engine.errors import InvalidParameter
from engine.scheduling.adapters import AdapterTable
from engine.scheduling.admission import check_provided, check_queue, check_servable
from engine.scheduling.ahead import assume, is_predictable, settle
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.cache_control import CacheControl
from engine.scheduling.cache_manager import CacheManager
from engine.scheduling.compression import PolicyResolver, ResolvedPolicy
from engine.scheduling.counters import Counters, report
from engine.scheduling.deadlines import Deadlines
from engine.scheduling.drafts import Progress, count_draft, fitting_draft
from engine.scheduling.outputs import Ending, append_tokens, collect_prompt_logprobs, make_output, make_pooled_output
from engine.scheduling.plan import Chunk, ChunkResult, NewRow, StepPlan, StepResult
from engine.scheduling.preemption import choose_victim
from engine.scheduling.prefix_cache import PrefixCache
from engine.scheduling.pressure import Pressure
from engine.scheduling.request import Family, Request, Status
from engine.scheduling.roster import Roster
from engine.scheduling.rows import RowSlots
from engine.speculation.options import Speculating, SpeculationOptions, SpeculationResolver
from engine.speculation.tree import EMPTY
from engine.types import CompressionCounts, EngineRequest, EngineStats, TokenOutput


@dataclass(slots=True)
class _Draft:
    """A plan under construction."""

    budget: int  # tokens left
    chunks: dict[Request, Chunk] = field(default_factory=dict)
    new_rows: list[NewRow] = field(default_factory=list)
    table_edits: list[tuple[int, int, int]] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """A plan between `schedule` and `commit`."""

    plan: StepPlan
    chunks: dict[Request, Chunk]  # those of the plan, in its order
    left: list[Request] = field(default_factory=list)  # over, but this step uses what they hold
    is_assumed: bool = False  # the requests already count what it computes


class Scheduler:
    """Continuous batching: `num_computed_tokens` of every running request chases its `num_tokens`.

    Every accepted choice gets exactly one final output, unless its client aborts it: then nothing follows.
    The cost of a step grows with its rows and the blocks they newly touch, never with context or queue length.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache_config: CacheConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: Collection[int] = (),
        model_name: str = "",
        clock: Callable[[], float] = time.monotonic,
        secret: bytes | None = None,
        whole_prompts: bool = False,
        adapters: AdapterTable | None = None,
        policies: PolicyResolver | None = None,
        pressure: Pressure | None = None,
        block_bytes: int = 0,
        speculation: SpeculationResolver | None = None,
    ) -> None:
        """
        num_blocks     size of the pool, null block included
        max_model_len  tokens of prompt plus output
        clock          seconds, monotonic; replaceable for tests
        secret         root of the prefix cache's digests; random by default
        whole_prompts  prompts never run in chunks: encoders see all of a text at once. A step must have room for one
        adapters       the loaded low-rank adapters; default: there are none
        policies       the cache policies that requests may choose; default: none, every cache is whole
        pressure       shrinks whole caches before anybody is preempted; default: nobody's
        block_bytes    what one block takes, for what answers report
        speculation    the drafters that requests may choose; default: none
        """
        pool = BlockPool(num_blocks, max_pinned=cache_config.max_pinned_blocks)
        prefix_cache = None
        if cache_config.enable_prefix_cache:
            prefix_cache = PrefixCache(pool, cache_config.block_size, model=model_name, secret=secret)
        self.cache = CacheManager(pool, cache_config.block_size, prefix_cache)
        self.cache_control = CacheControl(self.cache, clock)
        self.rows = RowSlots(config.max_num_seqs)
        self.adapters = adapters or AdapterTable()
        self._policies = policies
        self._pressure = pressure
        self._speculation = speculation
        self.progress: list[Progress] = []  # of the requests that speculate, in the step committed last
        self._block_bytes = block_bytes
        self.roster = Roster()
        self.limits = config
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._clock = clock
        self._whole_prompts = whole_prompts
        assert not whole_prompts or config.max_num_batched_tokens >= max_model_len, "no step could hold a whole prompt"
        self._num_arrived = 0
        self._deadlines = Deadlines(config)
        self._in_flight: deque[_Step] = deque()  # the oldest first; only the newest may not be assumed
        self._outputs: list[TokenOutput] = []
        self._counters = Counters()

    @property
    def has_work(self) -> bool:
        return bool(self.roster.families or self._outputs)

    @property
    def left_in_flight(self) -> tuple[Request, ...]:
        """Over, but a step in flight uses what they hold."""
        return tuple([request for step in self._in_flight for request in step.left])

    def add(self, request: EngineRequest) -> None:
        """Accepts a request. Raises QueueFull, PromptTooLong or InvalidParameter, and changes nothing then."""
        if request.request_id in self.roster.families:
            raise InvalidParameter(f"request id {request.request_id!r} is in use; choose another", param="request_id")
        policy = self._resolve_policy(request)
        check_provided(request, None if policy is None else policy.plan)
        speculation = self._resolve_speculation(request)
        max_tokens = check_servable(request, self.cache, self._max_model_len, policy)
        if policy is not None:
            policy = policy.within(len(request.prompt_token_ids) + max_tokens)
        self.adapters.check(request.adapter)
        now = self._clock()
        check_queue(
            self.limits,
            num_waiting=self.roster.num_waiting,
            num_free_rows=self.rows.num_free,
            waiting_tokens=self.roster.queue.num_tokens,
            new_tokens=len(request.prompt_token_ids),
            num_cache_slots=self.cache.num_slots,
            oldest_waiting_s=self._oldest_waiting_s(now),
        )
        sampling = request.sampling
        # with a constraint, an end-of-sequence token that is chosen in spite of ignore_eos is the end of the grammar
        has_no_eos = sampling.ignore_eos and request.constraint is None
        eos_token_ids = frozenset() if has_no_eos else self._eos_token_ids
        self._num_arrived += 1
        family = Family(
            request=request,
            number=self._num_arrived,
            arrival_s=now,
            stop_ids=eos_token_ids.union(sampling.stop_token_ids),
            max_tokens=max_tokens,
            policy=policy,
            may_shrink=policy is None and self._pressure is not None and self._pressure.allows(request),
            adapter=self.adapters.acquire(request.adapter, request.num_choices),
        )
        for choice in range(request.num_choices):
            family.choices[choice] = Request(
                family=family,
                choice=choice,
                token_ids=list(request.prompt_token_ids),
                num_prompt_tokens=len(request.prompt_token_ids),
                chain=self.cache.new_chain(
                    request.tenant, request.cache_salt, request.adapter, None if policy is None else policy.plan
                ),
                policy=policy,
                is_filtering=policy is not None and policy.plan.num_filtered is not None,
                prompt_logprobs=[None] if choice == 0 and sampling.prompt_logprobs is not None else None,
                speculating=None if speculation is None else Speculating(speculation, taps=speculation.first_taps),
            )
        self.roster.add(family, now)
        self._deadlines.arrived(family)

    def _resolve_policy(self, request: EngineRequest) -> ResolvedPolicy | None:
        if request.pooling is not None:
            return None
        if self._policies is not None:
            return self._policies.resolve(request.kv_policy, len(request.prompt_token_ids))
        if request.kv_policy is not None:
            raise InvalidParameter(
                "kv_policy is given, but there is none to choose from; leave it out", param="kv_policy"
            )
        return None

    def _resolve_speculation(self, request: EngineRequest) -> SpeculationOptions | None:
        if request.pooling is not None:
            return None
        if self._speculation is not None:
            return self._speculation.resolve(request.speculative)
        if request.speculative is not None and not request.speculative.get("off"):
            raise InvalidParameter("speculative is given, but there is none to choose from", param="speculative")
        return None

    def abort(self, request_id: str, choice: int | None = None) -> None:
        """The client wants no more of a request, or of one of its choices: no output follows.

        Unknown and finished ones are ignored. May be called while a step is in flight.
        """
        # an end by deadline may be decided and not yet sent
        self._outputs = [o for o in self._outputs if o.request_id != request_id or choice not in (None, o.choice)]
        family = self.roster.families.get(request_id)
        if family is None:
            return
        for request in [r for r in family.choices.values() if choice in (None, r.choice)]:
            if choice is None:  # one choice alone: the client found its stop string, no work is lost
                self._counters.aborted_tokens += request.num_computed_tokens
            self._leave(request)

    def schedule(self) -> StepPlan:
        """The next step: rows that decode, then prompts in chunks, then new requests, within the budgets.

        What is less urgent than the head of the queue comes after it, and gives way when it lacks a row or room.

        Without chunks there is nothing to execute, but `commit` may have outputs.
        """
        assert all(step.is_assumed for step in self._in_flight), "the previous step has not been committed"
        now = self._clock()
        self.cache_control.expire(now)
        self._expire(now)
        draft = _Draft(budget=self.limits.max_num_batched_tokens)
        self._make_way(draft)
        if self._pressure is not None:
            self._pressure.relieve(self.cache, self.roster.running)
        urgent, late = self._running_in_order()
        num_preempted = self._schedule_running(urgent, draft)
        if late and not num_preempted:
            self._schedule_waiting(draft, before=late[0].priority)
        num_preempted += self._schedule_running(late, draft)
        if not num_preempted:
            self._schedule_waiting(draft)
        self._add_guesses(draft)
        plan = StepPlan()
        if draft.chunks:
            plan = StepPlan(
                chunks=tuple(draft.chunks.values()),
                new_rows=tuple(draft.new_rows),
                freed_rows=self.rows.take_unreported(),
                table_edits=tuple(draft.table_edits),
                block_copies=tuple(draft.block_copies),
            )
        self._in_flight.append(_Step(plan, draft.chunks))
        return plan

    def schedule_ahead(self) -> StepPlan | None:
        """The step after the one in flight, as if every row of that got a token that ends nothing but by its number.

        None where what comes next depends on what comes out, where somebody might have to give way, or nothing is left
        to do. The plan is executed after the one in flight, which must be committed first.
        """
        (step,) = self._in_flight
        if self._may_preempt() or not all(is_predictable(*pair) for pair in step.chunks.items()):
            return None
        for request, chunk in step.chunks.items():
            if request.status is Status.RUNNING:
                assume(request, chunk, self.cache)
        step.is_assumed = True
        plan = self.schedule()
        if plan.chunks:
            return plan
        self._in_flight.pop()
        return None

    def commit(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Takes the results of the plan in flight. Returns what became known, ends by deadline included."""
        step = self._in_flight.popleft()
        assert plan is step.plan, "plans are committed in the order in which they were scheduled"
        assert len(result.chunks) == len(plan.chunks), f"{len(result.chunks)} results for {len(plan.chunks)} chunks"
        self.progress = []
        for (request, chunk), outcome in zip(step.chunks.items(), result.chunks, strict=True):
            assert self.rows[chunk.row] is request, "what a step in flight uses is not given away"
            if request.status is Status.RUNNING:  # else it left while the step ran
                self._commit_chunk(request, chunk, outcome, is_assumed=step.is_assumed)
        for request in step.left:
            self._release(request)
            self.adapters.release(request.family.request.adapter)
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """Counters and gauges, without the step times, which the core knows."""
        gauges = {
            "num_running": len(self.roster.running),
            "num_waiting": self.roster.num_waiting,
            "waiting_tokens": self.roster.queue.num_tokens,
            "oldest_waiting_s": self._oldest_waiting_s(self._clock()),
            "num_shrunk": 0 if self._pressure is None else self._pressure.taken.total(),
            "rungs": {} if self._pressure is None else dict(self._pressure.taken),
        }
        return report(self._counters, self.cache.pool.counts, self.cache.prefix_stats, gauges)

    # ---- building a step

    def _make_way(self, draft: _Draft) -> None:
        """Throws requests back to the queue, the least urgent first, until a more urgent head of the queue can run.

        Those that have been preempted often enough keep their places, so that they finish.
        """
        head, running = self.roster.queue.first(), self.roster.running
        while head is not None and running and running[-1].priority > head.priority:
            if self.rows.num_free and self.cache.has_room(head, self._num_spare_blocks):
                return
            limit = self.limits.protect_after_preemptions
            victims = (r for r in reversed(running) if r.priority > head.priority and r.num_preemptions < limit)
            victim = next(victims, None)
            if victim is None:
                return
            self._preempt(victim, draft)

    def _running_in_order(self) -> tuple[list[Request], list[Request]]:
        """Rows that decode and then prompts, but for the prompts less urgent than the head of the queue; and those.

        Decoding rows keep their order whatever their grammars force, so that the batch's block table stays as it is.
        """
        head = self.roster.queue.first()
        decodes: list[Request] = []
        prefills: list[Request] = []
        late: list[Request] = []
        for request in self.roster.running:
            if request.is_decoding:
                decodes.append(request)
            else:
                (late if head is not None and request.priority > head.priority else prefills).append(request)
        return decodes + prefills, late

    def _schedule_running(self, requests: list[Request], draft: _Draft) -> int:
        """Returns how many requests had to give way."""
        num_preempted = self._counters.num_preemptions
        for request in requests:
            if not draft.budget:
                break
            if request.status is Status.RUNNING:  # else it gave way to one before it
                num_tokens = min(self._num_next_tokens(request), draft.budget)
                # nothing to do: its last token is on its way
                if num_tokens and self._make_room(request, num_tokens, draft):
                    self._add_chunk(request, num_tokens, draft)
        return self._counters.num_preemptions - num_preempted

    def _schedule_waiting(self, draft: _Draft, *, before: int | None = None) -> None:
        """Admits from the head of the queue until something is lacking. Nobody overtakes a head that does not fit.

        before   admit only what is more urgent than this
        """
        now = self._clock()
        while draft.budget and self.rows.num_free:
            request = self.roster.queue.first()
            if request is None or (self._whole_prompts and request.num_remaining_tokens > draft.budget):
                return
            if before is not None and request.priority >= before:
                return
            if not self._admit(request, draft):
                return
            self._start(request, now, draft)
            num_tokens = min(self._num_next_tokens(request), draft.budget)
            has_grown = self.cache.grow(request, num_tokens)
            assert has_grown, "admission has seen to the room"
            self._add_chunk(request, num_tokens, draft)

    @property
    def _num_spare_blocks(self) -> int:
        """Every running request will want a block within block_size steps: leave some, so that an admission does not
        lead to a preemption at once. When nobody runs, the whole pool is there for a request.
        """
        return min(len(self.roster.running), self.cache.pool.capacity // 16)

    def _admit(self, request: Request, draft: _Draft) -> bool:
        """Gives the request its first blocks, from a sibling or the prefix cache, if all of it has room."""
        num_spare = self._num_spare_blocks
        source = _fork_source(request)
        if source is not None:
            copies = self.cache.fork(request, source, num_spare)
            if copies is not None:
                draft.block_copies += copies
                request.num_cached_tokens = source.num_cached_tokens
            return copies is not None
        if not self.cache.admit(request, num_spare):
            return False
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self._counters.prompt_tokens_cached += request.num_cached_tokens
        return True

    def _start(self, request: Request, now: float, draft: _Draft) -> None:
        self.roster.start(request)
        self._deadlines.started(request.family)
        if request.queued_s is None:
            request.queued_s = now - request.family.arrival_s
        draft.new_rows.append(
            NewRow(
                row=self.rows.take(request),
                request_id=request.request_id,
                choice=request.choice,
                token_ids=request.token_ids,
                num_prompt_tokens=request.num_prompt_tokens,
                sampling=request.sampling,
                block_ids=self.cache.take_new_blocks(request),
                num_computed=request.num_computed_tokens,
                constraint=request.family.request.constraint,
                pooling=request.pooling,
                adapter=request.family.adapter,
                policy=request.policy,
                packed=tuple(request.packed),
            )
        )

    def _add_chunk(self, request: Request, num_tokens: int, draft: _Draft) -> None:
        assert request.row is not None
        for index, block_id in self.cache.take_edits(request):
            draft.table_edits.append((request.row, index, block_id))
        draft.budget -= num_tokens
        draft.chunks[request] = Chunk(
            row=request.row,
            start=request.num_computed_tokens,
            num_tokens=num_tokens,
            new_block_ids=self.cache.take_new_blocks(request),
            new_parts=self.cache.take_new_parts(request),
            is_sampling=num_tokens == request.num_remaining_tokens
            and request.pooling is None
            and not request.is_filtering,
            filters=request.is_filtering,
            output_index=request.num_output_tokens,
            compaction=self.cache.compaction.planned(request, num_tokens),
            policy=request.policy if request.policy is not request.family.policy else None,
            packed_edits=self.cache.take_packed_edits(request),
            new_side=self.cache.take_new_side(request),
            is_provided=_is_provided(request),
        )

    def _add_guesses(self, draft: _Draft) -> None:
        """Decoding rows check their drafts as far as tokens and blocks are left over."""
        for request, chunk in draft.chunks.items():
            if request.speculating is None:
                continue
            taps = request.speculating.taps
            if taps is not None and taps.hidden_last and chunk.is_sampling:
                chunk = draft.chunks[request] = msgspec.structs.replace(chunk, taps=taps)
            if not chunk.is_decode or chunk.compaction is not None:
                continue
            if taps is None and not request.speculating.draft.tokens:
                continue
            tree = fitting_draft(request, draft.budget, self._max_model_len)
            if tree.tokens:
                tree = tree.first(self.cache.grow_for_draft(request, chunk.num_tokens, len(tree)))
            draft.chunks[request] = msgspec.structs.replace(
                chunk,
                num_tokens=chunk.num_tokens + len(tree),
                new_block_ids=chunk.new_block_ids + self.cache.take_new_blocks(request),
                new_parts=chunk.new_parts + self.cache.take_new_parts(request),
                new_side=chunk.new_side + self.cache.take_new_side(request),
                draft=tree if tree.tokens else None,
                verifier=request.speculating.options.verifier,
                taps=request.speculating.taps,
            )
            draft.budget -= len(tree)
            request.speculating.draft = EMPTY

    def _num_next_tokens(self, request: Request) -> int:
        """Tokens that one chunk may have: it ends where the cache shrinks."""
        num_tokens = request.num_remaining_tokens
        plan = request.cache_plan
        if plan is not None:
            point = plan.next_point(request.num_computed_tokens)
            if point is not None:
                num_tokens = min(num_tokens, point - request.num_computed_tokens)
            if request.num_computed_tokens < plan.num_provided:
                num_tokens = min(num_tokens, plan.num_provided - request.num_computed_tokens)
            if plan.steps_singly:
                num_tokens = min(num_tokens, max(1, request.num_prompt_tokens - request.num_computed_tokens))
        return num_tokens

    def _make_room(self, request: Request, num_tokens: int, draft: _Draft) -> bool:
        """Blocks for the next tokens, if need be from others. False when the request itself had to give way."""
        while not self.cache.grow(request, num_tokens):
            victim = choose_victim(self.roster.running, request, self.limits.protect_after_preemptions)
            self._preempt(victim, draft)
            if victim is request:
                return False
        return True

    def _may_preempt(self) -> bool:
        """Whether the next step might have to throw somebody out. Every row that decodes wants one block at most, and
        what prompts want is promised.
        """
        head, running = self.roster.queue.first(), self.roster.running
        if head is not None and running and running[-1].priority > head.priority:
            return True
        return self.cache.pool.num_available - self.cache.num_promised < len(running)

    def _preempt(self, request: Request, draft: _Draft) -> None:
        """Back to the queue with the tokens it has; their keys and values will be computed again."""
        assert not request.awaits_token, "a step is planned ahead only where nobody has to give way"
        chunk = draft.chunks.pop(request, None)
        if chunk is not None:
            draft.budget += chunk.num_tokens
            draft.table_edits = [edit for edit in draft.table_edits if edit[0] != chunk.row]
        if request.speculating is not None:
            request.speculating.draft = EMPTY
        self._counters.num_preemptions += 1
        request.num_preemptions += 1
        self.roster.requeue(request, self._clock())
        self._release(request)

    # ---- results

    def _commit_chunk(self, request: Request, chunk: Chunk, outcome: ChunkResult, *, is_assumed: bool) -> None:
        num_nodes = 0 if chunk.draft is None else len(chunk.draft)
        num_tokens = chunk.num_tokens - num_nodes - outcome.is_deferred
        if is_assumed:
            settle(request)
        else:
            self.cache.advance(request, num_tokens)
        if chunk.start < request.num_prompt_tokens:
            num_prompt_tokens = min(num_tokens, request.num_prompt_tokens - chunk.start)
            self._counters.prompt_tokens_computed += num_prompt_tokens
        if outcome.error is not None:
            self._finish(request, Ending("error", error=outcome.error))
            return
        if request.pooling is not None:
            self._commit_pooled(request, outcome)
            return
        if request.is_filtering:
            if outcome.filtered:
                self._shorten_prompt(request, outcome.filtered)
            return
        has_tokens = chunk.is_sampling and not outcome.is_deferred
        assert bool(outcome.token_ids) == has_tokens, "tokens come from chunks that sample, and only from those"
        collect_prompt_logprobs(request, chunk, outcome)
        # no chunk of this row had an error, so all its keys and values so far are finite
        if outcome.token_ids or chunk.compaction is not None:
            self.cache.publish(request)
        if chunk.compaction is not None:
            if outcome.is_deferred:
                self.cache.compaction.cancel(request)
            else:
                self._compact(request, outcome)
        if not outcome.token_ids:
            if chunk.draft is not None:
                self.cache.trim(request)
            return
        num_new_tokens, ending = append_tokens(request, outcome.token_ids)
        self._commit_draft(request, chunk, outcome, num_new_tokens)
        self._counters.generation_tokens += num_new_tokens
        if not request.has_emitted:
            self.roster.unpark_all(request.family, self._clock())
        self._outputs.append(make_output(request, num_new_tokens, outcome.logprobs, ending, self._block_bytes))
        if ending is not None:
            self._leave(request)

    def _commit_draft(self, request: Request, chunk: Chunk, outcome: ChunkResult, num_new_tokens: int) -> None:
        """The accepted nodes are computed tokens like any other; nothing is left of the others."""
        if chunk.draft is not None:
            self.cache.advance(request, min(len(outcome.accepted), num_new_tokens))
            self.cache.trim(request)
            self.cache.publish(request)
            count_draft(request, chunk.draft, outcome.accepted, num_new_tokens, self._counters.drafts)
        speculating = request.speculating
        if speculating is None:
            return
        if chunk.draft is not None or outcome.taps is not None or not speculating.is_followed:
            self.progress.append(Progress(request, chunk.draft, outcome.accepted, num_new_tokens, outcome.taps))

    def _shorten_prompt(self, request: Request, places: Sequence[int]) -> None:
        """The first pass over the prompt is done: this request and its siblings begin with what is left of it."""
        token_ids = [request.token_ids[place] for place in places]
        owner = request.family.request
        for choice in request.family.choices.values():
            choice.is_filtering = False
            choice.token_ids = list(token_ids)
            choice.num_prompt_tokens = len(token_ids)
            choice.chain = self.cache.new_chain(owner.tenant, owner.cache_salt, owner.adapter)
        self.roster.requeue(request, self._clock())
        self._release(request)

    def _compact(self, request: Request, outcome: ChunkResult) -> None:
        """The runner has moved the survivors: what they no longer need comes free."""
        plan = request.cache_plan
        assert plan is not None
        counts = self._counters.compression.setdefault(plan.policy, CompressionCounts())
        counts.requests += not request.is_compressed
        counts.compactions += 1
        num_evicted, num_released = request.num_evicted, request.num_blocks_released
        if outcome.kept and request.policy is not None:
            request.unsettled = request.policy
            request.policy = replace(request.policy, plan=plan.settled(outcome.kept))
        self.cache.compact(request, outcome.kept_blocks)
        request.num_merged += outcome.num_merged
        counts.evicted_tokens += request.num_evicted - num_evicted
        counts.released_bytes += (request.num_blocks_released - num_released) * self._block_bytes

    def _commit_pooled(self, request: Request, outcome: ChunkResult) -> None:
        """A pooling request is over with its prompt."""
        if not request.num_remaining_tokens:
            self.cache.publish(request)
            self._outputs.append(make_pooled_output(request, outcome))
            self._leave(request)

    def _finish(self, request: Request, ending: Ending) -> None:
        """Ends a request that has no new tokens."""
        self._outputs.append(make_output(request, 0, None, ending, self._block_bytes))
        self._leave(request)

    def _expire(self, now: float) -> None:
        while (expired := self._deadlines.next_expired(now)) is not None:
            family, code = expired
            for request in list(family.choices.values()):
                self._finish(request, Ending("error", error=code))

    def _leave(self, request: Request) -> None:
        """The request is over. What it holds goes back now, or when the step in flight that uses it is committed."""
        was = self.roster.leave(request, self._clock())
        if not request.family.choices:
            self._deadlines.ended(request.family)
        if was is Status.RUNNING and self._in_flight:
            self._in_flight[-1].left.append(request)
            return
        if was is Status.RUNNING:
            self._release(request)
        self.adapters.release(request.family.request.adapter)

    def _release(self, request: Request) -> None:
        self.cache.release(request)
        self.rows.release(request)

    def _oldest_waiting_s(self, now: float) -> float:
        since_s = self.roster.queue.oldest_since_s()
        return 0.0 if since_s is None else now - since_s


def _fork_source(request: Request) -> Request | None:
    """A running choice of the same family that has computed the prompt, for one that has nothing of its own yet.

    Not from or with a cache that shrinks: what is left of the prompt then is not the prompt. Nor where the policy must
    have seen the prompt.
    """
    if request.num_output_tokens or _has_own_prompt(request):
        return None
    for other in request.family.choices.values():
        if other.status is Status.RUNNING and other.has_computed_prompt and not _has_own_prompt(other):
            return other
    return None


def _has_own_prompt(request: Request) -> bool:
    plan = request.cache_plan
    return plan is not None and bool(
        plan.first_point is not None or plan.num_queries or plan.is_private or plan.side_tokens
    )


def _is_provided(request: Request) -> bool:
    """Whether the policy supplies keys and values of what is computed next."""
    plan = request.cache_plan
    return plan is not None and request.num_computed_tokens < plan.num_provided
