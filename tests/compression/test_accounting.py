"""Blocks under random traffic with every way of keeping a cache: the scheduler alone, checked around each step."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from engine.compression import registry
from engine.compression.base import CacheShape
from engine.compression.composed import compose
from engine.compression.ladder import ladder
from engine.compression.razor_attention import RazorAttention
from engine.compression.resolver import Policies
from engine.config import CacheConfig, SchedulerConfig
from engine.models.batch import KVSpec
from engine.scheduling.compression import Realisation, ResolvedPolicy
from engine.scheduling.invariants import check_invariants
from engine.scheduling.plan import Chunk, ChunkResult, StepPlan, StepResult
from engine.scheduling.pressure import Pressure
from engine.scheduling.scheduler import Scheduler
from engine.speculation.options import SpeculationOptions
from engine.speculation.tree import DraftTree
from engine.types import EngineRequest, SamplingParams

BLOCK_SIZE = 4
SHAPE = CacheShape(num_layers=3, num_kv_heads=2, head_dim=32, head_dim_v=32, block_size=BLOCK_SIZE)
SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_dim=32, head_dim_v=32)
LADDER = '["int8", {"name": "streaming_llm", "budget": 5}]'
RAZOR = RazorAttention(num_sink=2, min_recent=6, divisor=20.0, period=4).bind(((0, 1), (2, 0)))
CHOICES: list[dict[str, Any] | None] = [
    None,
    {"name": "snapkv", "budget": 10, "window": 4},
    {"name": "h2o", "budget": 10, "period": 4},
    {"name": "streaming_llm", "budget": 9, "period": 5},
    {"name": "pyramidkv", "budget": 12, "window": 4},
    {"name": "raas", "budget": 8},
    {"name": "quest", "budget": 12},
    {"name": "gemfilter", "budget": 10, "num_recent": 3},
    {"name": "int8"},
    {"name": "snapkv", "budget": 6, "window": 4, "format": "int8"},
    {"name": "h2o", "budget": 17, "period": 0, "format": {"name": "kivi", "bits": 2}},
    {"name": "razor"},
]


class Resolver:
    """See `PolicyResolver`."""

    def resolve(self, choice: Mapping[str, Any] | None, num_prompt_tokens: int) -> ResolvedPolicy | None:
        if choice is None:
            return None
        options = {name: value for name, value in choice.items() if name not in ("name", "format")}
        policy: Any = RAZOR if choice["name"] == "razor" else registry.create(choice["name"], options)
        if "format" in choice:
            policy = compose(policy, choice["format"], SHAPE)
        return ResolvedPolicy(policy.plan(num_prompt_tokens, SHAPE), 8.0, policy)


class Speculation:
    """Whoever asks for it speculates; see `engine.speculation.options.SpeculationResolver`."""

    def resolve(self, choice: Mapping[str, Any] | None) -> SpeculationOptions | None:
        return None if choice is None else SpeculationOptions(("ngram",), 12)


def guess(scheduler: Scheduler, numbers: random.Random) -> None:
    """Drafts of all shapes for some of those who speculate."""
    for request in scheduler.roster.running:
        if request.speculating is not None and numbers.random() < 0.8:
            parents = [numbers.randint(-1, i - 1) for i in range(numbers.randrange(12))]
            tokens = tuple(range(10, 10 + len(parents)))
            request.speculating.draft = DraftTree(
                tokens, tuple(parents), (0.5,) * len(tokens), ("ngram",) * len(tokens)
            )


def walked(draft: DraftTree | None, numbers: random.Random) -> tuple[int, ...]:
    """A path of the draft."""
    return () if draft is None else draft.path(numbers.randrange(-1, len(draft)))


def result_of(scheduler: Scheduler, chunk: Chunk, numbers: random.Random) -> ChunkResult:
    """What a runner could answer: deferrals and errors among it."""
    request = scheduler.rows[chunk.row]
    if numbers.random() < 0.01:
        return ChunkResult(error="numerical_error")
    if chunk.filters:
        is_last = chunk.start + chunk.num_tokens == request.num_prompt_tokens
        kept = request.cache_plan.num_filtered if request.cache_plan is not None else None
        places = sorted(numbers.sample(range(request.num_prompt_tokens), kept or 1))
        return ChunkResult(filtered=tuple(places) if is_last else ())
    is_deferred = chunk.is_sampling and numbers.random() < 0.05
    kept_blocks: tuple[int, ...] = ()
    plan = request.cache_plan
    if chunk.compaction is not None and chunk.compaction.num_packed is not None and not is_deferred:
        num_older = len(request.packed) - 1  # the newest stays
        kept_blocks = (*sorted(numbers.sample(range(num_older), chunk.compaction.num_packed - 1)), num_older)
    if chunk.compaction is not None and plan is not None and plan.realisation is Realisation.BLOCKS and not is_deferred:
        pinned = range(-(-request.num_prompt_tokens // BLOCK_SIZE))  # RaaS keeps the prompt
        others = range(len(pinned), len(request.tables[0].block_ids))
        num_others = chunk.compaction.kept[0] // BLOCK_SIZE - len(pinned)
        kept_blocks = (*pinned, *sorted(numbers.sample(others, num_others)))
    if not chunk.is_sampling or is_deferred:
        return ChunkResult(is_deferred=is_deferred, kept_blocks=kept_blocks)
    accepted = walked(chunk.draft, numbers)
    token_ids = (*(chunk.draft.tokens[node] for node in accepted if chunk.draft), numbers.randrange(10, 99))
    return ChunkResult(token_ids=token_ids, accepted=accepted, kept_blocks=kept_blocks)


def drive(num_requests: int, seed: int) -> Scheduler:
    """Runs so many random requests, some aborted, in a pool that is too small for them."""
    numbers = random.Random(seed)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=24),
        CacheConfig(block_size=BLOCK_SIZE),
        num_blocks=34,
        max_model_len=96,
        policies=Resolver(),
        pressure=Pressure(
            ladder(LADDER, Policies(CacheConfig(block_size=BLOCK_SIZE), SPEC, torch.float32)), is_default=True
        ),
        speculation=Speculation(),  # type: ignore[arg-type]
    )
    added = 0
    prefixes = [[numbers.randrange(10, 99) for _ in range(40)] for _ in range(3)]
    while added < num_requests or scheduler.has_work:
        if added < num_requests and scheduler.roster.num_waiting < 8 and numbers.random() < 0.4:
            scheduler.add(
                EngineRequest(
                    request_id=f"r{added}",
                    prompt_token_ids=[*numbers.choice(prefixes)[: numbers.randrange(1, 40)], numbers.randrange(10, 99)],
                    sampling=SamplingParams(temperature=0.0, max_tokens=numbers.randrange(1, 40), ignore_eos=True),
                    num_choices=numbers.choice([1, 1, 1, 2]),
                    kv_policy=numbers.choice([*CHOICES, None, None, None]),
                    speculative=numbers.choice([None, {}]),
                )
            )
            added += 1
        guess(scheduler, numbers)
        plan: StepPlan = scheduler.schedule()
        check_invariants(scheduler, plan)
        result = StepResult(chunks=tuple(result_of(scheduler, chunk, numbers) for chunk in plan.chunks))
        if numbers.random() < 0.05:
            scheduler.abort(f"r{numbers.randrange(max(1, added))}")
        scheduler.commit(plan, result)
        check_invariants(scheduler)
    assert scheduler.cache.pool.counts.active == 0, "blocks leaked"
    assert scheduler.cache.num_promised == 0
    assert not any(pool.broken_blocks for pool in scheduler.cache.compaction.part_pools.values())
    return scheduler


def test_random_traffic_leaks_no_block() -> None:
    scheduler = drive(150, seed=1)
    stats = scheduler.stats()
    assert stats.num_preemptions > 0, "the pool is large enough for everybody: nothing was tried"
    assert set(stats.rungs) == {"int8", "streaming_llm"}
    assert set(stats.compression) == {"snapkv", "h2o", "streaming_llm", "pyramidkv", "raas", "int8", "razor_attention"}
    assert set(scheduler.cache.compaction.part_pools) == {3, 6}, "tables per layer and per head were there"
    assert stats.spec_steps > 100


@pytest.mark.slow
def test_ten_thousand_requests_leak_no_block() -> None:
    for seed in range(10):
        drive(1000, seed)
