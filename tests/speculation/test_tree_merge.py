"""A merged tree holds all its parts, and its values are those of independent sources."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculation.grow import heavy_first
from engine.speculation.tree import EMPTY, DraftTree
from engine.speculation.tree_merge import merge
from tests.speculation.drafting import paths


def random_tree(seed: int, source: str) -> DraftTree:
    random = Random(seed)
    tokens, parents, values, taken = [], [], [], set()
    for _ in range(random.randrange(12)):
        parent, token = random.randrange(-1, len(tokens)), random.randrange(4)
        if (parent, token) not in taken:
            taken.add((parent, token))
            above = values[parent] if parent >= 0 else 1.0
            siblings = sum(value for value, at in zip(values, parents, strict=True) if at == parent)
            tokens.append(token)
            parents.append(parent)
            values.append(max(0.0, above - siblings) * random.random())
    return heavy_first(tokens, parents, values, [source] * len(tokens))


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=4))
def test_union_holds_every_path_once_and_is_sound(seeds: list[int]) -> None:
    trees = [random_tree(seed, str(number)) for number, seed in enumerate(seeds)]
    merged = merge(trees)
    assert merged.tree.problem() is None
    assert paths(merged.tree) == set().union(*map(paths, trees))
    assert merged.num_duplicates == sum(map(len, trees)) - len(merged.tree)
    below = {-1: 1.0, **dict(enumerate(merged.tree.values))}
    for parent, children in enumerate(merged.tree.children):
        assert sum(merged.tree.values[child] for child in children) <= below[parent - 1] + 1e-9


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=4), st.integers(0, 12))
def test_a_cut_keeps_the_most_valuable_nodes(seeds: list[int], max_nodes: int) -> None:
    trees = [random_tree(seed, str(number)) for number, seed in enumerate(seeds)]
    whole, cut = merge(trees).tree, merge(trees, max_nodes).tree
    assert cut.problem() is None
    assert len(cut) == min(max_nodes, len(whole))
    assert sum(cut.values) == pytest.approx(sum(sorted(whole.values, reverse=True)[:max_nodes]))


def test_a_shared_node_is_wrong_only_if_all_sources_are() -> None:
    first = DraftTree.chain([1, 2], source="a", values=[0.5, 0.4])
    second = DraftTree((1, 3), (-1, 0), (0.6, 0.1), ("b", "b"))
    merged = merge([first, second]).tree
    assert merged.tokens == (1, 2, 3)
    assert merged.values == pytest.approx([1 - 0.5 * 0.4, 0.4, 0.1])
    assert merged.sources == ("b", "a", "b")


def test_siblings_share_what_their_parent_has() -> None:
    first = DraftTree.chain([1, 2], source="a", values=[0.9, 0.8])
    second = DraftTree.chain([3], source="b", values=[0.6])
    assert merge([first, second]).tree.values == pytest.approx([0.6, 0.6, 0.4])


def test_sampled_trees_are_no_sample_after_a_merge_but_alone_stay_one() -> None:
    q = np.full((2, 4), 0.25, dtype=np.float32)
    sampled = DraftTree((1, 2), (-1, 0), (0.5, 0.2), ("s", "s"), "swor", q)
    assert merge([EMPTY, sampled]).tree is sampled
    merged = merge([sampled, DraftTree.chain([3], source="n", values=[0.1])]).tree
    assert merged.kind == "delta"
    assert merged.q is None


def test_repeated_draws_of_one_tree_count_once() -> None:
    q = np.full((1, 4), 0.25, dtype=np.float32)
    drawn = DraftTree((1, 1), (-1, -1), (0.5, 0.3), ("s", "s"), "iid", q)
    merged = merge([drawn, DraftTree.chain([2], source="n", values=[0.1])])
    assert merged.tree.values == pytest.approx([0.5, 0.1])
    assert merged.num_duplicates == 1


def test_nothing_merged_is_empty() -> None:
    assert merge([]).tree == EMPTY
    assert merge([EMPTY, EMPTY]).tree == EMPTY
    assert merge([DraftTree.chain([1], source="a")], 0).tree == EMPTY
