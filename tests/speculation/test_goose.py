"""GOOSE's tree is worth at least what either of its sources is worth alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculation.goose import Goose
from engine.speculation.token_recycling import TokenRecyclingOptions
from engine.speculation.tree import DraftTree
from tests.speculation.drafting import candidates, guess, paths


def taught(text: Sequence[int], rows: dict[int, list[int]], cap: int = 8, **options: float) -> tuple[Goose, DraftTree]:
    """A drafter whose table has these rows, and its draft behind the text."""
    drafter = Goose(num_candidates=3, learn_prompt=0, min_value=0.0, **options)
    drafter.admit("request", text, "")
    guess(drafter, text)
    for token, row in rows.items():
        drafter.admit("teacher", [token], "")
        guess(drafter, [token], key="teacher")
        drafter.on_commit("teacher", DraftTree(), (), (0,), candidates([row]))
        drafter.drop("teacher")
    return drafter, guess(drafter, text, cap=cap)


def test_a_strong_match_grows_a_spine_with_branches() -> None:
    text = [*range(20, 40), 1, 2, 3, 4, 5, 6, *range(20, 40)]
    _, tree = taught(text, {39: [9, 8, 7], 1: [6, 5, 4]}, cap=30, doubt=2.0, first=0.3)
    assert tree.tokens[:5] == (1, 2, 3, 4, 5)
    assert tree.parents[:5] == (-1, 0, 1, 2, 3)
    assert {(9,), (1, 2, 3, 4, 5, 6)} <= paths(tree)


def test_without_a_match_it_is_a_candidate_tree() -> None:
    _, tree = taught([1, 2, 3], {3: [4, 5, 6], 4: [7, 8, 9]})
    assert {(4,), (5,), (6,), (4, 7), (4, 8)} <= paths(tree)


def test_a_candidate_that_is_copied_too_confirms_it() -> None:
    text = [1, 2, 5, 9, 1, 2]
    _, alone = taught(text, {}, doubt=2.0)
    rate = TokenRecyclingOptions(num_candidates=3, first=0.5, decay=1.0).rates[1]
    _, confirmed = taught(text, {2: [5, 6]}, cap=20, doubt=2.0, first=0.5, decay=1.0)
    assert alone.values[0] == pytest.approx(0.5)
    assert confirmed.values[0] == pytest.approx(1 - 0.5 * 0.5)
    assert len([path for path in paths(confirmed) if path == (5,)]) == 1
    assert dict(zip(in_order(confirmed), confirmed.values, strict=True))[6,] == pytest.approx(0.25 * rate)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 5), min_size=4, max_size=20),
    st.dictionaries(st.integers(0, 5), st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), max_size=6),
    st.floats(0.1, 10.0),
    st.floats(0.05, 0.9),
)
def test_no_tree_of_one_source_alone_is_worth_more(
    text: list[int], rows: dict[int, list[int]], doubt: float, first: float
) -> None:
    drafter, tree = taught(text, rows, doubt=doubt, first=first)
    whole = guess(drafter, text, cap=60)
    values = dict(zip(in_order(whole), whole.values, strict=True))
    request = drafter._requests["request"].state
    agreeing, place = request.index.match(text)
    spine = tuple(request.index.continuation(text, place, 8)) if agreeing else ()
    chain = [spine[: depth + 1] for depth in range(len(spine))]
    recycled = sorted((path for path in values if path not in chain), key=lambda path: (-values[path], len(path)))
    connected: list[tuple[int, ...]] = []
    for path in recycled:
        if len(path) == 1 or path[:-1] in connected:
            connected.append(path)
    for alone in (chain, connected):
        assert sum(tree.values) >= sum(values.get(path, 0.0) for path in alone[:8]) - 1e-9


def in_order(tree: DraftTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[node] for node in tree.path(last)) for last in range(len(tree))]
