"""Eviction and a format in one request: what survives the prompt's end is packed, and nothing else decides."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
import torch

from engine.compression import registry
from engine.compression.base import CacheShape
from engine.compression.composed import Composed, compose
from engine.compression.resolver import Policies
from engine.config import CacheConfig
from engine.errors import InvalidParameter
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import KVSpec, Model
from engine.scheduling.compression import CachePlan, Realisation
from engine.scheduling.invariants import check_invariants
from engine.types import EngineRequest, SamplingParams
from tests.compression.test_in_engine import answers_of, poisoned, preempting, tokens
from tests.e2e.driving import BLOCK_SIZE, core_for, run

SHAPE = CacheShape(num_layers=4, num_kv_heads=2, head_dim=64, head_dim_v=64, block_size=16)
BITS2 = {"name": "kivi", "bits": 2}
# a budget of many blocks, one that ends inside of a block, and one that is packed only while tokens are generated
CHOICES: dict[str, dict[str, Any]] = {
    "snapkv int8": {"name": "snapkv", "budget": 40, "window": 8, "format": "int8"},
    "snapkv kivi": {"name": "snapkv", "budget": 12, "window": 8, "format": "kivi"},
    "h2o fp8": {"name": "h2o", "budget": 43, "period": 0, "format": "fp8"},
    "streaming_llm kivi2": {"name": "streaming_llm", "budget": 33, "period": 0, "format": BITS2},
    "ems int8": {"name": "ems", "budget": 37, "window": 8, "similarity": 0.2, "format": "int8"},
    "kvcrush int8": {"name": "kvcrush", "budget": 41, "window": 8, "block": 4, "format": "int8"},
    "keyformer kivi": {"name": "keyformer", "budget": 42, "period": 0, "format": {"name": "kivi", "bits": 4}},
}
FEW = ["snapkv int8", "snapkv kivi", "ems int8"]
MOST = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in CHOICES]


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


def request(name: str, num_tokens: int, seed: int, policy: Any, **options: Any) -> EngineRequest:
    numbers = random.Random(seed)
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "seed": seed}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=[numbers.randrange(10, 4000) for _ in range(num_tokens)],
        sampling=SamplingParams(**{**sampling, **options}),
        kv_policy=policy,
    )


def some(choice: str) -> list[EngineRequest]:
    """A prompt of whole blocks, one in between and a short one, among requests with other policies or none."""
    lengths = 8 * BLOCK_SIZE, 67, 5
    requests = [request(f"r{i}", count, i, CHOICES[choice]) for i, count in enumerate(lengths)]
    others = [request("whole", 52, 9, None), request("packed", 60, 7, {"name": "int8"})]
    return [*requests[:2], *others, requests[2], request("cut", 60, 6, {"name": "snapkv", "budget": 24, "window": 8})]


@pytest.mark.parametrize("choice", MOST)
def test_tokens_depend_on_the_request_alone(mimir: Model, choice: str) -> None:
    """Not on chunks, the prefix cache, other requests, or on being preempted and computed again."""
    expected, _ = answers_of(mimir, some(choice))
    assert {len(token_ids) for token_ids in expected.values()} == {30}, "all came to their end"
    for options in ({"budget": 7, "prefix_cache": False}, {"num_blocks": 36, "budget": 64}):
        assert answers_of(mimir, some(choice), **options)[0] == expected, options
    alone = answers_of(mimir, some(choice)[:1])[0]
    assert alone.items() <= expected.items()
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.step = poisoned(core)  # type: ignore[method-assign]
    run(core, some(choice))
    preempting(core, every=9)
    assert tokens(run(core, some(choice))) == expected, "the prefix cache knows the prompts, and some are preempted"


@pytest.mark.parametrize("choice", CHOICES)
def test_a_budget_that_holds_everything_is_the_format_alone(mimir: Model, choice: str) -> None:
    """Bit for bit: also the log-probabilities are the same."""
    wide = {**CHOICES[choice], "budget": 512}
    packing = wide["format"] if isinstance(wide["format"], dict) else {"name": wide["format"]}
    found = []
    for policy in (wide, packing):
        core = core_for(mimir, max_model_len=256, num_blocks=160)
        answers = run(core, [request(f"r{i}", n, i, policy, logprobs=0) for i, n in enumerate((72, 67, 5))])
        found.append([(a.token_ids, [entry.logprob for entry in a.logprobs]) for a in answers.values()])
    assert found[0] == found[1]


def test_what_survives_is_what_the_policy_alone_would_keep(mimir: Model) -> None:
    """Every survivor in packed blocks is, but for rounding, one of the policy's own; the newest are its very bits."""
    kept = {}
    for name, extra in (("alone", {}), ("packed", {"format": "int8"})):
        core = core_for(mimir, max_model_len=256, num_blocks=160)
        policy = {"name": "snapkv", "budget": 40, "window": 8, **extra}
        core.add(request("r", 100, 0, policy))
        core.step()
        running = core.scheduler.roster.running[0]
        cache = core.runner.cache
        newest = torch.cat([cache.k[block_id] for block_id in running.tables[0].block_ids], dim=2)
        kept[name] = (running, newest, cache)
    alone, packed = kept["alone"], kept["packed"]
    assert alone[0].tables[0].num_slots == 40
    assert (packed[0].tables[0].num_slots, packed[0].num_packed) == (BLOCK_SIZE, 40 - BLOCK_SIZE)
    assert torch.equal(packed[1][:, :, :BLOCK_SIZE], alone[1][:, :, 40 - BLOCK_SIZE : 40])
    import kernels

    num_groups = (40 - BLOCK_SIZE) // BLOCK_SIZE
    blocks = torch.tensor([packed[0].packed[0]] * num_groups)
    k, _ = kernels.unpack_blocks(packed[2].k, packed[2].v, blocks, torch.arange(num_groups), format="int8")
    expected = alone[1][:, :, : 40 - BLOCK_SIZE].unflatten(2, (num_groups, BLOCK_SIZE)).permute(2, 0, 1, 3, 4)
    assert float((k - expected).abs().max()) < 0.02 * float(expected.abs().max())


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_blocks_are_released_at_once_and_reported(mimir: Model, prefix_cache: bool) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160, prefix_cache=prefix_cache)
    core.step = poisoned(core)  # type: ignore[method-assign]
    core.add(request("r", 200, 0, {"name": "snapkv", "budget": 100, "window": 8, "format": "int8"}, max_tokens=10))
    pool = core.scheduler.cache.pool
    outputs = core.step()
    # of 100 survivors 12 are in two blocks, the others in 11 groups of 4 to a block
    assert pool.counts.active == 2 + 3
    block_bytes = core.runner.cache.k[0].nbytes + core.runner.cache.v[0].nbytes
    kv = outputs[-1].kv
    assert kv is not None
    assert (kv.policy, kv.format, kv.bits_per_value) == ("snapkv", "int8", 8.0)
    assert (kv.peak_slots, kv.steady_slots, kv.evicted_tokens) == (200, 100, 100)
    assert kv.released_bytes == (25 - 5) * block_bytes
    assert kv.private_bytes == 5 * block_bytes
    while core.has_work:
        outputs += core.step()
    assert pool.counts.active == 0
    kv = outputs[-1].kv
    assert kv is not None
    assert (kv.steady_slots, kv.evicted_tokens) == (109, 100)


