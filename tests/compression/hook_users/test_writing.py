"""Miniatures of systems that see what is written, or keep it in a form of their own, inside the running engine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch

import kernels
from engine.compression import registry
from engine.compression.options import Options
from engine.compression.provide import unrotated_layers
from engine.core import EngineCore
from engine.errors import InvalidParameter
from engine.models.batch import Model
from engine.types import EngineRequest
from tests.compression.hook_users.writing import (
    KVPrediction,
    Labels,
    MiKV,
    OScaR,
    Oscar,
    ShadowKV,
    ZipCache,
    ZipVL,
    enough,
)
from tests.compression.test_in_engine import poisoned, preempting
from tests.e2e.driving import core_for, request, run, tokens
from tests.speculation import hostile

MINIATURES: dict[str, type[Options]] = {
    "mikv": MiKV,
    "zipcache": ZipCache,
    "oscar": OScaR,
    "zipvl": ZipVL,
    "kv_prediction": KVPrediction,
    "shadow_kv": ShadowKV,
    "labels": Labels,
}
# What loses something, and what loses nothing.
SMALL: dict[str, dict[str, Any]] = {
    "mikv": {"budget": 16},
    "zipcache": {},
    "oscar": {},
    "zipvl": {"tau": 0.6},
    "kv_prediction": {"num_layers": 2},
    "shadow_kv": {"rank": 8},
    "labels": {"budget": 16},
}
WHOLE: dict[str, dict[str, Any]] = {
    "mikv": {"budget": 16, "low": "exact"},
    "zipcache": {"high": "exact", "low": "exact"},
    "oscar": {"form": "exact"},
    "zipvl": {"tau": 1.0},
    "kv_prediction": {},
    "shadow_kv": {},
    "labels": {"budget": 512},
}


@pytest.fixture(scope="module", autouse=True)
def registered(mimir: Model) -> Iterator[None]:
    ShadowKV.cos_sin = mimir._layers[0].attention.cos_sin  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_entries", dict(registry._entries))
        for name, policy in MINIATURES.items():
            registry.register(name)(policy)
        yield


def traffic(name: str | None, options: dict[str, Any], num_tokens: int = 28) -> list[EngineRequest]:
    """Three with the policy, greedy and sampled, between two that keep everything."""
    numbers = random.Random(1)
    requests = []
    for i, length in enumerate((40, 61, 33, 50, 20)):
        prompt = [numbers.randrange(20, 400) for _ in range(length)]
        plain = request(f"r{i}", prompt, max_tokens=num_tokens, temperature=0.7 * (i % 2), seed=i)
        policy = {"name": name, **options} if name is not None and 0 < i < 4 else {"name": "full"}
        requests.append(msgspec.structs.replace(plain, kv_policy=policy))
    return requests


def core_of(model: Model, **options: Any) -> EngineCore:
    core = core_for(model, **{"max_model_len": 256, "num_blocks": 160, **options})
    core.step = poisoned(core)  # type: ignore[method-assign]
    return core


def answers(core: EngineCore, requests: list[EngineRequest]) -> dict[tuple[str, int], list[int]]:
    found = tokens(run(core, requests))
    assert core.scheduler.cache.pool.counts.active == 0, "blocks leaked"
    assert core.scheduler.cache.num_promised == 0
    assert all(not pool.broken_blocks for pool in core.scheduler.cache.compaction.part_pools.values())
    return found


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_what_loses_nothing_says_what_the_whole_cache_does(mimir: Model, name: str) -> None:
    expected = answers(core_of(mimir), traffic(None, {}))
    assert answers(core_of(mimir), traffic(name, WHOLE[name])) == expected


@pytest.mark.parametrize("name", sorted(MINIATURES))
def test_tokens_depend_on_the_request_alone(mimir: Model, name: str) -> None:
    """Not on chunks, on the prefix cache, on room, on being thrown out, or on who runs beside."""
    expected = answers(core_of(mimir), traffic(name, SMALL[name]))
    for options in ({"budget": 7}, {"num_blocks": 34, "budget": 64}):
        assert answers(core_of(mimir, **options), traffic(name, SMALL[name])) == expected, options
    warm = core_of(mimir)
    answers(warm, traffic(name, SMALL[name]))
    assert answers(warm, traffic(name, SMALL[name])) == expected, "the prefix cache knows the prompts"
    disturbed = core_of(mimir, prefix_cache=False)
    preempting(disturbed, every=9)
    assert answers(disturbed, traffic(name, SMALL[name])) == expected
    alone = answers(core_of(mimir), [traffic(name, SMALL[name])[1]])
    assert alone["r1", 0] == expected["r1", 0]


@pytest.mark.parametrize("name", ["labels", "shadow_kv", "zipvl", "kv_prediction", "mikv"])
def test_guesses_change_nothing(mimir: Model, name: str) -> None:
    """Right ones, wrong ones and trees. Where tokens are packed in classes none is checked."""
    expected = answers(core_of(mimir), traffic(name, SMALL[name]))
    guesses = hostile.oracle(expected), hostile.oracle(expected, num_wrong=2), hostile.random_chain(400)

    def guess(view: Any, cap: int, generator: random.Random) -> Any:
        return generator.choice(guesses)(view, cap, generator)

    drafter = hostile.Scripted(guess)
    core = hostile.equip(core_of(mimir), drafter)
    assert answers(core, hostile.speculating(traffic(name, SMALL[name]), 6)) == expected
    assert drafter.num_accepted > 10


def held_after_prompt(core: EngineCore, policy: dict[str, Any] | None, num_tokens: int = 120) -> int:
    numbers = random.Random(2)
    prompt = [numbers.randrange(20, 400) for _ in range(num_tokens)]
    core.add(msgspec.structs.replace(request("r", prompt, max_tokens=8), kv_policy=policy))
    core.step()
    held = core.scheduler.cache.pool.counts.active
    while core.has_work:
        core.step()
    assert core.scheduler.cache.pool.counts.active == 0
    return held


@pytest.mark.parametrize("name", ["mikv", "zipcache", "oscar", "zipvl", "labels"])
def test_memory_is_released_when_the_prompt_is_read(mimir: Model, name: str) -> None:
    whole = held_after_prompt(core_of(mimir, prefix_cache=False), None)
    assert held_after_prompt(core_of(mimir, prefix_cache=False), {"name": name, **SMALL[name]}) < 0.75 * whole


def test_side_data_takes_blocks_that_the_answer_counts(mimir: Model) -> None:
    core = core_of(mimir, prefix_cache=False)
    numbers = random.Random(2)
    prompt = [numbers.randrange(20, 400) for _ in range(100)]
    private: dict[str, int] = {}
    for name, options in ((None, {}), ("labels", {"budget": 512})):
        policy = {"name": "snapkv", "budget": 512} if name is None else {"name": name, **options}
        core.add(msgspec.structs.replace(request("r", prompt, max_tokens=4), kv_policy=policy))
        while core.has_work:
            for output in core.step():
                assert output.kv is not None
                private[name or "none"] = output.kv.private_bytes
    block_bytes = sum(pool[0].nbytes for pool in (core.runner.cache.k, core.runner.cache.v))
    per_block = 2 * (8 * 32 * 4 // 66)  # slots of which 33 halves fit into the keys and the values of a unit
    assert private["labels"] - private["none"] == -(-103 // per_block) * block_bytes


@pytest.mark.parametrize("options", [{}, {"budget": 7}])
def test_side_data_follows_its_tokens(mimir: Model, options: dict[str, Any]) -> None:
    """Through chunks, compactions, and blocks from the prefix cache, of which nobody had noted anything."""
    core = core_of(mimir, **options)
    answers(core, traffic(None, {}))
    Labels.seen.clear()
    hits = run(core, traffic("labels", SMALL["labels"]))
    assert hits["r1", 0].num_cached_tokens > 0
    assert len(Labels.seen) > 12
    assert all(Labels.seen)


def test_classes_differ_in_precision_as_they_should(mimir: Model) -> None:
    """Less is lost with a better low class: the answers go on longer as the whole cache's do."""
    expected = answers(core_of(mimir), traffic(None, {}))

    def common(low: str) -> int:
        found = answers(core_of(mimir), traffic("mikv", {"budget": 16, "low": low}))
        pairs = [zip(found[name], expected[name], strict=True) for name in found]
        return sum(a == b for pair in pairs for a, b in pair)

    assert common("int8") >= common("kivi2")


