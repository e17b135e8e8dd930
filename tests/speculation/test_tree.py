"""Draft trees: what is sound, what is cut, and what a cut leaves."""

from __future__ import annotations

import numpy as np
import pytest

from engine.speculation.tree import EMPTY, DraftTree

TREE = DraftTree((5, 6, 7, 5, 9), (-1, 0, 1, 0, -1), (0.9, 0.8, 0.7, 0.1, 0.05), ("a", "a", "b", "b", "a"))


def test_places_in_a_tree() -> None:
    assert TREE.depths == (1, 2, 3, 2, 1)
    assert TREE.children == ((0, 4), (1, 3), (2,), (), (), ())
    assert TREE.path(2) == (0, 1, 2)
    assert TREE.path(-1) == ()
    assert TREE.child(-1, 9) == 4
    assert TREE.child(0, 5) == 3
    assert TREE.child(0, 9) == -1
    assert not TREE.is_chain
    assert EMPTY.is_chain
    assert EMPTY.problem() is TREE.problem() is None


def test_a_chain_is_a_tree() -> None:
    chain = DraftTree.chain([3, 4, 5], source="a", values=[0.9, 0.5, 0.5])
    assert chain.parents == (-1, 0, 1)
    assert chain.is_chain
    assert chain.problem() is None


def test_a_cut_keeps_what_is_worth_most_and_every_parent() -> None:
    assert TREE.within(5, 3) is TREE
    assert TREE.within(3, 9).tokens == (5, 6, 7)
    cut = TREE.within(9, 2)
    assert (cut.tokens, cut.parents) == ((5, 6, 5, 9), (-1, 0, 0, -1))
    assert cut.sources == ("a", "a", "b", "a")
    assert TREE.within(0, 9) == TREE.within(9, 0) == EMPTY
    assert TREE.first(2).tokens == (5, 6)


def test_the_first_path_of_a_tree_is_a_chain_and_that_of_a_chain_is_the_chain() -> None:
    path = TREE.first_path()
    assert (path.tokens, path.parents) == ((5, 6, 7), (-1, 0, 1))
    assert path.first_path() is path
    assert EMPTY.first_path() is EMPTY
    forked_late = DraftTree((1, 2, 3, 4), (-1, -1, 1, 0), (0.5,) * 4, ("a",) * 4)
    assert forked_late.first_path().tokens == (1, 4)


def test_equal_values_are_cut_from_the_end() -> None:
    chain = DraftTree.chain(list(range(8)), source="a")
    assert chain.within(3, 9).tokens == (0, 1, 2)


def test_what_was_drawn_loses_its_kind_when_it_is_cut_by_value_and_not_by_depth() -> None:
    q = np.full((3, 4), 0.25, dtype=np.float32)
    drawn = DraftTree((1, 2, 1), (-1, -1, 0), (1.0, 1.0, 1.0), ("a",) * 3, "swor", q)
    assert drawn.problem() is None
    assert drawn.within(2, 9).kind == "delta"
    assert drawn.first(2).kind == drawn.first_path().kind == "delta"
    shallow = drawn.within(9, 1)
    assert shallow.kind == "swor"
    assert shallow.problem() is None


@pytest.mark.parametrize(
    "tree",
    [
        DraftTree((1,), (), (0.5,), ("a",)),
        DraftTree((1, 2), (-1, 1), (0.5, 0.5), ("a", "a")),
        DraftTree((1, 2), (-1, -2), (0.5, 0.5), ("a", "a")),
        DraftTree((-1,), (-1,), (0.5,), ("a",)),
        DraftTree((1, 2), (-1, 0), (0.5, 0.6), ("a", "a")),
        DraftTree((1,), (-1,), (1.5,), ("a",)),
        DraftTree((1,), (-1,), (float("nan"),), ("a",)),
        DraftTree((4, 4), (-1, -1), (0.5, 0.5), ("a", "a")),
        DraftTree((4, 5), (-1, 0), (0.5, 0.5), ("a", "a"), "swor", np.zeros((1, 9), dtype=np.float32)),
        DraftTree((4,), (-1,), (0.5,), ("a",), "iid"),
    ],
)
def test_what_is_not_a_tree_is_told(tree: DraftTree) -> None:
    assert tree.problem() is not None
