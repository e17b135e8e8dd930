"""The miniatures inside the running engine, in one batch with requests that have no policy."""

from __future__ import annotations

import copy
import random
from typing import Any

import msgspec
import pytest

from engine.compression.hooked import HookedRows
from engine.core import EngineCore
from engine.models.batch import Model
from engine.types import EngineRequest
from tests.compression.test_in_engine import poisoned, preempting
from tests.e2e.driving import core_for, request, run, tokens
from tests.speculation import hostile
from tests.speculation.hostile import Scripted, equip, speculating

# Small enough that something is not read, and what reads everything.
SMALL: dict[str, dict[str, Any]] = {
    "quest_by_hook": {"budget": 24},
    "tidal_decode": {"budget": 6},
    "token_select": {"budget": 6},
    "double_sparsity": {"budget": 6},
    "token_butler": {"budget": 6},
    "act": {"threshold": 0.05, "beta": 0.2},
    "pod": {"num_recent": 6},
    "landmark": {},
    "cca": {"group": 8, "window": 4},
    "quick_silver": {"threshold": 0.45},
}
WIDE: dict[str, dict[str, Any]] = {
    "quest_by_hook": {"budget": 512},
    "tidal_decode": {"budget": 512},
    "token_select": {"budget": 512},
    "double_sparsity": {"budget": 512},
    "token_butler": {"budget": 512},
    "act": {"beta": 1.0, "threshold": 0.05},
    "pod": {"num_recent": 512},
    "cca": {"window": 512},
    "quick_silver": {"threshold": 0.0},
    "steering": {"factor": 1.0},
}
# One of each hook; the others differ in what they choose, not in what the engine does for them.
QUICK = ("token_select", "token_butler", "cca", "quick_silver")
ONE_OF_EACH_HOOK = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
Tokens = dict[tuple[str, int], list[int]]


def traffic(name: str | None, options: dict[str, Any], num_tokens: int = 20) -> list[EngineRequest]:
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
    """One in which what nobody holds is NaN, and whose plans are checked after each step."""
    core = core_for(model, **{"max_model_len": 128, "num_blocks": 160, **options})
    core.step = poisoned(core)  # type: ignore[method-assign]
    return core


def answers(model: Model, requests: list[EngineRequest], **options: Any) -> Tokens:
    core = core_of(model, **options)
    found = tokens(run(core, requests))
    assert core.scheduler.cache.pool.counts.active == 0, "blocks leaked"
    return found


@pytest.fixture(scope="module")
def whole(mimir: Model) -> Tokens:
    return answers(mimir, traffic(None, {}))


@pytest.mark.parametrize("name", WIDE)
def test_what_reads_everything_changes_nothing(name: str, mimir: Model, whole: Tokens) -> None:
    assert answers(mimir, traffic(name, WIDE[name])) == whole


@pytest.mark.parametrize("name", SMALL)
def test_a_small_one_changes_its_own_requests_and_no_others(name: str, mimir: Model, whole: Tokens) -> None:
    found = answers(mimir, traffic(name, SMALL[name]))
    assert [found[f"r{i}", 0] == whole[f"r{i}", 0] for i in (0, 4)] == [True, True]
    assert any(found[f"r{i}", 0] != whole[f"r{i}", 0] for i in (1, 2, 3))


@pytest.mark.parametrize("name", ONE_OF_EACH_HOOK)
def test_tokens_depend_on_the_request_alone(name: str, mimir: Model) -> None:
    """Not on chunks, the prefix cache, other requests, or on being preempted and computed again."""
    expected = answers(mimir, traffic(name, SMALL[name]))
    for options in ({"budget": 7}, {"prefix_cache": False}, {"num_blocks": 26, "budget": 64}):
        assert answers(mimir, traffic(name, SMALL[name]), **options) == expected, options
    one = traffic(name, SMALL[name])[2]
    assert answers(mimir, [one]) == {("r2", 0): expected["r2", 0]}
    core = core_of(mimir)
    preempting(core, every=25)
    for _ in range(2):  # the second time the prefix cache knows the prompts
        assert tokens(run(core, traffic(name, SMALL[name]))) == expected


def assert_guesses_change_nothing(model: Model, name: str, expected: Tokens) -> None:
    guesses = hostile.oracle(expected), hostile.oracle(expected, num_wrong=2), hostile.random_chain(400)

    def guess(view: Any, cap: int, generator: random.Random) -> Any:
        return generator.choice(guesses)(view, cap, generator)

    drafter = Scripted(guess)
    core = equip(core_of(model), drafter)
    assert tokens(run(core, speculating(traffic(name, SMALL[name]), 6))) == expected
    for i in (1, 2, 3):
        assert drafter.accepted[f"r{i}/0"] > 3


