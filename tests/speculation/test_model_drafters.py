"""Drafters on a language model: trees, cache and laws, on a table in place of the model."""

from __future__ import annotations

import itertools
from collections import Counter
from heapq import heappop, heappush

import numpy as np
import pytest

from engine import noise
from engine.errors import ConfigError
from engine.speculation import draft_model, dyspec, multi_draft, rsd, sequoia, spectr
from engine.speculation.base import NO_TAPS, RequestView, drafters
from engine.speculation.draft_cache import DraftCache
from engine.speculation.draft_rows import Draw
from engine.speculation.model_drafter import Level, ModelDrafter
from engine.speculation.rsd import StochasticBeam, conditioned
from engine.speculation.sequoia import best_shape
from engine.speculation.tree import DraftTree
from engine.speculation.verifiers import KeyedChance, verify
from tests.speculation.fake_draft_model import FakeDraftRunner
from tests.speculation.test_verifiers import emitted, fit
from tests.speculation.toys import Nucleus, Table, context_of, sequence_law

NAMES = ["draft_model", "dyspec", "rsd_c", "rsd_s", "sequoia", "spectr", "multi_draft"]
MODULES = (draft_model, dyspec, multi_draft, rsd, sequoia, spectr)  # imported: they register themselves
VOCABULARY = 11


def drafter_with(
    name: str, table: Table | None = None, *, num_blocks: int = 256, order: int = 1000, **options: float
) -> tuple[ModelDrafter, FakeDraftRunner, DraftCache]:
    runner = FakeDraftRunner(table or Table(VOCABULARY, 3), num_blocks=num_blocks, order=order)
    cache = DraftCache(runner.num_blocks, runner.block_size)
    drafter = drafters.create(name, **options)
    assert isinstance(drafter, ModelDrafter)
    drafter.attach(runner, cache)
    return drafter, runner, cache


def view(key: str, tokens: list[int], *, temperature: float = 0.0, samples: bool = False, **given: int) -> RequestView:
    return RequestView(key, tokens, min(4, len(tokens)), temperature=temperature, samples=samples, **given)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("temperature", "samples"), [(0.0, False), (0.0, True), (0.8, False), (0.8, True)])
