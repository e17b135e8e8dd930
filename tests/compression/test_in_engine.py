"""Cache policies inside the running engine: memory is released, and nothing but the request decides the tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from engine.compression.razor_attention import RazorAttention
from engine.compression.resolver import Policies
from engine.core import EngineCore
from engine.errors import InvalidParameter
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.scheduling.compression import ResolvedPolicy
from engine.scheduling.invariants import check_invariants
from engine.types import EngineRequest, SamplingParams
from tests.e2e.driving import BLOCK_SIZE, Answer, core_for, run

RAZOR = RazorAttention(min_recent=12, divisor=50.0, period=8).bind(((0, 1), (1, 0), (2, 1), (3, 1)))
CHOICES: dict[str, dict[str, Any]] = {
    "streaming_llm": {"budget": 24, "period": 8},
    "h2o": {"budget": 24},
    "snapkv": {"budget": 24, "window": 8},
    "pyramidkv": {"budget": 24, "window": 8},
    "tova": {"budget": 24},
    "scissorhands": {"budget": 32},
    "keyformer": {"budget": 24},
    "a2sf": {"budget": 24},
    "vatp": {"budget": 24},
    "ems": {"budget": 24, "window": 8},
    "kvcrush": {"budget": 24, "window": 8},
    "random": {"budget": 24},
    "raas": {"budget": 16, "share": 0.3},
    "quest": {"budget": 24, "num_dense_layers": 1},
    "razor": {},
}
EVICTING = sorted(CHOICES)


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


@pytest.fixture(autouse=True)
def calibrated_razor(monkeypatch: pytest.MonkeyPatch) -> None:
    """`razor` is RazorAttention with head classes, as an artefact would give them."""
    original = Policies.resolve

    def resolve(self: Policies, choice: Any, num_prompt_tokens: int) -> ResolvedPolicy | None:
        if choice is not None and choice["name"] == "razor":
            return ResolvedPolicy(RAZOR.plan(num_prompt_tokens, self.shape), 32.0, RAZOR)
        return original(self, choice, num_prompt_tokens)

    monkeypatch.setattr(Policies, "resolve", resolve)


def request(name: str, num_tokens: int, seed: int, policy: str | None, **options: Any) -> EngineRequest:
    numbers = random.Random(seed)
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "seed": seed}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=[numbers.randrange(10, 4000) for _ in range(num_tokens)],
        sampling=SamplingParams(**{**sampling, **options}),
        kv_policy=None if policy is None else {"name": policy, **CHOICES[policy]},
    )


def some(policy: str | None, **options: Any) -> list[EngineRequest]:
    """Three requests with it, between two that keep everything."""
    requests = [request(f"r{i}", 45 + 11 * i, i, policy, **options) for i in range(3)]
    return [request("whole0", 30, 8, None, **options), *requests, request("whole1", 52, 9, None, **options)]


def tokens(answers: dict[tuple[str, int], Answer]) -> dict[tuple[str, int], list[int]]:
    return {name: answer.token_ids for name, answer in answers.items()}


def poisoned(core: EngineCore) -> Callable[[], Any]:
    """A step after which everything that nobody holds is NaN, and the control plane is checked."""
    step, pool, cache = core.step, core.scheduler.cache.pool, core.runner.cache

    def checked() -> Any:
        outputs = step()
        check_invariants(core.scheduler)
        free = torch.tensor(pool._free, dtype=torch.int64)
        cache.k[free] = torch.nan
        cache.v[free] = torch.nan
        for per_block, parts in core.scheduler.cache.compaction.part_pools.items():
            ids = torch.tensor([part for ids in parts._free.values() for part in ids], dtype=torch.int64)
            for part in (cache.k, cache.v):
                part.view(-1, cache.k[0].numel() // per_block)[ids] = torch.nan
        return outputs

    return checked


def answers_of(model: Model, requests: list[EngineRequest], **options: Any) -> tuple[Any, EngineCore]:
    core = core_for(model, **{"max_model_len": 256, "num_blocks": 160, **options})
    core.step = poisoned(core)  # type: ignore[method-assign]
    answers = run(core, requests)
    counts = core.scheduler.cache.pool.counts
    assert counts.active == 0, "blocks leaked"
    assert all(not pool.broken_blocks for pool in core.scheduler.cache.compaction.part_pools.values())
    return tokens(answers), core


@pytest.mark.parametrize("policy", EVICTING)
def test_tokens_depend_on_the_request_alone(mimir: Model, policy: str) -> None:
    """Not on chunks, the prefix cache, other requests, or on being preempted and computed again."""
    expected, _ = answers_of(mimir, some(policy))
    for options in ({"budget": 7}, {"prefix_cache": False}, {"num_blocks": 34, "budget": 64}):
        found, _ = answers_of(mimir, some(policy), **options)
        assert found == expected, options
    alone: dict[tuple[str, int], list[int]] = {}
    for one in some(policy):
        alone.update(answers_of(mimir, [one])[0])
    assert alone == expected
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.step = poisoned(core)  # type: ignore[method-assign]
    run(core, some(policy))
    assert tokens(run(core, some(policy))) == expected, "the second time the prefix cache knows the prompts"


@pytest.mark.parametrize("policy", [name for name in EVICTING if name != "razor"])
def test_a_budget_that_holds_everything_changes_nothing(mimir: Model, policy: str) -> None:
    whole, _ = answers_of(mimir, some(None))
    wide = [
        one if one.kv_policy is None else msgspec.structs.replace(one, kv_policy={**one.kv_policy, "budget": 512})
        for one in some(policy)
    ]
    assert answers_of(mimir, wide)[0] == whole


def preempting(core: EngineCore, every: int) -> None:
    """Throws the last running request back into the queue in every so many steps."""
    scheduler, schedule = core.scheduler, core.scheduler.schedule
    steps = 0

    def disturbed() -> Any:
        nonlocal steps
        steps += 1
        if steps % every == 0 and scheduler.roster.running:
            victim = scheduler.roster.running[-1]
            scheduler.roster.requeue(victim, 0.0)
            scheduler._release(victim)
        return schedule()

    scheduler.schedule = disturbed  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "policy", ["snapkv", "h2o", "streaming_llm", "keyformer", "pyramidkv", "razor", "ems", "raas", "quest"]
)
def test_a_preempted_request_goes_through_the_same_states_again(mimir: Model, policy: str) -> None:
    expected, _ = answers_of(mimir, some(policy))
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.step = poisoned(core)  # type: ignore[method-assign]
    preempting(core, every=9)
    assert tokens(run(core, some(policy))) == expected


@pytest.mark.parametrize("policy", ["snapkv", "pyramidkv", "razor"])
def test_compression_releases_the_blocks_at_once(mimir: Model, policy: str) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160, prefix_cache=False)
    core.add(request("r", 200, 0, policy, max_tokens=40))
    pool = core.scheduler.cache.pool
    core.step()
    held_after_prompt = pool.counts.active
    num_prompt_blocks = 200 // BLOCK_SIZE
    plan = core.scheduler.roster.running[0].cache_plan
    assert plan is not None
    slots = sum(min(kept, 200) for kept in plan.kept) / len(plan.kept)
    assert held_after_prompt <= slots / BLOCK_SIZE + 2 < num_prompt_blocks * 0.7
    while core.has_work:
        core.step()
    assert pool.counts.active == 0


def test_shared_blocks_stay_for_the_next_request(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    first = request("a", 96, 0, "snapkv")
    run(core, [first])
    again = run(core, [msgspec.structs.replace(first, request_id="b", kv_policy=None)])
    assert again["b", 0].num_cached_tokens == 88, "all full blocks but the last token's are there, whole"


def test_choices_of_one_request_are_what_they_are_alone(mimir: Model) -> None:
    both = msgspec.structs.replace(request("r", 60, 0, "h2o", temperature=1.0), num_choices=3)
    found, _ = answers_of(mimir, [both])
    other, _ = answers_of(mimir, [*some("snapkv"), both], budget=11)
    assert {name: ids for name, ids in other.items() if name[0] == "r"} == found
    assert len({tuple(ids) for ids in found.values()}) == 3


def test_aborts_at_every_step_leak_nothing(mimir: Model) -> None:
    for policy in ("snapkv", "pyramidkv", "razor", "h2o"):
        for steps in range(1, 9):
            core = core_for(mimir, max_model_len=256, num_blocks=160, budget=32)
            core.step = poisoned(core)  # type: ignore[method-assign]
            for one in some(policy):
                core.add(one)
            for _ in range(steps):
                core.step()
            for one in some(policy)[1:4]:
                core.abort(one.request_id)
            while core.has_work:
                core.step()
            assert core.scheduler.cache.pool.counts.active == 0


def test_an_abort_while_the_compaction_runs_leaks_nothing(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.add(request("r", 60, 0, "pyramidkv"))
    plan = core.scheduler.schedule()
    assert plan.chunks[0].compaction is not None
    core.abort("r")
    core.scheduler.commit(plan, core.runner.execute(plan))
    check_invariants(core.scheduler)
    assert core.scheduler.cache.pool.counts.active == 0


def test_usage_counts_what_was_evicted_and_released(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.add(request("r", 100, 0, "snapkv", max_tokens=10))
    outputs = []
    while core.has_work:
        outputs += core.step()
    kv = outputs[-1].kv
    assert kv is not None
    assert (kv.policy, kv.peak_slots, kv.steady_slots, kv.evicted_tokens) == ("snapkv", 100, 24 + 9, 100 - 24)
    block_bytes = core.runner.cache.k[0].nbytes + core.runner.cache.v[0].nbytes
    assert kv.released_bytes == (13 - 3) * block_bytes
    assert kv.private_bytes == 5 * block_bytes
    assert (kv.shared_bytes, kv.bits_per_value) == (0, 32.0)


def test_a_policy_that_fails_ends_its_own_request_only(mimir: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.compression.snapkv import SnapKV

    whole, _ = answers_of(mimir, [request("whole0", 30, 8, None)])

    def broken(self: SnapKV, view: Any) -> Any:
        raise RuntimeError("no idea what to keep")

    monkeypatch.setattr(SnapKV, "keep", broken)
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    answers = run(core, [request("r", 60, 0, "snapkv"), request("whole0", 30, 8, None)])
    assert answers["r", 0].finish_reason == "error"
    assert answers["whole0", 0].token_ids == whole["whole0", 0]
    assert core.scheduler.cache.pool.counts.active == 0


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "nonsense"}, "known are a2sf"),
        ({"name": "snapkv", "budgets": 3}, "no option 'budgets'"),
        ({"name": "snapkv", "budget": -1}, "at least 1"),
        ({"name": "full", "budget": 3}, "its only option is may_shrink"),
        ({"name": "razor_attention"}, "kvasir calibrate"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_reason(mimir: Model, choice: dict[str, Any], message: str) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    with pytest.raises(InvalidParameter, match=message):
        core.add(msgspec.structs.replace(request("r", 20, 0, None), kv_policy=choice))
    assert not core.has_work
