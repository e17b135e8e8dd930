"""Speculation and cache policies: the answer with both is the answer with the policy alone, and so is what is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from engine.compression import registry
from engine.compression.apply import SlotMap
from engine.compression.compactions import Compactions
from engine.compression.drafted import DraftedQueries
from engine.compression.raas import RaaS
from engine.compression.resolver import Policies
from engine.compression.rows import PolicyRows
from engine.compression.selecting import BoundedRows
from engine.compression.split import SplitRows
from engine.compression.state import RowState
from engine.core import EngineCore
from engine.mimir import model_path
from engine.models import load_model
from engine.models.batch import Model
from engine.scheduling import drafts
from engine.scheduling.compression import ResolvedPolicy
from engine.scheduling.plan import Chunk, Compaction
from engine.speculation.allowance import FixedBudget
from engine.speculation.base import RequestView
from engine.speculation.catalogue import HEAD_DRAFTERS, drafters
from engine.speculation.tree import DraftTree
from engine.types import EngineRequest, TokenOutput
from tests.compression.test_in_engine import CHOICES, RAZOR, poisoned, preempting
from tests.e2e.driving import core_for, request, run, tokens
from tests.speculation import hostile
from tests.speculation.hostile import Guess, Scripted, equip, speculating

FULL = {"name": "full"}
# Small budgets, and periods that give every request several compactions with room for drafts in between.
OPTIONS: dict[str, dict[str, Any]] = {
    **CHOICES,
    "streaming_llm": {"budget": 24, "period": 16},
    "scissorhands": {"budget": 32, "window": 12, "num_recent": 4},
    "keyformer": {"budget": 24, "ramp_tokens": 30},
    "a2sf": {"budget": 24, "alpha": 0.9, "num_recent": 4},
    "quest": {"budget": 24, "num_dense_layers": 3},
    "gemfilter": {"budget": 24, "num_recent": 8},
    "h2o in fp8": {"name": "h2o", "budget": 24, "period": 0, "format": "fp8"},
}
NAMES = sorted({*registry.names(), *OPTIONS} - {"razor_attention"})

# At (seed of the request, tokens computed): the evidence before a compaction, and all keys and values.
Cuts = dict[tuple[int, int], list[Tensor]]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(model_path("mimir"), device=torch.device("cpu"), dtype="float32", deterministic=True)


@pytest.fixture(scope="module", autouse=True)
def calibrated_razor() -> Iterator[None]:
    """`razor` is RazorAttention with head classes, as an artefact would give them."""
    original = Policies.resolve

    def resolve(self: Policies, choice: Mapping[str, Any] | None, num_prompt_tokens: int) -> ResolvedPolicy | None:
        if choice is not None and choice["name"] == "razor":
            return ResolvedPolicy(RAZOR.plan(num_prompt_tokens, self.shape), 32.0, RAZOR)
        return original(self, choice, num_prompt_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Policies, "resolve", resolve)
        yield


@contextmanager
def noting() -> Iterator[Cuts]:
    """What every compaction finds from now on."""
    found: Cuts = {}
    make = Compactions.make

    def noted(self: Compactions, chunk: Chunk, compaction: Compaction, state: RowState) -> dict[str, Any]:
        row, end = chunk.row, chunk.start + chunk.num_tokens
        is_split = row in self._split
        tables = self._split.tables(row) if is_split else [self._rows.block_ids(row).tolist()]
        num_slots = int(self._split.num_slots(row).min()) if is_split else end - self._rows.num_dropped(row)
        slots = SlotMap(self._cache, tables)
        pools = self._cache.k, self._cache.v
        seen = [slots.layer(pool, layer, num_slots) for pool in pools for layer in range(self._num_layers)]
        if state.scores is not None:
            seen.append(state.scores)
        if isinstance(state.policy, RaaS):
            seen.append(self._bounded.stamps(row, num_slots))
        found[state.seed, end] = [tensor.clone() for tensor in seen]
        return make(self, chunk, compaction, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Compactions, "make", noted)
        yield found


@dataclass(frozen=True)
class Plain:
    """What there is without speculation."""

    tokens: dict[tuple[str, int], list[int]]
    cuts: Cuts


@pytest.fixture(scope="module")
def plain(model: Model) -> Callable[[str], Plain]:
    """By policy; each is run once."""
    known: dict[str, Plain] = {}

    def of(name: str) -> Plain:
        if name not in known:
            with noting() as cuts:
                known[name] = Plain(tokens(run(core_of(model), traffic(name))), cuts)
        return known[name]

    return of


def traffic(name: str, num_tokens: int = 40) -> list[EngineRequest]:
    """Three with the policy, greedy and sampled, between two that keep everything."""
    generator = random.Random(1)
    requests = []
    for i, length in enumerate((40, 61, 33, 50, 20)):
        prompt = [generator.randrange(20, 400) for _ in range(length)]
        plain = request(f"r{i}", prompt, max_tokens=num_tokens, temperature=0.7 * (i % 2), seed=i)
        policy = {"name": name, **OPTIONS.get(name, {})} if 0 < i < 4 else FULL
        requests.append(msgspec.structs.replace(plain, kv_policy=policy))
    return requests


def mixed(truth: hostile.Truth) -> Guess:
    """All sorts of drafts: right ones hidden in trees, chains that begin right and go wrong, and wrong ones."""
    guesses = [
        hostile.oracle(truth, num_wrong=2),
        turning_wrong(truth),
        hostile.random_tree(400),
        hostile.random_chain(400),
    ]

    def guess(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        return generator.choices(guesses, weights=(4, 4, 1, 1))[0](view, cap, generator)

    return guess


def turning_wrong(truth: hostile.Truth) -> Guess:
    right = hostile.oracle(truth)

    def guess(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        tree = right(view, cap, generator)
        end = generator.randint(0, len(tree))
        wrong = [generator.randrange(20, 400) for _ in range(len(tree) - end)]
        return DraftTree.chain([*tree.tokens[:end], *wrong], source=hostile.NAME)

    return guess


def core_of(model: Model, **options: Any) -> EngineCore:
    """One whose free memory is poisoned and whose plans are checked after each step."""
    core = core_for(model, **{"num_blocks": 90, **options})
    core.step = poisoned(core)  # type: ignore[method-assign]
    return core


def assert_nothing_is_left(core: EngineCore) -> None:
    assert core.scheduler.cache.pool.counts.active == 0, "blocks leaked"
    assert not any(pool.broken_blocks for pool in core.scheduler.cache.compaction.part_pools.values())


def assert_same_cuts(found: Cuts, expected: Cuts) -> None:
    """Where requests were preempted, their first cuts are found twice, the same."""
    assert set(found) == set(expected)
    for at, seen in found.items():
        assert len(seen) == len(expected[at])
        assert all(torch.equal(one, other) for one, other in zip(seen, expected[at], strict=True)), at


def assert_drafts_change_nothing(model: Model, name: str, plain: Plain, **options: Any) -> Scripted:
    drafter = Scripted(mixed(plain.tokens))
    core = equip(core_of(model, **options), drafter)
    with noting() as cuts:
        assert tokens(run(core, speculating(traffic(name), 10))) == plain.tokens
    assert_same_cuts(cuts, plain.cuts)
    assert_nothing_is_left(core)
    return drafter


@pytest.mark.parametrize("name", NAMES)
def test_with_drafts_every_token_and_every_cut_is_what_it_is_without(
    name: str, model: Model, plain: Callable[[str], Plain]
) -> None:
    """Bit for bit: keys, values and evidence at each compaction. A smaller pool, so that some are preempted."""
    drafter = assert_drafts_change_nothing(model, name, plain(name), num_blocks=36)
    for i in (1, 2, 3):
        assert drafter.accepted[f"r{i}/0"] > 10, "rows with the policy speculate, from their first token to their last"


# RaaS and Quest compute generated tokens one by one: thrown out too often, a request never comes as far as it was.
@pytest.mark.parametrize(("name", "every"), [("h2o", 7), ("razor", 7), ("kivi", 7), ("raas", 45)])
def test_chunks_hits_and_preemption_change_nothing_with_drafts_either(
    name: str, every: int, model: Model, plain: Callable[[str], Plain]
) -> None:
    expected = plain(name).tokens
    core = equip(core_of(model, budget=13), Scripted(mixed(expected)))
    preempting(core, every=every)
    for _ in range(2):  # the second time the prefix cache knows the prompts
        assert tokens(run(core, speculating(traffic(name), 10), stagger=2)) == expected
        assert_nothing_is_left(core)


def everything_counts(patch: pytest.MonkeyPatch) -> None:
    """Evidence of nodes that turn out to be wrong counts, as it does where scores are summed up during the pass."""
    way = PolicyRows._way
    patch.setattr(PolicyRows, "_way", lambda self, chunk: way(self, chunk)._replace(has_draft=False))


def one_more_counts(patch: pytest.MonkeyPatch) -> None:
    """So does the first node behind the accepted ones, where that is one of the draft."""
    count = DraftedQueries.count

    def counting(self: DraftedQueries, accepted: Sequence[Sequence[int]], *others: Any) -> None:
        longer = [
            path if len(path) == len(chunk.draft or ()) else (*path, min({*range(len(path) + 1)} - {*path}))
            for chunk, path in zip(self.chunks, accepted, strict=True)
        ]
        count(self, longer, *others)

    patch.setattr(DraftedQueries, "count", counting)


def counted_too_early(patch: pytest.MonkeyPatch) -> None:
    """Nodes are taken for the first ones behind the root, wherever they are in the draft."""
    count = DraftedQueries.count

    def counting(self: DraftedQueries, accepted: Sequence[Sequence[int]], *others: Any) -> None:
        count(self, [range(len(path)) for path in accepted], *others)

    patch.setattr(DraftedQueries, "count", counting)


def across_points(patch: pytest.MonkeyPatch) -> None:
    """Drafts go on where the cache should shrink."""
    patch.setattr(drafts, "_until_compaction", lambda request: request.family.max_tokens)


def up_to_points(patch: pytest.MonkeyPatch) -> None:
    """Drafts may be one token too long: a step with one would have to compact."""
    until = drafts._until_compaction
    patch.setattr(drafts, "_until_compaction", lambda request: until(request) + 1)


def not_moved(patch: pytest.MonkeyPatch) -> None:
    """Accepted nodes stay where they are in tables per layer or head."""
    patch.setattr(SplitRows, "_move", lambda self, row, nodes: None)


def stamped_by_all(patch: pytest.MonkeyPatch) -> None:
    """What wrong guesses looked at counts as used."""
    commit = BoundedRows.commit

    def committing(self: BoundedRows, chunks: Sequence[Chunk], segment: Any, accepted: Any) -> None:
        commit(self, chunks, segment, [range(0 if chunk.draft is None else len(chunk.draft)) for chunk in chunks])

    patch.setattr(BoundedRows, "commit", committing)


def trees_for_all(patch: pytest.MonkeyPatch) -> None:
    """Rows that look at bounds get drafts that are no chains."""
    patch.setattr(DraftTree, "first_path", lambda self: self)


@pytest.mark.parametrize(
    ("bug", "name"),
    [
        (everything_counts, "h2o"),
        (everything_counts, "a2sf"),
        (one_more_counts, "keyformer"),
        (counted_too_early, "vatp"),
        (across_points, "int8"),
        (up_to_points, "streaming_llm"),
        (up_to_points, "razor"),
        (not_moved, "pyramidkv"),
        (not_moved, "razor"),
        (stamped_by_all, "raas"),
        (trees_for_all, "quest"),
    ],
)
def test_the_proof_finds_what_is_wrong_on_purpose(
    bug: Callable[[pytest.MonkeyPatch], None],
    name: str,
    model: Model,
    plain: Callable[[str], Plain],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = plain(name)
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        assert_drafts_change_nothing(model, name, expected)


def last_outputs(core: EngineCore, requests: Sequence[EngineRequest]) -> dict[str, TokenOutput]:
    for one in requests:
        core.add(one)
    found = {}
    while core.has_work:
        found.update({output.request_id: output for output in core.step()})
    return found


@pytest.mark.parametrize("name", ["h2o", "pyramidkv", "int8"])
def test_usage_says_of_the_cache_what_it_says_without_drafts(
    name: str, model: Model, plain: Callable[[str], Plain]
) -> None:
    alone = last_outputs(core_of(model), traffic(name))
    drafter = Scripted(mixed(plain(name).tokens))
    found = last_outputs(equip(core_of(model), drafter), speculating(traffic(name), 10))
    for key, output in found.items():
        assert output.kv == alone[key].kv
        assert output.speculative is not None
        assert output.speculative.accepted == drafter.accepted[f"{key}/0"]
        assert 0 < output.speculative.steps <= output.speculative.drafted


def test_attention_of_a_draft_that_cannot_be_summed_up_ends_only_those_who_asked(
    model: Model, plain: Callable[[str], Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tokens are chosen by then, and a step that has chosen cannot be run again."""
    expected = plain("h2o").tokens

    def failing(self: DraftedQueries, *arguments: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(DraftedQueries, "count", failing)
    core = equip(core_of(model), Scripted(mixed(expected)))
    answers = run(core, speculating(traffic("h2o"), 10))
    reasons = [answers[f"r{i}", 0].finish_reason for i in range(5)]
    assert reasons == ["length", "error", "error", "error", "length"]
    for i in (0, 4):
        assert answers[f"r{i}", 0].token_ids == expected[f"r{i}", 0]
    assert_nothing_is_left(core)


def test_a_cache_that_shrank_under_pressure_is_kept_in_step_with_drafts(model: Model) -> None:
    """Its plan is not the one that the request came with; a draft across its next point would break the plan."""
    truth = tokens(run(core_of(model), traffic("full")))
    pressure = '{"name": "streaming_llm", "budget": 24, "period": 8}'
    core = equip(core_of(model, num_blocks=30, pressure_policy=pressure), Scripted(mixed(truth)))
    may_shrink = {"name": "full", "may_shrink": True}
    requests = [msgspec.structs.replace(one, kv_policy=may_shrink) for one in speculating(traffic("full"), 10)]
    answers = run(core, requests)
    assert all(len(answer.token_ids) == 40 for answer in answers.values())
    assert core.scheduler.stats().num_shrunk > 0
    assert core.scheduler.stats().compression["streaming_llm"].compactions > core.scheduler.stats().num_shrunk
    assert_nothing_is_left(core)


def test_sums_that_forget_are_the_same_however_their_queries_come(model: Model, plain: Callable[[str], Plain]) -> None:
    with noting() as cuts:
        run(core_of(model, budget=7, prefix_cache=False), traffic("a2sf"))
    assert_same_cuts(cuts, plain("a2sf").cuts)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drafter", sorted(set(drafters.names()) - set(HEAD_DRAFTERS)))  # there is no head here
def test_no_drafter_changes_what_a_policy_gives(name: str, drafter: str, model: Model) -> None:
    """Those that are served, on texts that they can guess, with chunks, hits, preemption, forks and both of them."""
    requests = [
        msgspec.structs.replace(one, num_choices=1 + (i == 3), prompt_token_ids=(one.prompt_token_ids[:9] * 8)[:60])
        for i, one in enumerate(traffic(name, num_tokens=60))
    ]
    with noting() as expected_cuts:
        expected = tokens(run(core_of(model), requests))
    core = core_of(model, num_blocks=70, budget=40, max_num_seqs=8)
    core.speculation._budget = FixedBudget(64)  # guesses whether it pays off or not
    preempting(core, every=23 if name not in ("quest", "raas") else 97)
    choice = {"drafters": [drafter], "max_nodes": 12}
    asking = [msgspec.structs.replace(one, speculative=choice) for one in requests]
    for _ in range(2):
        with noting() as cuts:
            assert tokens(run(core, asking, stagger=1)) == expected
        for found in (cuts, expected_cuts):
            for at in [at for at in found if at[0] == 3]:
                del found[at]  # of one of two choices with one seed
        assert_same_cuts(cuts, expected_cuts)
        assert_nothing_is_left(core)
    assert core.scheduler.stats().spec_steps > 10