def test_a_number_of_tokens_is_found_out_and_counted_exactly(mimir: Model) -> None:
    """Layers keep as many as the attention asks for; a preempted request finds out the same again."""
    core = core_of(mimir, prefix_cache=False)
    numbers = random.Random(2)
    prompt = [numbers.randrange(20, 400) for _ in range(120)]
    policy = {"name": "zipvl", "tau": 0.6}
    core.add(msgspec.structs.replace(request("r", prompt, max_tokens=8), kv_policy=policy))
    core.step()
    (running,) = core.scheduler.roster.running
    plan = running.cache_plan
    assert plan is not None
    assert not plan.is_adaptive
    assert len(set(plan.kept)) > 1, "layers differ"
    assert [table.num_slots for table in running.tables] == list(plan.kept)
    core.scheduler.roster.requeue(running, 0.0)
    core.scheduler._release(running)
    core.step()
    assert running.cache_plan is not None
    assert running.cache_plan.kept == plan.kept
    core.scheduler.abort("r")
    core.step()
    assert core.scheduler.cache.pool.counts.active == 0


def test_the_number_of_tokens_is_that_of_the_example() -> None:
    rows = [[1.0], [0.6, 0.4], [0.5, 0.3, 0.2], [0.4, 0.1, 0.4, 0.1], [0.3, 0.05, 0.4, 0.05, 0.2]]
    rows.append([0.3, 0.05, 0.1, 0.35, 0.1, 0.1])
    sums = torch.zeros(6)
    for row in rows:
        sums[: len(row)] += torch.tensor(row)
    assert (enough(sums, 0.8), enough(sums, 0.96), enough(sums, 1.0)) == (3, 5, 6)


