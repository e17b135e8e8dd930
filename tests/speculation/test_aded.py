"""ADED adapts its table as told, and the heap finds at least what the tree search finds."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculation.aded import Aded, AdedOptions, PairTable
from engine.speculation.tree import EMPTY
from tests.speculation.drafting import guess

TEXT = st.lists(st.integers(0, 3), min_size=3, max_size=60)


def test_triples_gain_a_step_each_up_to_the_cap() -> None:
    table = PairTable(AdedOptions(step=0.04, max_weight=0.1))
    table.learn([1, 2, 3, 1, 2, 3, 1, 2, 4, 1, 2, 3])
    assert table.successors((1, 2)) == pytest.approx({3: 0.1, 4: 0.04})
    assert table.successors((2, 3)) == pytest.approx({1: 0.08})


def test_the_window_is_strengthened_before_every_draft() -> None:
    drafter = Aded(learn_prompt=0, window=4, max_weight=100.0, min_value=0.0)
    text = [9, 9, 9, 1, 2, 3, 1, 2]
    first = guess(drafter, text)
    second = guess(drafter, text)
    assert first == EMPTY  # of the window 2 3 1 2 no triple begins with 1 2
    assert second == EMPTY
    text += [3]
    # 2 3 -> 1 was in the window twice
    assert guess(drafter, text).values[0] == pytest.approx(0.08 / (0.08 + 0.04))


def test_each_pair_keeps_its_best_successors() -> None:
    table = PairTable(AdedOptions(successors=2))
    table.learn([1, 1, 5, 1, 1, 5, 1, 1, 6, 1, 1, 7])
    assert set(table.successors((1, 1))) == {5, 7}


@given(st.lists(st.lists(st.integers(0, 30), max_size=30), max_size=8), st.integers(1, 20), st.integers(1, 4))
def test_table_stays_within_its_bounds(texts: list[list[int]], max_pairs: int, successors: int) -> None:
    table, counted = PairTable(AdedOptions(max_pairs=max_pairs, successors=successors)), set()
    for text in texts:
        table.learn(text)
        counted.update(pairwise(text))
    kept = [table.successors(pair) for pair in counted if table.successors(pair)]
    assert len(kept) <= max_pairs
    assert all(len(weights) <= successors for weights in kept)
    empty = PairTable(AdedOptions())
    empty.learn([0, 1, 2])
    pair_bytes = empty.num_bytes
    assert (table.num_bytes == 0) == (not kept)
    assert table.num_bytes <= pair_bytes * sum(map(len, kept))


@settings(deadline=None, max_examples=25)
@given(TEXT, st.integers(0, 99))
def test_heap_promises_at_least_as_much_as_the_search_with_as_many_nodes(text: list[int], seed: int) -> None:
    searched = guess(Aded(simulations=40, min_value=0.0), text, cap=24)
    found = guess(Aded(min_value=0.0), text, cap=max(1, len(searched)))
    assert searched.problem() is None
    assert sum(found.values) >= sum(searched.values) - 1e-9


def test_the_search_depends_on_the_request_alone() -> None:
    random = Random(3)
    text = [random.randrange(3) for _ in range(60)]
    assert guess(Aded(simulations=30), text) == guess(Aded(simulations=30), text)


def test_what_a_tenant_teaches_stays_with_it() -> None:
    drafter = Aded()
    assert guess(drafter, [1, 2, 3, 1, 2], tenant="a", key="a").tokens[0] == 3
    assert guess(drafter, [1, 2], tenant="b", key="b") == EMPTY
    drafter.forget("a")
    assert guess(drafter, [1, 2], tenant="a", key="c") == EMPTY
