"""The eagle drafter without a model: what its contexts hold whatever it was shown, its trees, its memory."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.speculation.allowance import FixedBudget
from engine.speculation.base import NO_TAPS, RequestView, TapRows, Taps, drafters
from engine.speculation.draft_cache import DraftCache
from engine.speculation.eagle import MAX_PENDING, Candidates, Eagle
from engine.speculation.manager import Speculation
from engine.speculation.tree import EMPTY
from tests.speculation.heads import NotingRunner


def attached(runner: NotingRunner, **options: float) -> tuple[Eagle, DraftCache]:
    drafter = drafters.create("eagle", **options)
    assert isinstance(drafter, Eagle)
    cache = DraftCache(runner.num_blocks, runner.block_size)
    drafter.attach(runner, cache)
    return drafter, cache


def rows(first: int, count: int) -> np.ndarray:
    """Hidden states that say which place of the text they are of."""
    return np.arange(first, first + count, dtype=np.float32)[:, None].repeat(4, axis=1)


def shown(num_before: int, root: int, tree_size: int, accepted: tuple[int, ...]) -> TapRows:
    """What a step shows whose root stands at this place; rows of nodes that were not accepted are of no place."""
    hidden = np.full((tree_size + 1, 4), -7.0, dtype=np.float32)
    hidden[0] = root
    for depth, node in enumerate(accepted, start=1):
        hidden[node + 1] = root + depth
    return TapRows(hidden=hidden, hidden_before=rows(root - num_before, num_before))


@pytest.mark.parametrize("seed", range(12))
def test_contexts_hold_what_was_shown_and_trees_are_sound(seed: int) -> None:
    """Requests side by side in too small a cache; steps that show nothing, forced tokens, drafts merged with others."""
    random = Random(seed)
    runner = NotingRunner(num_blocks=random.choice([8, 14, 64]), max_len=random.choice([30, 200]))
    drafter, cache = attached(runner, width=random.randint(1, 4), max_depth=random.randint(1, 6))
    texts = {f"r{i}": [random.randrange(50) for _ in range(random.randint(1, 40))] for i in range(4)}
    prompts = {key: len(text) for key, text in texts.items()}
    for key, text in texts.items():
        drafter.admit(key, text, "")
        drafter.on_commit(key, EMPTY, (), [7], shown(random.randint(0, len(text) - 1), len(text) - 1, 0, ()))
        text.append(7)
    num_drafted = 0
    for _ in range(40):
        asking = [key for key in texts if random.random() < 0.8]
        caps = [random.randrange(9) for _ in asking]
        depths = [random.randrange(8) for _ in asking]
        views = [
            RequestView(key, texts[key], prompts[key], temperature=0.5 * (i % 2), max_depth=depths[i])
            for i, key in enumerate(asking)
        ]
        trees = drafter.propose(views, caps)
        drafted = [key for key, tree in zip(asking, trees, strict=True) if tree.tokens]
        for key, context in zip(drafted, runner.contexts if drafted else (), strict=True):
            text = texts[key]
            first = len(text) - 1 - len(context)
            assert context == [(text[place + 1], float(place)) for place in range(first, len(text) - 1)]
            num_drafted += 1
        for tree, cap, depth in zip(trees, caps, depths, strict=True):
            assert tree.problem() is None
            assert len(tree) <= cap
            assert max(tree.depths, default=0) <= min(depth, drafter.options.max_depth)
            assert set(tree.sources) <= {"eagle"}
        for key in texts:
            tree = dict(zip(asking, trees, strict=True)).get(key, EMPTY)
            accepted = tree.path(random.randint(-1, len(tree) - 1)) if tree.tokens else ()
            forced = random.choice([0, 0, 0, 3])
            new = [tree.tokens[node] for node in accepted] + [random.randrange(50) for _ in range(1 + forced)]
            root = len(texts[key]) - 1
            before = random.choice([0, 0, min(root, 5)])
            taps = NO_TAPS if random.random() < 0.15 else shown(before, root, len(tree), tuple(accepted))
            drafter.on_commit(key, tree, accepted, new, taps)
            texts[key] += new
        if random.random() < 0.2:
            gone = random.choice(list(texts))
            drafter.drop(gone)
            del texts[gone]
            texts[gone] = [1, 2, 3]
            prompts[gone] = 3
            drafter.admit(gone, texts[gone], "")
    assert num_drafted > 5
    for key in texts:
        drafter.drop(key)
    assert cache.pool.counts.free == runner.num_blocks - 1
    assert drafter.state_bytes == runner.num_bytes


def test_hidden_states_that_nobody_asks_for_are_forgotten() -> None:
    drafter, _ = attached(NotingRunner(num_blocks=200, max_len=1500))
    text = [5] * 10
    drafter.admit("r", text, "")
    for _ in range(MAX_PENDING + 300):
        drafter.on_commit("r", EMPTY, (), [5], shown(0, len(text) - 1, 0, ()))
        text.append(5)
    assert drafter.state_bytes <= 1000 + MAX_PENDING * 4 * 4
    (tree,) = drafter.propose([RequestView("r", text, 10)], [4])
    assert tree.tokens, "what is left does for a guess"


def test_a_fork_begins_its_own_context_with_its_own_first_step() -> None:
    runner = NotingRunner()
    drafter, _ = attached(runner)
    drafter.admit("a", [1, 2, 3], "")
    drafter.fork("a", "b")
    drafter.on_commit("b", EMPTY, (), [4], shown(0, 2, 0, ()))
    (tree,) = drafter.propose([RequestView("b", [1, 2, 3, 4], 3)], [4])
    assert tree.tokens
    assert runner.contexts == [[(4, 2.0)]]


def test_a_tree_is_the_chain_with_the_best_of_the_others() -> None:
    drafter, _ = attached(NotingRunner(), min_value=0.1)
    levels = [
        Candidates([1, 2, 3], [math.log(0.6), math.log(0.3), math.log(0.01)]),
        Candidates([4, 5, 6], [math.log(0.5), math.log(0.4), math.log(0.05)]),
    ]
    tree = drafter._tree(levels, 8)
    assert tree.tokens == (1, 4, 5, 2)
    assert tree.parents == (-1, 0, 0, -1)
    assert tree.values == pytest.approx((0.6, 0.3, 0.24, 0.3))
    assert drafter._tree(levels, 2).tokens in {(1, 2), (1, 4)}
    assert drafter._tree(levels, 1).tokens == (1,)


@pytest.mark.parametrize("options", [{"max_depth": 0}, {"width": 0}, {"min_value": 2.0}, {"depth": 3}])
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="drafter eagle"):
        drafters.create("eagle", **options)


def test_a_drafter_that_needs_what_no_model_shows_is_refused_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Layered(Eagle):
        name = "layered"
        needs = Taps(hidden_layers=(3, 7))

    speculation = Speculation(lambda name: Layered(), FixedBudget(8), 300)
    assert speculation._drafter("layered") is None
    assert "needs the residual stream behind layers (3, 7); no model shows it" in caplog.text
