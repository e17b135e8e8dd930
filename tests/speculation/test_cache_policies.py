"""Speculation and cache policies: the answer with both is the answer with the policy alone, and memory goes back."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch

from engine.mimir import model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.scheduling.invariants import check_invariants
from engine.types import EngineRequest
from tests.e2e.driving import core_for, request, run, tokens
from tests.speculation import hostile
from tests.speculation.hostile import Scripted, equip, speculating

POLICIES: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 24, "window": 8},  # shrinks once, after the prompt: drafts come after that
    "streaming_llm": {"budget": 24, "period": 16},  # goes on shrinking: drafts end before each point
    "h2o": {"budget": 24},  # watches attention as long as it shrinks: no drafts
    "pyramidkv": {"budget": 24, "window": 8},  # tables per layer: no drafts
    "quest": {"budget": 24, "num_dense_layers": 1},  # selects at attention time: no drafts
}
WITH_DRAFTS = ("snapkv", "streaming_llm")


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(model_path("mimir"), device=torch.device("cpu"), dtype="float32", deterministic=True)


def traffic(name: str) -> list[EngineRequest]:
    """Three with the policy, and one without in the same batch."""
    generator = random.Random(1)
    requests = []
    for i, length in enumerate((40, 61, 33, 50)):
        prompt = [generator.randrange(20, 400) for _ in range(length)]
        plain = request(f"r{i}", prompt, max_tokens=40, temperature=0.7 * (i % 2), seed=i)
        policy = {"name": name, **POLICIES[name]} if i else None
        requests.append(msgspec.structs.replace(plain, kv_policy=policy))
    return requests


@pytest.mark.parametrize("name", list(POLICIES))
@pytest.mark.parametrize("num_blocks", [256, 30])
def test_a_compressed_cache_and_drafts_give_what_the_cache_gives_alone(
    name: str, num_blocks: int, model: Model
) -> None:
    expected = tokens(run(core_for(model), traffic(name)))
    drafter = Scripted(hostile.oracle(expected, num_wrong=2))
    core = equip(core_for(model, num_blocks=num_blocks), drafter)
    assert tokens(run(core, speculating(traffic(name), 10))) == expected
    check_invariants(core.scheduler)
    assert core.scheduler.cache.pool.counts.active == 0
    steps = core.scheduler.stats().spec_steps
    assert steps > (10 if name in WITH_DRAFTS else 2)  # the request without a policy always speculates
