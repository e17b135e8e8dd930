"""Measuring as if the prompt ended earlier: in the real engine, with blocks that are really freed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from engine.compression import registry
from engine.compression.artefacts import FILE_NAME, read
from engine.compression.resolver import Policies
from engine.compression.snapkv import SnapKV
from engine.config import CacheConfig
from engine.core import EngineCore
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.types import EngineRequest
from loadtest.frontier.samples import TASKS, Writer
from tests.compression.test_in_engine import poisoned, preempting, request, tokens
from tests.e2e.driving import core_for, run

CONTEXT = 70
BASES: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 24, "window": 8},
    "h2o": {"budget": 24},
    "tova": {"budget": 24},
    "pyramidkv": {"budget": 24, "window": 8},
    "keyformer": {"budget": 24},
    "kivi": {},
}


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


def engine(model: Model, **options: Any) -> EngineCore:
    core = core_for(model, **{"max_model_len": 256, "num_blocks": 160, **options})
    found = read(resolve_model_path("mimir") / FILE_NAME)
    policies = Policies(CacheConfig(block_size=8), model.spec, torch.float32, found, has_yardsticks=True)
    core.scheduler._policies = policies
    core.step = poisoned(core)  # type: ignore[method-assign]
    return core


def asked(base: str, seed: int = 0, first: int | None = CONTEXT, name: str = "r") -> EngineRequest:
    """A context, the same for every seed, and a question of 20 tokens."""
    context = request(name, CONTEXT, 99, None).prompt_token_ids
    question = request(name, 20, seed, None).prompt_token_ids
    options = {} if first is None else {"num_tokens": first}
    choice = {"name": "first_turn", **options, "base": {"name": base, **BASES[base]}}
    return msgspec.structs.replace(
        request(name, 1, seed, None), prompt_token_ids=[*context, *question], kv_policy=choice
    )


@pytest.mark.parametrize("base", sorted(BASES))
def test_a_first_turn_of_the_whole_prompt_is_the_policy_itself(mimir: Model, base: str) -> None:
    one = asked(base, first=None)
    plain = msgspec.structs.replace(one, kv_policy={"name": base, **BASES[base]})
    assert tokens(run(engine(mimir), [one])) == tokens(run(engine(mimir), [plain]))


@pytest.mark.parametrize("base", sorted(BASES))
def test_tokens_depend_on_the_request_alone(mimir: Model, base: str) -> None:
    """Not on chunks, prefix cache or preemption, though the cache shrinks in the middle of the prompt."""
    expected = tokens(run(engine(mimir), [asked(base)]))
    for options in ({"budget": 7}, {"prefix_cache": False}):
        assert tokens(run(engine(mimir, **options), [asked(base)])) == expected, options
    core = engine(mimir)
    run(core, [asked(base)])
    assert tokens(run(core, [asked(base)])) == expected
    core = engine(mimir)
    preempting(core, every=9)
    assert tokens(run(core, [asked(base)])) == expected


def test_what_stays_of_the_context_does_not_depend_on_the_question(mimir: Model, monkeypatch) -> None:
    kept = []
    original = SnapKV.keep

    def spied(self: SnapKV, view: Any) -> Any:
        assert (view.num_prompt_tokens, view.num_tokens) == (CONTEXT, CONTEXT)
        kept.append(original(self, view))
        return kept[-1]

    monkeypatch.setattr(SnapKV, "keep", spied)
    for seed in (0, 1):
        run(engine(mimir), [asked("snapkv", seed)])
    assert torch.equal(kept[0].index, kept[1].index)


def test_blocks_come_free_before_the_question_is_read(mimir: Model) -> None:
    core = engine(mimir, budget=CONTEXT)
    core.add(asked("snapkv"))
    core.step()
    assert core.scheduler.cache.pool.counts.active <= 24 // 8 + 1 < CONTEXT // 8


def test_clients_cannot_ask_for_it() -> None:
    assert "first_turn" not in registry.names()


def test_retrieval_heads_are_what_finds_and_without_them_nothing_is_found(mimir: Model) -> None:
    """The dossier's check of RazorAttention: taking the calibrated heads away must kill recall."""
    writer = Writer(resolve_model_path("mimir"))
    samples = [writer.sample(TASKS[0].__class__("n", "needle_single", 200, ("aware",)), "aware", i) for i in range(6)]
    choice = {"name": "razor_attention", "min_recent": 12, "divisor": 1000.0}

    def recall(heads: tuple[tuple[int, int], ...] | None, kv_policy: Any) -> float:
        core = engine(mimir)
        if heads is not None:
            policies: Any = core.scheduler._policies
            object.__setattr__(policies._artefacts, "retrieval_heads", heads)
        requests = [
            msgspec.structs.replace(
                request(f"r{i}", 1, 0, None, max_tokens=32), prompt_token_ids=sample.token_ids, kv_policy=kv_policy
            )
            for i, sample in enumerate(samples)
        ]
        answers = run(core, requests)
        texts = [writer.tokenizer.decode(answers[f"r{i}", 0].token_ids) for i in range(len(samples))]
        return sum(sample.score(text) for sample, text in zip(samples, texts, strict=True)) / len(samples)

    assert recall(None, None) >= 0.8, "the gate: the model finds needles with its whole cache"
    assert recall(None, choice) >= 0.8
    assert recall(((3, 0), (3, 1)), choice) <= 0.4
