"""Formats whose packed blocks are shared: the second request with a prompt starts with them, and says the same."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch

from engine.core import EngineCore
from engine.errors import InvalidParameter
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.types import EngineRequest, SamplingParams
from tests.compression.test_in_engine import poisoned, preempting
from tests.e2e.driving import Answer, core_for, run

INT8 = {"name": "int8", "shared": True}  # 4 places: 32 tokens in a packed block


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


def request(
    name: str, num_tokens: int, seed: int, policy: dict[str, Any] | None, max_tokens: int = 12
) -> EngineRequest:
    numbers = random.Random(seed)
    return EngineRequest(
        request_id=name,
        prompt_token_ids=[numbers.randrange(10, 4000) for _ in range(num_tokens)],
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=1),
        kv_policy=policy,
    )


def core_of(model: Model, **options: Any) -> EngineCore:
    core = core_for(model, **{"max_model_len": 256, "num_blocks": 120, **options})
    core.step = poisoned(core)  # type: ignore[method-assign]
    return core


def tokens(answers: dict[tuple[str, int], Answer]) -> dict[str, list[int]]:
    return {name: answer.token_ids for (name, _), answer in answers.items()}


def mixed() -> list[EngineRequest]:
    return [
        request("a", 100, 1, INT8),
        request("whole", 60, 2, None),
        request("b", 150, 3, {**INT8, "name": "kivi"}, max_tokens=70),
        request("short", 20, 4, INT8),
    ]


def test_a_second_request_starts_with_packed_blocks_and_says_the_same(mimir: Model) -> None:
    core = core_of(mimir)
    first = run(core, [request("a", 100, 1, INT8)])["a", 0]
    again = run(core, [request("b", 100, 1, INT8)])["b", 0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 96), "three packed blocks of 32 tokens"
    assert again.token_ids == first.token_ids
    assert core.scheduler.cache.pool.counts.active == 0


@pytest.mark.parametrize("policy", [None, {"name": "kivi", "shared": True}, {"name": "int8"}])
def test_who_keeps_a_cache_in_another_way_does_not_see_them(mimir: Model, policy: dict[str, Any] | None) -> None:
    core = core_of(mimir)
    run(core, [request("a", 100, 1, INT8)])
    assert run(core, [request("b", 100, 1, policy)])["b", 0].num_cached_tokens == 0


def test_tenants_and_salts_keep_their_packed_blocks_to_themselves(mimir: Model) -> None:
    core = core_of(mimir)
    first = request("a", 100, 1, INT8)
    run(core, [first])
    for other in ({"tenant": "x"}, {"cache_salt": "y"}):
        again = msgspec.structs.replace(first, request_id="b", **other)
        assert run(core, [again])["b", 0].num_cached_tokens == 0


def test_the_answer_depends_on_the_request_alone(mimir: Model) -> None:
    """Not on chunks, on what the prefix cache holds, on others, or on being preempted."""
    expected = tokens(run(core_of(mimir), mixed()))
    for options in ({"budget": 7}, {"prefix_cache": False}, {"num_blocks": 38, "budget": 64}):
        assert tokens(run(core_of(mimir, **options), mixed())) == expected, options
    warm = core_of(mimir)
    run(warm, mixed())
    assert tokens(run(warm, mixed())) == expected
    disturbed = core_of(mimir)
    preempting(disturbed, every=7)
    assert tokens(run(disturbed, mixed())) == expected


def test_two_who_read_a_prompt_side_by_side_end_up_with_one_copy(mimir: Model) -> None:
    core = core_of(mimir, budget=32)
    twins = [request(name, 100, 1, INT8, max_tokens=30) for name in ("a", "b")]
    for twin in twins:
        core.add(twin)
    held = 0
    while core.has_work:
        core.step()
        running = core.scheduler.roster.running
        if len(running) == 2 and all(len(one.packed) == 3 for one in running):
            assert running[0].packed == running[1].packed
            held += 1
    assert held > 0
    assert core.scheduler.cache.pool.counts.active == 0


def test_a_prompt_never_takes_more_than_its_packed_blocks_and_one_in_the_making(mimir: Model) -> None:
    """Where a whole prompt must be there before it is packed, 200 tokens take 25 blocks."""
    core = core_of(mimir, budget=16, prefix_cache=False)
    core.add(request("a", 200, 1, INT8))
    most = 0
    while core.has_work:
        core.step()
        most = max(most, core.scheduler.cache.pool.counts.active)
    assert most <= 200 // 32 + 4 + 1


def test_what_is_generated_is_there_for_the_next_turn(mimir: Model) -> None:
    core = core_of(mimir)
    first = request("a", 60, 1, INT8, max_tokens=60)
    said = run(core, [first])["a", 0].token_ids
    longer = msgspec.structs.replace(first, request_id="b", prompt_token_ids=[*first.prompt_token_ids, *said])
    assert run(core, [longer])["b", 0].num_cached_tokens == 96


def test_choices_of_one_request_share_packed_blocks(mimir: Model) -> None:
    both = msgspec.structs.replace(request("r", 100, 1, INT8), num_choices=2)
    found = run(core_of(mimir), [both])
    alone = run(core_of(mimir), [request("r", 100, 1, INT8)])["r", 0]
    assert found["r", 0].token_ids == found["r", 1].token_ids == alone.token_ids


def test_survivors_of_an_eviction_are_nobody_elses(mimir: Model) -> None:
    policy = {"name": "snapkv", "budget": 40, "format": INT8}
    with pytest.raises(InvalidParameter, match="depends on more than the tokens"):
        core_of(mimir).add(request("a", 100, 1, policy))


def test_packed_blocks_of_a_common_prompt_exist_once(mimir: Model) -> None:
    """Without sharing each of six requests has packed blocks of its own beside the whole prompt in the prefix cache."""

    def most_held(policy: dict[str, Any]) -> int:
        core = core_of(mimir, num_blocks=200)
        run(core, [request("first", 130, 1, policy)])
        for i in range(6):
            core.add(request(f"r{i}", 130, 1, policy, max_tokens=6))
        most = 0
        while core.has_work:
            core.step()
            most = max(most, core.scheduler.cache.pool.counts.active)
        return most

    assert most_held(INT8) < 0.5 * most_held({"name": "int8"})