def test_one_large_token_does_not_spoil_its_neighbours_in_oscars_form() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 1, 2, 8, 32, generator=generator) for _ in range(2))
    keys[..., 3, :] *= 100
    codec = Oscar()
    found = codec.decode(0, *(x[:, 0] for x in codec.encode(keys, values)))[0]
    pools = [torch.zeros(2, 1, 2, 8, 32) for _ in range(2)]
    where = torch.tensor([1]), torch.tensor([0])
    kernels.seal_groups(*pools, keys, values, *where, format="kivi2")
    kivi = kernels.unpack_blocks(*pools, *where, format="kivi2")[0][:, 0]
    others = torch.arange(8) != 3
    error, error_of_kivi = ((x - keys[:, 0])[:, :, others].pow(2).mean() for x in (found, kivi))
    assert error < error_of_kivi / 10


def test_unrotated_keys_lie_in_fewer_directions(mimir: Model) -> None:
    numbers = random.Random(3)
    prompt = torch.tensor([numbers.randrange(20, 400) for _ in range(200)])
    layers = unrotated_layers(mimir, prompt, 4)
    shares = []
    for unrotated, _ in layers:
        rotated = unrotated.contiguous().clone()
        kernels.apply_rope(rotated.clone(), rotated, torch.arange(200), ShadowKV.cos_sin)
        energies = (torch.linalg.svdvals(x.flatten(1)).pow(2) for x in (unrotated, rotated))
        shares.append([float(energy[:8].sum() / energy.sum()) for energy in energies])
    assert all(before > after for before, after in shares), shares


def test_predicted_prompts_enter_no_cache_and_refuse_what_they_lack(mimir: Model) -> None:
    core = core_of(mimir)
    some = traffic("kv_prediction", {})
    answers(core, some[1:2])
    again = msgspec.structs.replace(some[1], kv_policy=None)
    assert run(core, [again])["r1", 0].num_cached_tokens == 0, "what was predicted is not what the tokens say"
    sampling = msgspec.structs.replace(some[1].sampling, prompt_logprobs=1)
    with pytest.raises(InvalidParameter, match="prompt_logprobs"):
        core.add(msgspec.structs.replace(some[1], sampling=sampling))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"name": "labels", "format": "int8"}, "notes something of each slot"),
        ({"name": "mikv", "format": "int8"}, "packs in its own way"),
        ({"name": "zipvl", "format": "int8"}, "how much it keeps"),
    ],
)
def test_what_cannot_be_honoured_is_refused(mimir: Model, policy: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidParameter, match=reason):
        core_of(mimir).add(msgspec.structs.replace(request("r", [20] * 30, max_tokens=8), kv_policy=policy))
