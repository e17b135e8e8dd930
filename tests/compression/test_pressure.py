"""When memory is short, caches that may shrink do so before anybody is thrown out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.errors import ConfigError
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.scheduling.invariants import check_invariants
from engine.types import EngineRequest, SamplingParams
from tests.e2e.driving import Answer, core_for, run

TOVA = '{"name": "tova", "budget": 24}'


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


def load(kv_policy: dict[str, Any] | None, *, num_requests: int = 6) -> list[EngineRequest]:
    """Together they need about twice the pool."""
    numbers = random.Random(5)
    return [
        EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=[numbers.randrange(10, 4000) for _ in range(40)],
            sampling=SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True),
            kv_policy=kv_policy,
        )
        for i in range(num_requests)
    ]


def overloaded(model: Model, requests: list[EngineRequest], pressure: str) -> tuple[EngineCore, dict[Any, Answer]]:
    core = core_for(model, max_model_len=256, num_blocks=46, pressure_policy=pressure)
    step = core.step

    def checked() -> Any:
        outputs = step()
        check_invariants(core.scheduler)
        return outputs

    core.step = checked  # type: ignore[method-assign]
    answers = run(core, requests)
    assert core.scheduler.cache.pool.counts.active == 0
    return core, answers


def test_caches_that_may_shrink_do_so_instead_of_a_preemption(mimir: Model) -> None:
    core, _ = overloaded(mimir, load({"name": "full", "may_shrink": True}), "")
    assert core.scheduler.stats().num_preemptions > 0, "the load is too small to show anything"
    core, answers = overloaded(mimir, load({"name": "full", "may_shrink": True}), TOVA)
    stats = core.scheduler.stats()
    assert (stats.num_preemptions, stats.num_shrunk > 0) == (0, True)
    assert stats.compression["tova"].requests == stats.num_shrunk
    assert all(len(answer.token_ids) == 80 for answer in answers.values())


def test_who_did_not_allow_it_keeps_the_whole_cache(mimir: Model) -> None:
    _, expected = overloaded(mimir, load(None), "")
    core, found = overloaded(mimir, load(None), TOVA)
    assert core.scheduler.stats().num_shrunk == 0
    assert {name: answer.token_ids for name, answer in found.items()} == {
        name: answer.token_ids for name, answer in expected.items()
    }


def test_without_pressure_nobody_shrinks(mimir: Model) -> None:
    requests = load({"name": "full", "may_shrink": True}, num_requests=2)
    core, found = overloaded(mimir, requests, TOVA)
    assert core.scheduler.stats().num_shrunk == 0
    _, expected = overloaded(mimir, load(None, num_requests=2), "")
    assert [a.token_ids for a in found.values()] == [a.token_ids for a in expected.values()]


@pytest.mark.parametrize("choice", ['{"name": "snapkv"}', "h2o", "nonsense", "{"])
def test_a_policy_that_needs_more_than_the_newest_query_cannot_act_under_pressure(mimir: Model, choice: str) -> None:
    with pytest.raises(ConfigError):
        core_for(mimir, pressure_policy=choice)
