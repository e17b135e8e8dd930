"""Blocks of requests with shared packed blocks, classes, side data and counts found out late, under random traffic."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from engine.config import CacheConfig, SchedulerConfig
from engine.scheduling.compression import CachePlan, PackedClass, Realisation, ResolvedPolicy
from engine.scheduling.invariants import check_invariants
from engine.scheduling.plan import Chunk, ChunkResult, StepPlan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.types import EngineRequest, SamplingParams

BLOCK = 4


class Resolver:
    """Plans by name, of a policy that is nobody."""

    def resolve(self, choice: Mapping[str, Any] | None, num_prompt_tokens: int) -> ResolvedPolicy | None:
        name, n = (choice or {}).get("name"), num_prompt_tokens
        if name is None:
            return None
        if name == "sealed":
            plan = CachePlan(name, Realisation.PACKED, 8, 8, (0,), places=2, format="int8", is_sealed=True)
        elif name == "classes":
            groups = (n - 1) // BLOCK
            classes = (
                PackedClass("a", 3, groups // 2 * BLOCK, BLOCK),
                PackedClass("b", 2, -(-groups // 2) * BLOCK, BLOCK),
            )
            plan = CachePlan(name, Realisation.PACKED, n, 2 * BLOCK, (n - groups * BLOCK,), places=3, classes=classes)
        elif name == "side":
            plan = CachePlan(name, Realisation.SLOTS, max(n, 9), 5, (9,), side_tokens=7, steps_singly=True)
        elif name == "adaptive":
            plan = CachePlan(name, Realisation.LAYERS, n, 0, (n, n, n), num_queries=n, is_adaptive=True)
        else:
            plan = CachePlan(name, Realisation.DENSE, None, 0, (), num_provided=n - 1, is_private=True)
        return ResolvedPolicy(plan, 8.0, object())


class Runner:
    """What a runner would know of rows: packed blocks, and how many slots a row has turned out to keep."""

    def __init__(self, numbers: random.Random) -> None:
        self._random = numbers
        self.packed: dict[int, list[int]] = {}
        self.side: dict[int, list[int]] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for new in plan.new_rows:
            self.packed[new.row], self.side[new.row] = list(new.packed), []
        return StepResult(chunks=tuple(self._result(chunk) for chunk in plan.chunks))

    def _result(self, chunk: Chunk) -> ChunkResult:
        for index, block_id in chunk.packed_edits:
            self.packed[chunk.row][index] = block_id
        self.side[chunk.row] += chunk.new_side
        kept: tuple[int, ...] = ()
        is_deferred = chunk.is_sampling and self._random.random() < 0.05
        if chunk.compaction is not None and not is_deferred:
            self.packed[chunk.row] += chunk.compaction.packed
            if len(chunk.compaction.kept) > 1:
                kept = tuple(self._random.randint(1, count) for count in chunk.compaction.kept)
        assert not (chunk.is_provided and chunk.is_sampling)
        token_ids = (self._random.randrange(10, 99),) if chunk.is_sampling and not is_deferred else ()
        return ChunkResult(token_ids=token_ids, is_deferred=is_deferred, kept=kept)


def drive(num_requests: int, seed: int) -> tuple[int, int]:
    """Runs so many random requests with a few aborts in a pool that is too small. Returns preemptions and hits."""
    numbers = random.Random(seed)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=24),
        CacheConfig(block_size=BLOCK),
        num_blocks=48,
        max_model_len=96,
        policies=Resolver(),
    )
    runner, added, hits = Runner(numbers), 0, 0
    prefixes = [[numbers.randrange(10, 99) for _ in range(30)] for _ in range(3)]
    kinds = [None, "sealed", "sealed", "classes", "side", "adaptive", "provided"]
    while added < num_requests or scheduler.has_work:
        if added < num_requests and scheduler.roster.num_waiting < 8 and numbers.random() < 0.4:
            prompt = numbers.choice(prefixes)[: numbers.randrange(1, 30)] + [numbers.randrange(10, 99)] * 3
            sampling = SamplingParams(temperature=0.0, max_tokens=numbers.randrange(1, 50), ignore_eos=True)
            kind = numbers.choice(kinds)
            policy = None if kind is None else {"name": kind}
            scheduler.add(
                EngineRequest(request_id=f"r{added}", prompt_token_ids=prompt, sampling=sampling, kv_policy=policy)
            )
            added += 1
        plan = scheduler.schedule()
        check_invariants(scheduler, plan)
        hits += sum(bool(new.packed) for new in plan.new_rows)
        result = runner.run(plan)
        if numbers.random() < 0.05:
            scheduler.abort(f"r{numbers.randrange(max(1, added))}")
        scheduler.commit(plan, result)
        check_invariants(scheduler)
        for request in scheduler.roster.running:
            assert request.row is not None
            edited = dict(enumerate(runner.packed[request.row])) | dict(request.packed_edits)
            assert list(edited.values()) == request.packed
            assert runner.side[request.row][: len(request.side)] == request.side[: request.num_side_sent]
            del runner.side[request.row][len(request.side) :]
    assert scheduler.cache.pool.counts.active == 0, "blocks leaked"
    assert scheduler.cache.num_promised == 0
    return scheduler.stats().num_preemptions, hits


def test_random_traffic_leaks_no_block_and_leaves_the_runner_with_the_same_blocks() -> None:
    preemptions, hits = drive(150, seed=1)
    assert preemptions > 0, "some were preempted"
    assert hits > 0, "some began with packed blocks"


@pytest.mark.slow
def test_ten_thousand_requests_leak_no_block() -> None:
    for seed in range(10):
        drive(1000, seed)


def test_a_plan_that_is_settled_counts_what_was_found() -> None:
    plan = CachePlan("p", Realisation.LAYERS, 10, 0, (10, 10), is_adaptive=True).settled((3, 7))
    assert [plan.slots_at(12, group) for group in range(2)] == [5, 9]
    assert replace(plan, kept=(10, 10), is_adaptive=True) != plan
