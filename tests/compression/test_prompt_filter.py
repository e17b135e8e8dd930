"""Prompts that a first pass shortens, inside the running engine."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch

from engine.compression.gemfilter import GemFilter
from engine.core import EngineCore
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.scheduling.invariants import check_invariants
from engine.types import EngineRequest, SamplingParams
from tests.e2e.driving import Answer, core_for, run

POLICY = {"name": "gemfilter", "budget": 40, "num_recent": 8}


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


def request(name: str, num_tokens: int, seed: int, policy: dict[str, Any] | None, **options: Any) -> EngineRequest:
    numbers = random.Random(seed)
    return EngineRequest(
        request_id=name,
        prompt_token_ids=[numbers.randrange(10, 4000) for _ in range(num_tokens)],
        sampling=SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, "seed": 1, **options}),
        kv_policy=policy,
    )


def mixed() -> list[EngineRequest]:
    return [request("long", 100, 1, POLICY), request("whole", 60, 2, None), request("short", 30, 3, POLICY)]


def run_checked(core: EngineCore, requests: list[EngineRequest]) -> dict[tuple[str, int], Answer]:
    step = core.step

    def checked() -> Any:
        outputs = step()
        check_invariants(core.scheduler)
        return outputs

    core.step = checked  # type: ignore[method-assign]
    answers = run(core, requests)
    assert core.scheduler.cache.pool.counts.active == 0
    return answers


def core_of(model: Model, **options: Any) -> EngineCore:
    return core_for(model, **{"max_model_len": 256, "num_blocks": 160, **options})


def test_what_is_generated_follows_from_the_shortened_prompt_alone(
    mimir: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a new request with the tokens that stayed would have it."""
    chosen: list[torch.Tensor] = []
    original = GemFilter.choose

    def choose(self: GemFilter, logits: torch.Tensor) -> torch.Tensor | None:
        kept = original(self, logits)
        assert kept is not None
        chosen.append(kept)
        return kept

    monkeypatch.setattr(GemFilter, "choose", choose)
    long = request("long", 100, 1, POLICY)
    found = run_checked(core_of(mimir), [long])["long", 0].token_ids
    (kept,) = chosen
    assert len(kept) == 40
    assert kept[0] == 0, "the first token stays"
    assert kept[-8:].tolist() == list(range(92, 100)), "the last tokens stay"
    rest = [long.prompt_token_ids[place] for place in kept.tolist()]
    fresh = msgspec.structs.replace(long, request_id="fresh", prompt_token_ids=rest, kv_policy=None)
    assert run_checked(core_of(mimir), [fresh])["fresh", 0].token_ids == found


@pytest.mark.parametrize("options", [{"budget": 7}, {"prefix_cache": False}, {"num_blocks": 34, "budget": 64}])
def test_tokens_depend_on_the_request_alone(mimir: Model, options: dict[str, Any]) -> None:
    expected = run_checked(core_of(mimir), mixed())
    found = run_checked(core_of(mimir, **options), mixed())
    assert {name: a.token_ids for name, a in found.items()} == {name: a.token_ids for name, a in expected.items()}


def test_a_prompt_within_the_budget_stays_whole(mimir: Model) -> None:
    whole = [msgspec.structs.replace(one, kv_policy=None) for one in mixed()]
    expected = run_checked(core_of(mimir), whole)
    found = run_checked(core_of(mimir), mixed())
    assert found["short", 0].token_ids == expected["short", 0].token_ids


def test_the_first_pass_leaves_nothing_in_the_prefix_cache(mimir: Model) -> None:
    """Its blocks lack the later layers."""
    core = core_of(mimir)
    run_checked(core, [request("long", 100, 1, POLICY)])
    again = run_checked(core, [request("again", 100, 1, None)])["again", 0]
    assert again.num_cached_tokens == 0
    expected = run_checked(core_of(mimir), [request("again", 100, 1, None)])["again", 0]
    assert again.token_ids == expected.token_ids


def test_all_choices_share_one_first_pass(mimir: Model) -> None:
    one = request("long", 100, 1, POLICY, temperature=1.0)
    core = core_of(mimir)
    three = run_checked(core, [msgspec.structs.replace(one, num_choices=3)])
    assert three["long", 0].token_ids == run_checked(core_of(mimir), [one])["long", 0].token_ids
    assert len({tuple(answer.token_ids) for answer in three.values()}) == 3
    assert core.scheduler.stats().prompt_tokens_computed <= 100 + 40 + 2


def test_an_abort_in_the_first_pass_leaks_nothing(mimir: Model) -> None:
    core = core_of(mimir, budget=32)
    core.add(request("long", 100, 1, POLICY))
    core.step()
    core.abort("long")
    assert not core.has_work
    check_invariants(core.scheduler)
    assert core.scheduler.cache.pool.counts.active == 0


def test_a_first_pass_that_fails_ends_its_own_request_and_counts_nobodys_tokens_twice(
    mimir: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Penalties count what was generated: a step that is run again must not have counted it before."""
    counting = request("whole", 60, 2, None, frequency_penalty=2.0, repetition_penalty=1.5)
    expected = run_checked(core_of(mimir), [counting])["whole", 0].token_ids

    def choose(self: GemFilter, logits: torch.Tensor) -> torch.Tensor | None:
        raise RuntimeError("no idea")

    monkeypatch.setattr(GemFilter, "choose", choose)
    core = core_of(mimir)
    core.add(counting)
    core.step()
    core.step()
    core.add(request("long", 100, 1, POLICY))
    found: list[int] = []
    while core.has_work:
        for output in core.step():
            if output.request_id == "whole":
                found += output.token_ids
            else:
                assert output.finish_reason == "error"
    assert found[-14:] == expected[-14:]