def test_trees_are_sound_and_within_their_bounds(name: str, temperature: float, samples: bool) -> None:
    drafter, _, _ = drafter_with(name)
    rng = np.random.default_rng(1)
    for cap, depth in [(1, 9), (2, 9), (5, 2), (8, 3), (16, 1), (24, 30), (0, 5), (5, 0)]:
        tokens = rng.integers(0, VOCABULARY, size=7).tolist()
        given = view(f"{cap}-{depth}", tokens, temperature=temperature, samples=samples, seed=cap, max_depth=depth)
        (tree,) = drafter.propose([given], [cap])
        assert tree.problem() is None
        assert len(tree) <= cap
        assert max(tree.depths, default=0) <= depth
        assert bool(len(tree)) == (cap > 0 and depth > 0)
        is_sampled = samples and temperature > 0.0 and len(tree) > 0
        assert tree.kind == (drafter.kind if is_sampled else "delta")
        assert set(tree.sources) <= {name}


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_q_are_the_models_own_after_each_inner_node(name: str) -> None:
    drafter, runner, _ = drafter_with(name)
    tokens = [1, 2, 3, 4, 5]
    (tree,) = drafter.propose([view("a", tokens, temperature=1.0, samples=True)], [12])
    assert tree.q is not None
    for parent in set(tree.parents):
        law = runner.context_law([*tokens, *context_of(tree, parent)])
        np.testing.assert_allclose(tree.q[parent + 1], law, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("samples", [False, True])
def test_guesses_do_not_depend_on_what_was_drafted_accepted_or_batched_before(name: str, samples: bool) -> None:
    """Every guess equals that of a drafter which has never seen the request: the cache holds the text and no more."""
    rng = np.random.default_rng(7)
    drafter, _, cache = drafter_with(name)
    texts = {key: rng.integers(0, VOCABULARY, size=size).tolist() for key, size in (("a", 3), ("b", 8), ("c", 21))}
    for step in range(25):
        keys = [key for key in texts if rng.random() < 0.8]
        views = [view(key, texts[key], temperature=0.9, samples=samples, seed=5) for key in keys]
        caps = [int(rng.integers(0, 13)) for _ in keys]
        trees = drafter.propose(views, caps)
        for given, cap, tree in zip(views, caps, trees, strict=True):
            if step % 5 == 0 and name != "sequoia":  # which learns its shape
                fresh, _, _ = drafter_with(name)
                assert fresh.propose([given], [cap]) == [tree]
        for key, tree in zip(keys, trees, strict=True):
            node = int(rng.integers(-1, len(tree))) if len(tree) else -1
            path = tree.path(node)
            new = [*(tree.tokens[i] for i in path), int(rng.integers(0, VOCABULARY))]
            texts[key] += new
            if rng.random() < 0.9:  # and when it is not told, it finds out
                drafter.on_commit(key, tree, path, new, NO_TAPS)
        assert cache.pool.violations() == []
    for key in texts:
        drafter.drop(key)
    assert cache.pool.counts.free == cache.pool.num_blocks - 1
    assert cache.num_texts == 0


def test_a_draft_that_was_accepted_whole_is_followed_by_a_pass_of_two_tokens() -> None:
    drafter, runner, _ = drafter_with("draft_model", min_value=0.0)
    tokens = [1, 2, 3, 4, 5]
    (tree,) = drafter.propose([view("a", tokens)], [4])
    assert runner.num_computed == [5, 1, 1, 1]
    runner.num_computed.clear()
    drafter.on_commit("a", tree, (0, 1, 2, 3), (*tree.tokens, 9), NO_TAPS)
    tokens += [*tree.tokens, 9]
    drafter.propose([view("a", tokens)], [1])
    assert runner.num_computed == [2]


@pytest.mark.parametrize("num_accepted", [0, 1, 2, 3])
def test_after_a_partial_acceptance_only_the_targets_own_token_is_computed(num_accepted: int) -> None:
    drafter, runner, _ = drafter_with("draft_model", min_value=0.0)
    tokens = [1, 2, 3, 4, 5]
    (tree,) = drafter.propose([view("a", tokens)], [4])
    runner.num_computed.clear()
    other = (tree.tokens[num_accepted] + 1) % VOCABULARY
    new = (*tree.tokens[:num_accepted], other)
    drafter.on_commit("a", tree, tuple(range(num_accepted)), new, NO_TAPS)
    drafter.propose([view("a", [*tokens, *new])], [1])
    assert runner.num_computed == [1]


@pytest.mark.parametrize("name", NAMES)
def test_a_request_may_be_drafted_for_twice_without_a_step_in_between(name: str) -> None:
    drafter, runner, _ = drafter_with(name)
    given = view("a", [1, 2, 3, 4, 5, 6, 7, 8], temperature=0.7, samples=True)
    first = drafter.propose([given], [8])
    runner.num_computed.clear()
    assert drafter.propose([given], [8]) == first
    assert runner.num_computed[0] == 1


def test_the_path_that_was_accepted_is_kept_whichever_branch_it_was() -> None:
    drafter, runner, _ = drafter_with("rsd_c", root_width=3, width=2, wide_depth=2, max_depth=3)
    tokens = [1, 2, 3, 4, 5, 6]
    (tree,) = drafter.propose([view("a", tokens)], [64])
    leaves = [node for node in range(len(tree)) if node not in tree.parents]
    for leaf in leaves:
        fresh, runner, _ = drafter_with("rsd_c", root_width=3, width=2, wide_depth=2, max_depth=3)
        fresh.propose([view("a", tokens)], [64])
        runner.num_computed.clear()
        new = [*(tree.tokens[node] for node in tree.path(leaf)), 0]
        fresh.on_commit("a", tree, tree.path(leaf), new, NO_TAPS)
        fresh.propose([view("a", [*tokens, *new])], [1])
        assert runner.num_computed == [2]


def test_requests_that_do_not_fit_are_left_out_and_idle_ones_make_room() -> None:
    drafter, runner, cache = drafter_with("draft_model", num_blocks=9, min_value=0.0)  # 8 blocks of 4
    long, short = list(range(10)) * 2, [1, 2, 3]
    assert len(drafter.propose([view("long", long)], [4])[0]) == 4
    drafter.drop("nobody")
    trees = drafter.propose([view("short", short), view("other", long)], [4, 4])
    assert len(trees[0]) == 4
    assert len(trees[1]) == 4
    assert cache.find("draft_model:long") is None  # it had to go: nothing of it was asked for
    too_long = [1] * 33
    assert drafter.propose([view("huge", too_long)], [4])[0].tokens == ()
    assert len(drafter.propose([view("long", long)], [4])[0]) == 4
    for key in ("long", "short", "other", "huge"):
        drafter.drop(key)
    assert cache.pool.counts.free == 8
    runner.max_len = 22
    assert len(drafter.propose([view("near the end", long)], [4])[0]) == 2


def test_trees_are_smaller_where_branches_find_no_room() -> None:
    drafter, _, cache = drafter_with("rsd_c", num_blocks=5, root_width=4, width=1, wide_depth=1, max_depth=3)
    (tree,) = drafter.propose([view("a", [1, 2, 3, 4, 5, 6, 7], temperature=1.0, samples=True)], [12])
    assert tree.problem() is None
    assert 4 <= len(tree) < 12
    drafter.drop("a")
    assert cache.pool.counts.free == 4


def test_forgetting_and_recomputing_gives_the_same_guesses() -> None:
    drafter, _, _ = drafter_with("dyspec")
    given = view("a", [1, 2, 3, 4, 5, 6], temperature=0.7, samples=True, seed=3)
    first = drafter.propose([given], [10])
    drafter.drop("a")
    assert drafter.propose([given], [10]) == first


def test_unknown_and_impossible_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_depth is 0; need an integer from 1 to 64"):
        drafters.create("draft_model", max_depth=0)
    with pytest.raises(ConfigError, match="drafter rsd_s"):
        drafters.create("rsd_s", breadth=3)


# What is guessed -------------------------------------------------------------------------------------------------


def test_a_greedy_chain_is_what_the_model_would_say() -> None:
    drafter, runner, _ = drafter_with("draft_model", min_value=0.0)
    tokens = [3, 1, 4, 1, 5]
    (tree,) = drafter.propose([view("a", tokens)], [5])
    text = list(tokens)
    for token in tree.tokens:
        assert token == runner.context_law(text).argmax()
        text.append(token)


def test_a_chain_that_is_unlikely_to_hold_is_not_continued() -> None:
    drafter, _, _ = drafter_with("draft_model", min_value=0.2)
    (tree,) = drafter.propose([view("a", [3, 1, 4, 1, 5])], [6])
    assert all(value >= 0.2 for value in tree.values[:-1])
    assert len(tree) < 6


def test_the_walks_chain_uses_the_targets_noise_so_that_equal_models_agree_on_every_token() -> None:
    """The same seed and place: the drafter draws what a target with its distribution would."""
    drafter, runner, _ = drafter_with("draft_model", min_value=0.0)
    tokens = [3, 1, 4, 1, 5]
    given = view("a", tokens, temperature=1.0, seed=77, choice=2)
    (tree,) = drafter.propose([given], [6])
    text = list(tokens)
    for depth, token in enumerate(tree.tokens):
        key = noise.row_key(77, 2, len(tokens) - given.num_prompt_tokens + depth)
        gumbel = np.random.default_rng(key % 2**63).gumbel(size=VOCABULARY)
        assert token == (np.log(runner.context_law(text)) + gumbel).argmax()
        text.append(token)


def test_dyspec_takes_the_slots_that_drawing_one_at_a_time_would_take() -> None:
    max_nodes, max_depth = 14, 4
    drafter, runner, _ = drafter_with("dyspec", max_depth=max_depth, threshold=0.0)
    tokens = [3, 1, 4, 1, 5]
    (tree,) = drafter.propose([view("a", tokens)], [max_nodes])
    taken = []
    # heap of (-value, path of the parent, rank among siblings, mass left): greedy, so draws are the likeliest tokens
    heap: list[tuple[float, tuple[int, ...], int, float]] = [(-1.0, (), 0, 1.0)]
    while len(taken) < max_nodes:
        negated, parent, rank, mass = heappop(heap)
        law = runner.context_law([*tokens, *parent])
        token = int(np.argsort(-law, kind="stable")[rank])
        share = min(1.0, law[token] / mass)
        path = (*parent, token)
        taken.append(path)
        heappush(heap, (negated * (1.0 - share), parent, rank + 1, mass - law[token]))
        if len(path) < max_depth:
            heappush(heap, (negated * share, path, 0, 1.0))
    assert {context_of(tree, node) for node in range(len(tree))} == set(taken)


def shapes(num_nodes: int, max_depth: int) -> list[tuple]:
    """Every ordered tree with so many nodes, its root counted, as nested tuples."""
    if num_nodes == 1:
        return [()]
    if max_depth == 0:
        return []
    found = []
    for first in range(1, num_nodes):
        for child in shapes(first, max_depth - 1):
            for rest in shapes(num_nodes - first, max_depth):
                found.append((child, *rest))  # noqa: PERF401 three loops read better than one expression
    return found


def expected_tokens(shape: tuple, rates: tuple[float, ...]) -> float:
    total, left = 1.0, 1.0
    for rate, child in zip(rates, shape, strict=False):
        total += left * rate * expected_tokens(child, rates)
        left *= 1.0 - rate
    return total


@pytest.mark.parametrize("rates", [(0.6, 0.3, 0.15), (0.5, 0.5, 0.5), (0.9, 0.1, 0.0), (0.2, 0.7, 0.6)])
def test_sequoias_shape_is_the_best_of_all_trees(rates: tuple[float, ...]) -> None:
    for num_nodes, max_depth in itertools.product(range(1, 8), (1, 2, 4, 8)):
        every = [shape for count in range(1, num_nodes + 2) for shape in shapes(count, max_depth)]
        best = max(expected_tokens(shape, rates) for shape in every if is_within(shape, len(rates)))
        found = best_shape(rates, num_nodes, max_depth)
        assert found.value == pytest.approx(best, abs=1e-12)
        assert sum(found.num_children) <= num_nodes


def is_within(shape: tuple, width: int) -> bool:
    return len(shape) <= width and all(is_within(child, width) for child in shape)


def test_sequoia_draws_its_shape_and_follows_what_is_accepted() -> None:
    drafter, _, _ = drafter_with("sequoia")
    assert isinstance(drafter, sequoia.Sequoia)
    given = view("a", [1, 2, 3, 4, 5])
    (tree,) = drafter.propose([given], [12])
    assert sorted(map(len, tree.children)) == sorted(best_shape(drafter.rates, 12, 8).num_children)
    assumed = drafter.rates
    chain = DraftTree.chain((1, 2, 3, 4), source="sequoia")
    for _ in range(400):
        drafter.on_commit("b", chain, (0, 1, 2, 3), (1, 2, 3, 4, 5), NO_TAPS)
    assert drafter.rates[0] > 0.9 > assumed[0]
    (longer,) = drafter.propose([given], [12])
    assert max(longer.depths) > max(tree.depths)


def test_conditioned_scores_keep_the_best_childs_at_its_parents_and_the_order_of_the_rest() -> None:
    rng = np.random.default_rng(0)
    raw = np.sort(rng.gumbel(size=50))[::-1] * 5
    scores = [conditioned(-3.0, float(raw[0]), float(value)) for value in raw]
    assert scores[0] == -3.0
    assert scores == sorted(scores, reverse=True)
    exact = [-np.log(np.exp(3.0) - np.exp(-raw[0]) + np.exp(-value)) for value in raw[:5]]
    np.testing.assert_allclose(scores[:5], exact, atol=1e-9)


def test_the_beam_holds_sequences_in_the_law_of_drawing_without_replacement() -> None:
    """Kool et al.: the two best of a stochastic beam are an ordered sample of whole sequences without replacement."""
    table = Table(3, 8)
    law = sequence_law(table, 2)
    expected = {
        (first, second): p * law[second] / (1.0 - p) for first, p in law.items() for second in law if first != second
    }
    drafter, _, _ = drafter_with("rsd_s", table, width=2, max_depth=2)
    counts: Counter = Counter()
    total = 4_000
    for seed in range(total):
        growth_view = RequestView("a", [], 0, temperature=1.0, samples=True, seed=seed)
        growth = drafter.start(growth_view, 4, 2, "swor")
        pairs = beam_of(growth, table)
        counts[pairs] += 1
    assert fit(counts, expected) > 1e-4


def beam_of(growth: object, table: Table) -> tuple:
    """Grows on the table directly; the two sequences of the last level, the best first."""
    assert isinstance(growth, StochasticBeam)
    open_nodes = [-1]

    def path(node: int) -> tuple[int, ...]:
        return () if node < 0 else (*path(growth.parents[node]), growth.tokens[node])

    last: list[int] = []
    while open_nodes:
        runner = FakeDraftRunner(table, order=10)
        laws = [table.law(path(node)) for node in open_nodes]
        draws = [Draw(i, 1.0, growth.key(node, 0)) for i, node in enumerate(open_nodes)]
        picks = runner.pick(laws, draws, growth.num_candidates)
        before = len(growth.tokens)
        open_nodes = growth.grow([Level(node, [pick]) for node, pick in zip(open_nodes, picks, strict=True)])
        last = list(range(before, len(growth.tokens)))
    first, second = sorted(last, key=lambda node: -growth.scores[node])
    return path(first), path(second)


# Sampled drafts and the rules that judge them ---------------------------------------------------------------------

CASES = [
    ("draft_model", "block", {"min_value": 0.3}),
    ("draft_model", "rejection", {"min_value": 0.0}),
    ("rsd_c", "rrs", {"root_width": 2, "width": 2, "max_depth": 2}),
    ("rsd_s", "rrs", {"width": 2, "max_depth": 3}),
    ("dyspec", "rrs", {"max_depth": 3, "threshold": 0.05}),
    ("sequoia", "rrs", {"max_depth": 2}),
    ("spectr", "k_sequential", {"num_chains": 2, "max_depth": 2}),
    ("multi_draft", "multi_draft", {"num_chains": 2, "max_depth": 2}),
]


def sampled_fit(name: str, rule: str, options: dict[str, float], num_samples: int) -> float:
    """Whole generations by steps of drafting and judging, with the noise that a server uses."""
    target = Nucleus(Table(4, 41), temperature=0.9, top_p=0.9)
    base = Table(4, 42, noise=0.8, base=Table(4, 41))
    drafter, _, _ = drafter_with(name, base, order=3, **options)
    counts: Counter = Counter()
    for seed in range(num_samples):
        text: list[int] = []
        prompt = [1, 1, 1]
        while len(text) < 3:
            tokens = prompt + text
            given = RequestView("r", tokens, len(prompt), temperature=0.8, samples=True, seed=seed)
            (tree,) = drafter.propose([given], [6])
            chance = KeyedChance(seed, 0, len(text))
            verdict = verify(rule, tree, lambda node: target.law((*text, *context_of(tree, node))), chance)  # noqa: B023
            new = emitted(tree, verdict)
            drafter.on_commit("r", tree, verdict.path, new, NO_TAPS)
            text += new
        drafter.drop("r")
        counts[tuple(text[:3])] += 1
    return fit(counts, sequence_law(target, 3))


@pytest.mark.parametrize(("name", "rule", "options"), CASES)
def test_sampled_drafts_leave_the_target_as_it_is(name: str, rule: str, options: dict[str, float]) -> None:
    assert sampled_fit(name, rule, options, 150 if rule == "multi_draft" else 500) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule", "options"), CASES)
def test_many_sampled_drafts_leave_the_target_as_it_is(name: str, rule: str, options: dict[str, float]) -> None:
    assert sampled_fit(name, rule, options, 5_000 if rule == "multi_draft" else 20_000) > 1e-4
