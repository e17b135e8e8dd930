"""Lookahead's tries count every path, and a squeeze keeps what occurred more than once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculation.lookahead import Lookahead
from engine.speculation.tree import EMPTY
from engine.speculation.tries import Counted, PromptTrie, Trie
from tests.speculation.drafting import finish, guess, paths

TEXT = st.lists(st.integers(0, 2), max_size=25)


@settings(deadline=None, max_examples=40)
@given(TEXT, st.lists(st.integers(0, 25), max_size=4), st.integers(1, 4))
def test_counts_equal_brute_force_however_the_text_arrives(text: list[int], cuts: list[int], length: int) -> None:
    trie = Trie(length, 1000, 1000)
    start = 0
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        trie.insert(text[:end], start)
        start = end
    expected = Counter(
        tuple(text[begin : begin + size]) for size in range(1, length + 1) for begin in range(len(text) - size + 1)
    )
    assert trie.num_nodes == len(expected)
    for path, count in expected.items():
        node = trie.find(path)
        assert node is not None
        assert node.count == count


def test_a_squeeze_keeps_what_occurred_more_than_once_and_halves_it() -> None:
    trie = Trie(3, max_root_nodes=6, max_nodes=1000)
    text = [1, 2, 3] * 3 + [0, 1, 4, 0, 1, 5, 0, 1, 6]
    trie.insert(text, 0)
    assert trie.num_squeezes > 0
    pair = trie.find([1, 2])
    assert pair is not None
    assert pair.count == pytest.approx(1.5)
    assert trie.find([1, 4]) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(TEXT, max_size=6), st.integers(1, 12), st.integers(1, 40))
def test_bounds_on_nodes_hold_for_any_text(texts: list[list[int]], max_root_nodes: int, max_nodes: int) -> None:
    trie = Trie(4, max_root_nodes, max_nodes)
    for text in texts:
        trie.insert(text, 0)
        assert trie.num_nodes <= max_nodes
        nodes = 0
        for token in range(3):
            size, stack = 0, [root] if (root := trie.find([token])) else []
            while stack:
                node = stack.pop()
                size += 1
                stack.extend(node.children.values())
            assert size <= max_root_nodes
            nodes += size
        assert trie.num_nodes == nodes


def test_two_tokens_are_looked_up_before_one() -> None:
    text = [1, 2, 3, 5, 1, 2, 4, 6] + [9, 2, 7] * 4 + [1, 2]
    assert paths(guess(Lookahead(branch_length=3), text)) == {(3,), (3, 5), (4,), (4, 6)}


def test_one_token_is_looked_up_where_two_find_little() -> None:
    tree = guess(Lookahead(), [2, 5, 6, 7, 8, 9, 3, 1, 2], cap=16)
    assert tree.tokens[:5] == (5, 6, 7, 8, 9)


def test_half_of_the_nodes_are_for_outputs() -> None:
    drafter = Lookahead(branch_length=4)
    for number in range(3):
        finish(drafter, [0], [1, 2, 11, 12, 13, 14], key=str(number))
    prompt = [1, 2, 21, 22, 23, 24, 0, 1, 2, 21, 22, 23, 24, 0, 1, 2]
    tree = guess(drafter, prompt, cap=4)
    assert paths(tree) == {(11,), (11, 12), (21,), (21, 22)}


def test_outputs_stay_within_their_tenant() -> None:
    drafter = Lookahead()
    finish(drafter, [0], [1, 2, 11, 12, 13], tenant="a")
    assert (11, 12, 13) in paths(guess(drafter, [5, 1, 2], num_prompt_tokens=1, tenant="a", key="x"))
    assert guess(drafter, [5, 1, 2], num_prompt_tokens=1, tenant="b", key="y") == EMPTY
    assert guess(drafter, [5, 1, 2], num_prompt_tokens=1, tenant="a", adapter="l", key="z") == EMPTY
    drafter.forget("a")
    assert (11,) not in paths(guess(drafter, [5, 1, 2], num_prompt_tokens=1, tenant="a", key="w"))


@given(TEXT, st.lists(st.integers(0, 2), min_size=1, max_size=2), st.integers(1, 3))
def test_a_prompt_is_counted_like_a_trie_of_it(text: list[int], query: list[int], depth: int) -> None:
    trie = Trie(5, 1000, 1000)
    trie.insert(text, 0)
    assert shape(PromptTrie(text, 1000).find(query), depth) == shape(trie.find(query), depth)


def shape(node: Counted | None, depth: int) -> object:
    if node is None or depth == 0:
        return None if node is None else node.count
    return node.count, {token: shape(child, depth - 1) for token, child in node.children.items()}


def test_of_many_places_in_a_prompt_the_most_recent_count() -> None:
    prompt = [1, 2] * 20 + [1, 3] * 4 + [1]
    assert shape(PromptTrie(prompt, 6).find([1]), 1) == (6, {3: 4, 2: 1})
    assert shape(PromptTrie(prompt, 100).find([1]), 1) == (25, {3: 4, 2: 20})
