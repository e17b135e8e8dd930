"""Best-first growth yields the best connected tree; renumbering keeps the tree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculation.grow import grow, heavy_first
from engine.speculation.tree import EMPTY
from tests.speculation.drafting import paths

Path = tuple[int, ...]


def chances(path: Path, seed: int, width: int) -> list[tuple[int, float]]:
    """Made-up chances of a node's children, the likeliest first."""
    random = Random(f"{seed}{path}")
    shares = sorted((random.random() for _ in range(width)), reverse=True)
    return [(token, share / (sum(shares) + 0.2)) for token, share in enumerate(shares)]


def children(seed: int, width: int):
    def expand(path: Path) -> Iterator[tuple[int, float, Path]]:
        return ((token, chance, (*path, token)) for token, chance in chances(path, seed, width))

    return expand


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 4))
def test_no_connected_tree_of_that_size_is_worth_more(seed: int, size: int) -> None:
    values: dict[Path, float] = {(): 1.0}
    for depth in range(3):
        for path in [path for path in values if len(path) == depth]:
            for token, chance in chances(path, seed, 2):
                values[*path, token] = values[path] * chance
    nodes = [path for path in values if path]
    best = max(
        sum(values[path] for path in chosen)
        for chosen in combinations(nodes, size)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    tree = grow((), children(seed, 2), source="s", max_nodes=size, max_depth=3)
    assert tree.problem() is None
    assert sum(tree.values) == pytest.approx(best)
    assert all(values[path] == pytest.approx(value) for path, value in zip(in_order(tree), tree.values, strict=True))


def in_order(tree) -> list[Path]:
    return [tuple(tree.tokens[node] for node in tree.path(last)) for last in range(len(tree))]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), max_nodes=st.integers(0, 40), max_depth=st.integers(0, 6), floor=st.floats(0, 0.5))
def test_bounds_hold(seed: int, max_nodes: int, max_depth: int, floor: float) -> None:
    tree = grow((), children(seed, 3), source="s", max_nodes=max_nodes, max_depth=max_depth, min_value=floor)
    assert tree.problem() is None
    assert len(tree) <= max_nodes
    assert max(tree.depths, default=0) <= max_depth
    assert min(tree.values, default=1.0) >= floor


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 30))
def test_renumbering_keeps_the_tree_and_puts_the_heavy_path_first(seed: int, size: int) -> None:
    random = Random(seed)
    parents = [random.randrange(-1, index) for index in range(size)]
    values: list[float] = []
    for parent in parents:
        values.append((values[parent] if parent >= 0 else 1.0) * random.random())
    tokens = list(range(size))  # all different, so that a path names its nodes
    tree = heavy_first(tokens, parents, values, ["s"] * size)
    assert tree.problem() is None
    above: dict[int, Path] = {-1: ()}
    for index, parent in enumerate(parents):
        above[index] = (*above[parent], index)
    assert paths(tree) == {path for node, path in above.items() if node >= 0}
    assert dict(zip(tree.tokens, tree.values, strict=True)) == dict(enumerate(values))
    node = -1
    for index in range(size):  # nodes 0, 1, 2, ... follow the most valuable child while there is one
        below = tree.children[node + 1]
        if not below:
            break
        assert below[0] == index
        assert tree.values[index] == max(tree.values[child] for child in below)
        node = index


def test_nothing_to_expand_is_an_empty_tree() -> None:
    assert grow(None, lambda _: iter(()), source="s", max_nodes=4, max_depth=4) == EMPTY
