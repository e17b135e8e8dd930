"""Packed formats inside the running engine: memory is released, nothing is lost but precision, nothing else decides."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from engine.compression import registry
from engine.compression.attend import MixedAttention
from engine.compression.base import CacheShape
from engine.compression.formats import PackedPolicy
from engine.compression.resolver import Policies
from engine.config import CacheConfig
from engine.core import EngineCore
from engine.errors import ConfigError, InvalidParameter
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import KVSpec, Model
from engine.scheduling.compression import CachePlan
from engine.scheduling.invariants import check_invariants
from engine.types import EngineRequest, SamplingParams
from kernels import native
from kernels.decoder_step import DecoderStep
from tests.compression.test_in_engine import answers_of, poisoned, preempting, tokens
from tests.e2e.driving import BLOCK_SIZE, core_for, run

FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"name": "fp8"},
    "int8": {"name": "int8"},
    "kivi4": {"name": "kivi"},
    "kivi2": {"name": "kivi", "bits": 2},
}
SHAPE = CacheShape(num_layers=4, num_kv_heads=2, head_dim=64, head_dim_v=64, block_size=16)


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


def request(name: str, num_tokens: int, seed: int, policy: dict[str, Any] | None, **options: Any) -> EngineRequest:
    numbers = random.Random(seed)
    sampling: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, "seed": seed}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=[numbers.randrange(10, 4000) for _ in range(num_tokens)],
        sampling=SamplingParams(**{**sampling, **options}),
        kv_policy=policy,
    )


def some(format: str) -> list[EngineRequest]:
    """A prompt of whole blocks, one in between and a short one, among requests with other policies or none."""
    lengths = 6 * BLOCK_SIZE, 67, 5
    requests = [request(f"r{i}", count, i, FORMATS[format]) for i, count in enumerate(lengths)]
    others = [request("whole", 52, 9, None), request("cut", 60, 7, {"name": "snapkv", "budget": 24, "window": 8})]
    return [*requests[:2], *others, requests[2], request("other", 40, 6, {"name": "int8"})]


@pytest.mark.parametrize("format", FORMATS)
def test_tokens_depend_on_the_request_alone(mimir: Model, format: str) -> None:
    """Not on chunks, the prefix cache, other requests, or on being preempted and computed again."""
    expected, _ = answers_of(mimir, some(format))
    for options in ({"budget": 7}, {"prefix_cache": False}, {"num_blocks": 34, "budget": 64}):
        assert answers_of(mimir, some(format), **options)[0] == expected, options
    alone: dict[tuple[str, int], list[int]] = {}
    for one in some(format):
        alone.update(answers_of(mimir, [one])[0])
    assert alone == expected
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.step = poisoned(core)  # type: ignore[method-assign]
    run(core, some(format))
    assert tokens(run(core, some(format))) == expected, "the second time the prefix cache knows the prompts"


@pytest.mark.parametrize("format", FORMATS)
def test_a_preempted_request_goes_through_the_same_states_again(mimir: Model, format: str) -> None:
    expected, _ = answers_of(mimir, some(format))
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.step = poisoned(core)  # type: ignore[method-assign]
    preempting(core, every=9)
    assert tokens(run(core, some(format))) == expected


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("format", [*FORMATS, "kivi4_plain"])
def test_packed_rows_in_the_native_step_have_the_bits_of_the_operations(
    mimir: Model, monkeypatch: pytest.MonkeyPatch, format: str, threads: int
) -> None:
    """Beside whole rows and rows of another format, contexts of more than one split, and guesses, right and wrong."""
    monkeypatch.setattr(native, "num_threads", lambda: threads)
    policy = {"name": "kivi", "rotate": False} if format == "kivi4_plain" else FORMATS[format]
    wanted: dict[str, Any] = {"logprobs": 2, "max_tokens": 40}
    requests = [request("long", 330, 1, policy, **wanted), request("short", 40, 2, policy, **wanted)]
    requests += [request("whole", 52, 3, None, **wanted), request("other", 90, 4, {"name": "int8"}, **wanted)]
    repeated = [7, 8, 9, 300, 301, 302] * 12
    guessed = msgspec.structs.replace(requests[1], request_id="guessed", prompt_token_ids=repeated)
    requests.append(msgspec.structs.replace(guessed, speculative={"drafters": ["ngram"]}))
    num_packed = []
    step_of = DecoderStep.__call__

    def counted(self: DecoderStep, *arguments: Any) -> Tensor:
        num_packed.append(len(arguments[9]))
        return step_of(self, *arguments)

    monkeypatch.setattr(DecoderStep, "__call__", counted)
    native_answers = run(core_for(mimir, max_model_len=512, num_blocks=200), requests)
    assert max(num_packed) == (1 if format == "int8" else 2), "formats in one native step"
    monkeypatch.setattr(MixedAttention, "packed", lambda self: None)
    answers = run(core_for(mimir, max_model_len=512, num_blocks=200), requests)
    assert native_answers == answers


@pytest.mark.parametrize(("format", "most"), [("fp8", 0.05), ("int8", 0.01), ("kivi4", 0.05)])
def test_log_probabilities_stay_near_those_of_the_whole_cache(mimir: Model, format: str, most: float) -> None:
    """Of the same tokens: both answers are made to go the same way."""
    found = []
    for policy in (FORMATS[format], None):
        one = request("r", 200, 3, policy, logprobs=0, logit_bias={200: 100.0}, max_tokens=30)
        core = core_for(mimir, max_model_len=256, num_blocks=160)
        found.append([entry.logprob for entry in run(core, [one])["r", 0].logprobs])
    errors = [abs(mine - whole) for mine, whole in zip(*found, strict=True)]
    assert sum(errors) / len(errors) < most
    assert max(errors) > 0, "the packed tokens were read"


@pytest.mark.parametrize(("format", "places"), [("int8", 4), ("kivi2", 5)])
def test_packing_releases_the_blocks_at_once(mimir: Model, format: str, places: int) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160, prefix_cache=False)
    core.step = poisoned(core)  # type: ignore[method-assign]
    core.add(request("r", 200, 0, FORMATS[format], max_tokens=40))
    counts = core.scheduler.cache.pool
    core.step()
    num_packed = 200 // BLOCK_SIZE - 1
    assert counts.counts.active == -(-num_packed // places) + 1
    while core.has_work:
        core.step()
    assert counts.counts.active == 0


def test_choices_of_one_request_are_what_they_are_alone(mimir: Model) -> None:
    one = msgspec.structs.replace(request("r", 60, 0, FORMATS["int8"], temperature=1.0), num_choices=3)
    found, _ = answers_of(mimir, [one])
    other, _ = answers_of(mimir, [*some("kivi4"), one], budget=11)
    assert {name: ids for name, ids in other.items() if name[0] == "r"} == found
    assert len({tuple(ids) for ids in found.values()}) == 3


def test_aborts_at_every_step_leak_nothing(mimir: Model) -> None:
    for steps in range(1, 14, 2):
        core = core_for(mimir, max_model_len=256, num_blocks=160, budget=32)
        core.step = poisoned(core)  # type: ignore[method-assign]
        for one in some("int8"):
            core.add(one)
        for _ in range(steps):
            core.step()
        for one in some("int8")[:3]:
            core.abort(one.request_id)
        while core.has_work:
            core.step()
        assert core.scheduler.cache.pool.counts.active == 0


def test_an_abort_while_blocks_are_packed_leaks_nothing(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.add(request("r", 60, 0, FORMATS["int8"]))
    plan = core.scheduler.schedule()
    assert plan.chunks[0].compaction is not None
    assert plan.chunks[0].compaction.packed
    core.abort("r")
    core.scheduler.commit(plan, core.runner.execute(plan))
    check_invariants(core.scheduler)
    assert core.scheduler.cache.pool.counts.active == 0


def test_the_prompt_stays_whole_for_the_next_request(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    run(core, [request("a", 96, 0, FORMATS["int8"])])
    again = run(core, [request("b", 96, 0, None)])
    assert again["b", 0].num_cached_tokens == 88, "all full blocks but the last token's are there"


def test_usage_counts_what_was_packed_and_released(mimir: Model) -> None:
    core = core_for(mimir, max_model_len=256, num_blocks=160)
    core.add(request("r", 100, 0, FORMATS["int8"], max_tokens=10))
    kv = _last(core).kv
    assert kv is not None
    assert (kv.policy, kv.peak_slots, kv.steady_slots, kv.evicted_tokens) == ("int8", 109, 109, 0)
    block_bytes = core.runner.cache.k[0].nbytes + core.runner.cache.v[0].nbytes
    # of 13 blocks of the prompt 11 are packed into 3, and another one after 8 more tokens
    assert kv.private_bytes == (3 + 2) * block_bytes
    assert kv.released_bytes == (11 - 3 + 1) * block_bytes
    assert (kv.shared_bytes, kv.bits_per_value) == (0, 8.0)


def _last(core: EngineCore) -> Any:
    outputs: list[Any] = []
    while core.has_work:
        outputs += core.step()
    return outputs[-1]


# ---- plans and refusals


def plan_of(num_prompt_tokens: int, shape: CacheShape = SHAPE) -> CachePlan:
    policy = registry.create("int8")
    assert isinstance(policy, PackedPolicy)
    return policy.plan(num_prompt_tokens, shape)


@pytest.mark.parametrize("num_prompt_tokens", [1, 31, 32, 33, 47, 48, 300, 1000])
def test_all_full_blocks_but_the_newest_are_packed(num_prompt_tokens: int) -> None:
    plan = plan_of(num_prompt_tokens)
    for num_tokens in range(num_prompt_tokens, num_prompt_tokens + 100):
        num_packed = plan.packed_slots_at(num_tokens)
        newer = num_tokens - num_packed
        assert num_packed % 16 == 0
        if num_tokens < 32:
            assert num_packed == 0
        elif num_tokens == num_prompt_tokens:
            assert num_packed == (num_tokens // 16 - 1) * 16
        else:
            assert 16 <= newer < 48
    assert plan.places == 4


def test_a_format_that_saves_nothing_is_refused() -> None:
    shape = CacheShape(4, 2, 64, 64, block_size=4, dtype=torch.float16)
    with pytest.raises(ConfigError, match="kivi saves nothing in blocks of 4 tokens of float16: raise block_size"):
        registry.create("kivi").plan(100, shape)
    with pytest.raises(ConfigError, match="int8 needs a head dim of at least 8, got 4; use another policy"):
        registry.create("int8").plan(100, CacheShape(4, 2, 4, 4, block_size=16))
    with pytest.raises(InvalidParameter, match="bits is 3, allowed: 2 and 4"):
        registry.create("kivi", {"bits": 3})


def test_sliding_windows_are_refused() -> None:
    policies = Policies(CacheConfig(), KVSpec(2, 2, 32, 32, windows=(0, 128)), torch.float32)
    with pytest.raises(InvalidParameter, match="'kivi' packs older tokens, which the sliding windows"):
        policies.resolve({"name": "kivi"}, 100)


def test_bits_per_value_are_those_of_the_memory() -> None:
    policies = Policies(CacheConfig(), KVSpec(2, 2, 64, 64), torch.float32)
    for choice, bits in [("fp8", 8.0), ("int8", 8.0), ("kivi", 32 / 5)]:
        resolved = policies.resolve({"name": choice}, 100)
        assert resolved is not None
        assert resolved.bits_per_value == bits


@pytest.mark.parametrize("format", ["int8", "kivi2"])
def test_whole_caches_are_packed_before_anybody_is_preempted(mimir: Model, format: str) -> None:
    requests = [request(f"r{i}", 40, i, {"name": "full", "may_shrink": True}, max_tokens=80) for i in range(5)]
    pressure = json.dumps(FORMATS[format])
    core = core_for(mimir, max_model_len=256, num_blocks=46, pressure_policy=pressure)
    core.step = poisoned(core)  # type: ignore[method-assign]
    answers = run(core, requests)
    stats = core.scheduler.stats()
    assert (stats.num_preemptions, stats.num_shrunk > 0) == (0, True)
    assert all(len(answer.token_ids) == 80 for answer in answers.values())
    assert core.scheduler.cache.pool.counts.active == 0
