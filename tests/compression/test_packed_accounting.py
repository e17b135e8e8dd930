"""Blocks of packed requests under random traffic: the scheduler alone, and what the runner would know of its tables."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from engine.compression import registry
from engine.compression.base import CacheShape
from engine.config import CacheConfig, SchedulerConfig
from engine.scheduling.compression import ResolvedPolicy
from engine.scheduling.invariants import check_invariants
from engine.scheduling.plan import ChunkResult, StepPlan, StepResult
from engine.scheduling.scheduler import Scheduler
from engine.types import EngineRequest, SamplingParams

SHAPE = CacheShape(num_layers=1, num_kv_heads=1, head_dim=32, head_dim_v=32, block_size=4)


class Resolver:
    """Every request but those that ask for none has the policy that it names."""

    def resolve(self, choice: Mapping[str, Any] | None, num_prompt_tokens: int) -> ResolvedPolicy | None:
        if choice is None:
            return None
        policy = registry.create(choice["name"])
        return ResolvedPolicy(policy.plan(num_prompt_tokens, SHAPE), 8.0, policy)


class Tables:
    """The tables of rows as a runner keeps them, from plans alone."""

    def __init__(self) -> None:
        self.dense: dict[int, list[int]] = {}
        self.packed: dict[int, list[int]] = {}

    def run(self, plan: StepPlan, random: random.Random) -> StepResult:
        for new in plan.new_rows:
            self.dense[new.row], self.packed[new.row] = list(new.block_ids), []
        for row, index, block_id in plan.table_edits:
            self.dense[row][index] = block_id
        results = []
        for chunk in plan.chunks:
            self.dense[chunk.row] += chunk.new_block_ids
            is_deferred = chunk.is_sampling and random.random() < 0.05
            if chunk.compaction is not None and not is_deferred:
                self.dense[chunk.row] = list(chunk.compaction.tables[0])
                self.packed[chunk.row] += chunk.compaction.packed
            token_ids = (random.randrange(10, 99),) if chunk.is_sampling and not is_deferred else ()
            results.append(ChunkResult(token_ids=token_ids, is_deferred=is_deferred))
        return StepResult(chunks=tuple(results))


def drive(num_requests: int, seed: int) -> int:
    """Runs so many random requests with a few aborts in a pool that is too small. Returns the preemptions."""
    numbers = random.Random(seed)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=24),
        CacheConfig(block_size=4),
        num_blocks=30,
        max_model_len=96,
        policies=Resolver(),
    )
    tables, added = Tables(), 0
    prefixes = [[numbers.randrange(10, 99) for _ in range(30)] for _ in range(3)]
    while added < num_requests or scheduler.has_work:
        if added < num_requests and scheduler.roster.num_waiting < 8 and numbers.random() < 0.4:
            prompt = numbers.choice(prefixes)[: numbers.randrange(1, 30)] + [numbers.randrange(10, 99)] * 3
            policy = numbers.choice([None, {"name": "int8"}, {"name": "kivi"}])
            sampling = SamplingParams(temperature=0.0, max_tokens=numbers.randrange(1, 50), ignore_eos=True)
            scheduler.add(
                EngineRequest(request_id=f"r{added}", prompt_token_ids=prompt, sampling=sampling, kv_policy=policy)
            )
            added += 1
        plan = scheduler.schedule()
        check_invariants(scheduler, plan)
        result = tables.run(plan, numbers)
        if numbers.random() < 0.05:
            scheduler.abort(f"r{numbers.randrange(max(1, added))}")
        scheduler.commit(plan, result)
        check_invariants(scheduler)
        for chunk in plan.chunks:
            request = scheduler.rows[chunk.row] if chunk.row in _rows_of(scheduler) else None
            if request is not None:
                table = request.tables[0]
                edited = dict(enumerate(tables.dense[chunk.row])) | dict(table.edits)
                assert [edited[index] for index in range(table.num_sent)] == table.block_ids[: table.num_sent]
                assert tables.packed[chunk.row] == request.packed
    assert scheduler.cache.pool.counts.active == 0, "blocks leaked"
    assert scheduler.cache.num_promised == 0
    return scheduler.stats().num_preemptions


def _rows_of(scheduler: Scheduler) -> set[int | None]:
    return {request.row for request in scheduler.roster.running}


def test_random_traffic_leaks_no_block_and_leaves_the_runner_with_the_same_tables() -> None:
    assert drive(120, seed=1) > 0, "some were preempted"


@pytest.mark.slow
def test_ten_thousand_requests_leak_no_block() -> None:
    for seed in range(10):
        drive(1000, seed)