@pytest.mark.parametrize("name", ONE_OF_EACH_HOOK)
def test_guesses_change_nothing(name: str, mimir: Model) -> None:
    """Right ones, wrong ones and trees: what was noted for wrong ones is forgotten."""
    assert_guesses_change_nothing(mimir, name, answers(mimir, traffic(name, SMALL[name])))


@pytest.mark.parametrize("name", ["token_butler", "cca"])
def test_the_proof_finds_notes_of_wrong_guesses(name: str, mimir: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, commit = answers(mimir, traffic(name, SMALL[name])), HookedRows.commit

    def committing(self: HookedRows, chunks: Any, segment: Any, results: Any) -> None:
        drafts = [range(0 if chunk.draft is None else len(chunk.draft)) for chunk in chunks]
        everything = [
            result if result.error else msgspec.structs.replace(result, accepted=tuple(nodes))
            for result, nodes in zip(results, drafts, strict=True)
        ]
        commit(self, chunks, segment, everything)

    monkeypatch.setattr(HookedRows, "commit", committing)
    with pytest.raises(AssertionError):
        assert_guesses_change_nothing(mimir, name, expected)


@pytest.mark.parametrize("name", ["token_butler", "act", "cca", "tidal_decode"])
def test_choices_of_one_request_are_what_they_are_alone(name: str, mimir: Model) -> None:
    one = traffic(name, SMALL[name])[2]
    sampled = msgspec.structs.replace(
        one, sampling=msgspec.structs.replace(one.sampling, temperature=1.0), num_choices=3
    )
    others = traffic(name, SMALL[name])[:2]
    together = answers(mimir, [*others, sampled], budget=11)
    assert together == {**answers(mimir, others), **answers(mimir, [sampled])}


def test_quest_through_the_hook_is_quest(mimir: Model) -> None:
    built_in = answers(mimir, traffic("quest", {"budget": 24, "num_dense_layers": 1}))
    assert answers(mimir, traffic("quest_by_hook", SMALL["quest_by_hook"])) == built_in


@pytest.mark.parametrize("correction", [9, 2])
def test_reuse_is_what_selecting_the_same_again_gives(correction: int, mimir: Model) -> None:
    options = {"budget": 6, "correction": correction}
    reused = answers(mimir, traffic("tidal_decode", options))
    assert answers(mimir, traffic("tidal_decode", {**options, "by_memory": True})) == reused


def test_what_is_pooled_may_be_given_back(mimir: Model) -> None:
    """The answer is the same, and no more blocks are held than the window needs."""
    options = {"group": 8, "window": 8}
    kept = answers(mimir, traffic("cca", options))
    core = core_of(mimir, prefix_cache=False)
    requests = traffic("cca", {**options, "drops": True})
    assert tokens(run(core, requests)) == kept
    core.add(requests[2])
    most = 0
    while core.has_work:
        core.step()
        most = max(most, core.scheduler.cache.pool.counts.active)
    assert most <= 4


def test_a_layer_that_leads_itself_attends_as_usual(mimir: Model, whole: Tokens) -> None:
    assert answers(mimir, traffic("pod", {"num_recent": 6, "leads_itself": True})) == whole


def test_groups_of_one_token_are_attention_as_usual(mimir: Model, whole: Tokens) -> None:
    assert answers(mimir, traffic("cca", {"group": 1, "window": 4})) == whole


def test_replaced_states_go_on(mimir: Model, whole: Tokens) -> None:
    found = answers(mimir, traffic("steering", {"factor": 0.1}))
    assert any(found[f"r{i}", 0] != whole[f"r{i}", 0] for i in (1, 2, 3))
    assert all(found[f"r{i}", 0][0] == whole[f"r{i}", 0][0] for i in (1, 2, 3)), "the prompt is as it was"


def test_when_all_tokens_halt_the_model_ends_there(mimir: Model) -> None:
    early = copy.copy(mimir)
    layers = [copy.copy(layer) for layer in mimir._layers[:2]]  # type: ignore[attr-defined]
    layers[-1].next_norm = mimir._layers[-1].next_norm  # type: ignore[attr-defined]
    early._layers, early._step = layers, None  # type: ignore[attr-defined]
    found = answers(mimir, traffic("quick_silver", {"threshold": 1e9, "first": 2}))
    expected = answers(early, traffic(None, {}))
    assert {key: ids for key, ids in found.items() if key[0] in ("r1", "r2", "r3")} == {
        key: ids for key, ids in expected.items() if key[0] in ("r1", "r2", "r3")
    }