def test_aborts_at_every_step_leak_nothing(mimir: Model) -> None:
    for choice in FEW:
        for steps in (1, 4, 9):
            core = core_for(mimir, max_model_len=256, num_blocks=160, budget=32)
            core.step = poisoned(core)  # type: ignore[method-assign]
            for one in some(choice):
                core.add(one)
            for _ in range(steps):
                core.step()
            for one in some(choice)[:3]:
                core.abort(one.request_id)
            while core.has_work:
                core.step()
            assert core.scheduler.cache.pool.counts.active == 0


@pytest.mark.parametrize("choice", FEW)
def test_an_abort_or_an_error_while_the_compaction_runs_leaks_nothing(
    mimir: Model, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.add(request("r", 72, 0, CHOICES[choice]))
    plan = core.scheduler.schedule()
    assert plan.chunks[0].compaction is not None
    core.abort("r")
    core.scheduler.commit(plan, core.runner.execute(plan))
    check_invariants(core.scheduler)
    assert core.scheduler.cache.pool.counts.active == 0

    def broken(self: Composed, view: Any) -> Any:
        raise RuntimeError("no idea what to keep")

    monkeypatch.setattr(Composed, "keep", broken)
    answers = run(core, [request("r", 72, 0, CHOICES[choice]), request("whole", 30, 1, None)])
    assert [answers[name, 0].finish_reason for name in ("r", "whole")] == ["error", "length"]
    assert core.scheduler.cache.pool.counts.active == 0


def test_choices_of_one_request_are_what_they_are_alone(mimir: Model) -> None:
    one = msgspec.structs.replace(request("r", 60, 0, CHOICES["snapkv int8"], temperature=1.0), num_choices=3)
    found, _ = answers_of(mimir, [one])
    other, _ = answers_of(mimir, [*some("h2o fp8"), one], budget=11)
    assert {name: ids for name, ids in other.items() if name[0] == "r"} == found
    assert len({tuple(ids) for ids in found.values()}) == 3


def test_the_prompt_stays_whole_for_the_next_request(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    run(core, [request("a", 96, 0, CHOICES["snapkv int8"])])
    again = run(core, [request("b", 96, 0, None)])
    assert again["b", 0].num_cached_tokens == 88, "all full blocks but the last token's are there"


# ---- plans and refusals


def plan_of(num_prompt_tokens: int, budget: int) -> CachePlan:
    policy = registry.create("snapkv", {"budget": budget, "window": 1})
    return compose(policy, "int8", SHAPE).plan(num_prompt_tokens, SHAPE)


@pytest.mark.parametrize("budget", [2, 16, 31, 32, 33, 47, 48, 100])
@pytest.mark.parametrize("num_prompt_tokens", [1, 40, 101, 300])
def test_survivors_are_packed_as_a_text_of_their_own(num_prompt_tokens: int, budget: int) -> None:
    plan = plan_of(num_prompt_tokens, budget)
    assert plan.realisation is Realisation.PACKED
    alone = registry.create("int8").plan(min(num_prompt_tokens, budget), SHAPE)
    gone = max(0, num_prompt_tokens - budget)
    assert plan.num_evicted == gone
    points = [n for n in range(1, num_prompt_tokens + 80) if plan.is_point(n)]
    assert [plan.next_point(n) for n in (0, *points[:-1])] == points
    for num_tokens in range(num_prompt_tokens, num_prompt_tokens + 80):
        left = num_tokens - gone
        assert plan.slots_at(num_tokens) == alone.slots_at(left)
        assert plan.packed_slots_at(num_tokens) == alone.packed_slots_at(left)
        assert plan.first_point is not None
        if num_tokens >= plan.first_point:
            assert plan.peak_after(num_tokens) >= plan.slots_at(num_tokens)
    assert plan.next_choice(num_prompt_tokens - 1) == (num_prompt_tokens if gone else None)
    assert plan.next_choice(num_prompt_tokens) is None


POLICIES = Policies(CacheConfig(), KVSpec(4, 2, 64, 64), torch.float32)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"name": "h2o"}, "'h2o' cannot be combined with a format: it evicts again every 16 tokens.*set period to 0"),
        ({"name": "kvcrush", "base": "tova"}, "it goes on evicting while tokens are generated"),
        ({"name": "scissorhands"}, "it goes on evicting while tokens are generated"),
        ({"name": "raas"}, "it goes on evicting while tokens are generated"),
        ({"name": "pyramidkv"}, "its layers or heads keep different numbers of tokens"),
        ({"name": "quest"}, "it reads or shortens the prompt in its own way"),
        ({"name": "gemfilter"}, "it reads or shortens the prompt in its own way"),
        ({"name": "int8"}, "it is one itself"),
        ({"name": "snapkv", "format": "int3"}, "format is 'int3', known are fp8, int8, kivi"),
        ({"name": "snapkv", "format": {"name": "kivi", "bits": 3}}, "bits is 3, allowed: 2 and 4"),
        ({"name": "snapkv", "format": 8}, "format is 8, known are"),
        ({"name": "full"}, "'full' has no option format"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_a_reason(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParameter, match=words):
        POLICIES.resolve({"format": "int8", **choice}, 100)


@pytest.mark.parametrize("name", ["snapkv", "ems", "kvcrush"])
@pytest.mark.parametrize("format", ["fp8", "int8", "kivi", BITS2])
def test_what_is_cut_once_can_be_packed(name: str, format: Any) -> None:
    resolved = POLICIES.resolve(json.loads(json.dumps({"name": name, "format": format})), 2000)
    assert resolved is not None
    assert resolved.plan.policy == name
    assert resolved.bits_per_value < 16


def test_a_format_that_is_not_offered_is_refused_beside_a_policy_too() -> None:
    policies = Policies(CacheConfig(kv_policies=("snapkv", "int8")), KVSpec(4, 2, 64, 64), torch.float32)
    assert policies.resolve({"name": "snapkv", "format": "int8"}, 100) is not None
    with pytest.raises(InvalidParameter, match="'kivi' is not offered here"):
        policies.resolve({"name": "snapkv", "format": BITS2}, 100)
