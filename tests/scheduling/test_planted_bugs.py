"""Known kinds of mistakes, planted one at a time: the checks that guard the scheduler must find every one.

A bug that nothing here notices is a hole in `check_invariants` or in the FakeRunner, not a harmless bug.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from engine.scheduling import preemption, prefix_cache, scheduler
from engine.scheduling.block_pool import NULL_BLOCK, BlockPool
from engine.scheduling.cache_manager import CacheManager
from engine.scheduling.outputs import Ending
from engine.scheduling.plan import StepPlan
from engine.scheduling.prefix_cache import HashChain, PrefixCache
from engine.scheduling.request import BlockTable, Request, Status
from engine.scheduling.roster import Roster
from engine.scheduling.scheduler import Scheduler
from tests.fakes import ContractViolation
from tests.scheduling.harness import Harness
from tests.scheduling.traffic import Traffic

Patch = pytest.MonkeyPatch
bugs: dict[str, Callable[[Patch], None]] = {}


def bug(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
    bugs[plant.__name__] = plant
    return plant


def wrap(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Replaces a method by `change(original, *arguments)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def stress() -> None:
    """Small engines under traffic, everything checked; raises when something is wrong."""
    for seed, (num_blocks, block_size) in itertools.product(range(4), ((14, 4), (40, 2))):
        harness = Harness(num_blocks=num_blocks, block_size=block_size, max_model_len=48, max_num_batched_tokens=12)
        traffic = Traffic(harness, seed)
        for _ in range(150):
            traffic.tick()
        harness.run(max_steps=2000)
        harness.check_finished()


@bug
def release_skips_a_decref(patch: Patch) -> None:
    wrap(patch, BlockPool, "free", lambda original, self, blocks: original(self, blocks[1:]))


@bug
def release_frees_twice(patch: Patch) -> None:
    def release(original: Any, self: CacheManager, request: Request) -> None:
        self.pool.free(request.tables[0].block_ids)
        original(self, request)

    wrap(patch, CacheManager, "release", release)


@bug
def sharing_takes_no_reference(patch: Patch) -> None:
    patch.setattr(BlockPool, "share", lambda self, blocks: None)


@bug
def beginning_of_a_sequence_is_reclaimed_before_its_end(patch: Patch) -> None:
    wrap(patch, BlockPool, "free", lambda original, self, blocks: original(self, list(blocks)[::-1]))


@bug
def null_block_is_handed_out(patch: Patch) -> None:
    def init(original: Any, self: BlockPool, num_blocks: int, **options: Any) -> None:
        original(self, num_blocks, **options)
        self._free.append(NULL_BLOCK)

    wrap(patch, BlockPool, "__init__", init)


@bug
def a_hit_covers_the_whole_prompt(patch: Patch) -> None:
    def match(original: Any, self: PrefixCache, chain: HashChain, tokens: list[int], max_blocks: int) -> Any:
        return original(self, chain, tokens, len(tokens) // self.block_size)

    wrap(patch, PrefixCache, "match", match)


@bug
def salt_is_left_out(patch: Patch) -> None:
    def new_chain(original: Any, self: CacheManager, tenant: str, cache_salt: str, *rest: Any) -> Any:
        return original(self, tenant, "", *rest)

    wrap(patch, CacheManager, "new_chain", new_chain)


@bug
def tokens_are_not_compared_and_digests_collide(patch: Patch) -> None:
    wrap(
        patch,
        PrefixCache,
        "__init__",
        lambda original, self, *args, **options: original(
            self, *args, **{**options, "digest": lambda data: prefix_cache.sha256(data)[:1]}
        ),
    )
    patch.setattr(PrefixCache, "_is_same", lambda *args: True)


@bug
def blocks_are_published_before_they_are_computed(patch: Patch) -> None:
    def grow(original: Any, self: CacheManager, request: Request, num_tokens: int) -> bool:
        if not original(self, request, num_tokens):
            return False
        self.advance(request, num_tokens)
        self.publish(request)
        self.advance(request, -num_tokens)
        return True

    wrap(patch, CacheManager, "grow", grow)


@bug
def blocks_behind_a_cleared_one_are_published(patch: Patch) -> None:
    def publish(
        original: Any, self: PrefixCache, chain: HashChain, tokens: Any, i: int, block: int, parent: Any
    ) -> Any:
        if parent is not None and parent not in self._by_block:
            self._by_block[parent] = prefix_cache._Entry(parent, None, chain.digests[i - 1], b"", chain.namespace)
        return original(self, chain, tokens, i, block, parent)

    wrap(patch, PrefixCache, "publish", publish)


@bug
def an_equal_block_is_used_without_telling_the_runner(patch: Patch) -> None:
    patch.setattr(CacheManager, "take_edits", lambda self, request: [])


@bug
def fork_shares_the_partly_filled_block(patch: Patch) -> None:
    def fork(original: Any, self: CacheManager, request: Request, source: Request, num_spare: int) -> Any:
        copies = original(self, request, source, num_spare)
        if copies:
            table = request.tables[0]
            self.pool.share([copies[0][0]])
            self.pool.free([table.block_ids[-1]])
            table.block_ids[-1] = copies[0][0]
        return copies and ()

    wrap(patch, CacheManager, "fork", fork)


@bug
def fork_forgets_the_copy(patch: Patch) -> None:
    def fork(original: Any, *args: Any) -> Any:
        copies = original(*args)
        return copies and ()

    wrap(patch, CacheManager, "fork", fork)


@bug
def fork_skips_the_last_prompt_token(patch: Patch) -> None:
    def fork(original: Any, self: CacheManager, request: Request, source: Request, num_spare: int) -> Any:
        copies = original(self, request, source, num_spare)
        if copies is not None:
            request.num_computed_tokens += 1
        return copies

    wrap(patch, CacheManager, "fork", fork)


@bug
def growth_is_one_block_short(patch: Patch) -> None:
    wrap(patch, CacheManager, "blocks_for", lambda original, self, slots: original(self, slots - 1))


@bug
def promises_are_not_taken_back(patch: Patch) -> None:
    def release(original: Any, self: CacheManager, request: Request) -> None:
        num_promised, own = self.num_promised, self.num_promised_to(request)
        original(self, request)
        self.num_promised = num_promised if own else self.num_promised

    wrap(patch, CacheManager, "release", release)


@bug
def slots_and_positions_are_mixed_up(patch: Patch) -> None:
    def advance(original: Any, self: CacheManager, request: Request, num_tokens: int) -> None:
        original(self, request, num_tokens)
        request.tables[0].num_slots += num_tokens > 1

    wrap(patch, CacheManager, "advance", advance)


@bug
def new_blocks_are_sent_twice(patch: Patch) -> None:
    def take(original: Any, self: CacheManager, request: Request) -> Any:
        new = original(self, request)
        if len(new) > 1:
            request.tables[0].num_sent -= 1
        return new

    wrap(patch, CacheManager, "take_new_blocks", take)


@bug
def abort_frees_blocks_of_the_step_in_flight(patch: Patch) -> None:
    def leave(self: Scheduler, request: Request) -> None:
        if self.roster.leave(request, 0.0) is Status.RUNNING:
            self._release(request)
        if not request.family.choices:
            self._deadlines.ended(request.family)

    patch.setattr(Scheduler, "_leave", leave)


@bug
def results_of_aborted_requests_are_sent(patch: Patch) -> None:
    def commit(original: Any, self: Scheduler, plan: StepPlan, result: Any) -> Any:
        for request in self.left_in_flight:
            request.status = Status.RUNNING
        return original(self, plan, result)

    wrap(patch, Scheduler, "commit", commit)


@bug
def blocks_with_nan_are_published(patch: Patch) -> None:
    def finish(original: Any, self: Scheduler, request: Request, ending: Ending) -> None:
        if ending.error == "numerical_error":
            self.cache.publish(request)
        original(self, request, ending)

    wrap(patch, Scheduler, "_finish", finish)


@bug
def budget_is_exceeded(patch: Patch) -> None:
    draft = scheduler._Draft
    patch.setattr(scheduler, "_Draft", lambda budget: draft(budget=budget + 1))


@bug
def preempted_rows_are_lost(patch: Patch) -> None:
    def preempt(original: Any, self: Scheduler, request: Request, draft: Any) -> None:
        row = request.row
        original(self, request, draft)
        self.rows._free.remove(row)

    wrap(patch, Scheduler, "_preempt", preempt)


@bug
def chunk_of_a_preempted_request_stays_in_the_plan(patch: Patch) -> None:
    def preempt(original: Any, self: Scheduler, request: Request, draft: Any) -> None:
        chunk = draft.chunks.get(request)
        original(self, request, draft)
        if chunk is not None:
            draft.chunks[request] = chunk

    wrap(patch, Scheduler, "_preempt", preempt)


@bug
def preemption_keeps_the_progress_counter(patch: Patch) -> None:
    def release(original: Any, self: CacheManager, request: Request) -> None:
        computed = request.num_computed_tokens
        original(self, request)
        request.num_computed_tokens = computed

    wrap(patch, CacheManager, "release", release)

    def start(original: Any, self: CacheManager, request: Request, blocks: list[int], num_computed: int) -> None:
        original(self, request, blocks, max(num_computed, request.num_computed_tokens))

    wrap(patch, CacheManager, "_start", start)


@bug
def the_oldest_gives_way(patch: Patch) -> None:
    choose = preemption.choose_victim

    def oldest(running: list[Request], request: Request, protect_after: int) -> Request:
        victim = choose(running, request, protect_after)
        return victim if len(running) == 1 else next(r for r in running if r is not request)

    patch.setattr(scheduler, "choose_victim", oldest)


@bug
def parked_choices_are_forgotten(patch: Patch) -> None:
    patch.setattr(Roster, "unpark_all", lambda self, family, now: None)


@bug
def outputs_are_lost_by_preemption(patch: Patch) -> None:
    def preempt(original: Any, self: Scheduler, request: Request, draft: Any) -> None:
        original(self, request, draft)
        del request.token_ids[request.num_prompt_tokens :]

    wrap(patch, Scheduler, "_preempt", preempt)


@bug
def edits_are_applied_at_the_wrong_index(patch: Patch) -> None:
    def replace(original: Any, self: CacheManager, table: BlockTable, index: int, block_id: int) -> None:
        original(self, table, index, block_id)
        table.edits = [(max(0, i - 1), b) for i, b in table.edits]

    wrap(patch, CacheManager, "_replace", replace)


@bug
def block_ids_are_kept_in_order_of_their_number(patch: Patch) -> None:
    def grow(original: Any, self: CacheManager, request: Request, num_tokens: int) -> bool:
        grown = original(self, request, num_tokens)
        request.tables[0].block_ids.sort()
        return grown

    wrap(patch, CacheManager, "grow", grow)


def test_without_a_planted_bug_the_traffic_passes() -> None:
    stress()


@pytest.mark.parametrize("name", bugs)
def test_the_checks_find(name: str, monkeypatch: Patch) -> None:
    bugs[name](monkeypatch)
    with pytest.raises((AssertionError, ContractViolation, RuntimeError, LookupError, ValueError)):
        stress()


def test_there_are_enough_planted_bugs() -> None:
    assert len(bugs) >= 25
