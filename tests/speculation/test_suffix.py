"""Suffix decoding counts exactly, scores as computed by hand, and keeps its memory bound."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.speculation.occurrences import Occurrences, common_end
from engine.speculation.suffix import Suffix, best_possible
from engine.speculation.tree import EMPTY
from tests.speculation.drafting import finish, guess, paths

APPENDS = st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 2), max_size=8)), max_size=12)
REMOVALS = st.lists(st.integers(0, 4), max_size=4)


@settings(deadline=None, max_examples=40)
@given(APPENDS, REMOVALS, APPENDS)
def test_counts_equal_brute_force_after_appends_and_removals(first, removed, second) -> None:
    index, texts = Occurrences((1, 3), max_hits=1000), {}
    for batch in (first, second):
        for sequence, tokens in batch:
            index.append(sequence, tokens)
            texts.setdefault(sequence, []).extend(tokens)
        for sequence in removed:
            if sequence in index:
                index.remove(sequence)
                del texts[sequence]
        removed = []
    for length in range(1, 6):
        for number in range(3 ** min(length, 3)):
            pattern = [number // 3**digit % 3 for digit in range(length)]
            expected = sum(
                text[start : start + length] == pattern
                for text in texts.values()
                for start in range(len(text) - length)
            )
            assert index.count(pattern) == expected


@settings(deadline=None, max_examples=40)
@given(APPENDS, st.lists(st.integers(0, 2), min_size=1, max_size=10))
def test_hits_are_all_occurrences_with_their_agreement(appends, text) -> None:
    index, texts = Occurrences((1, 3), max_hits=1000), {}
    for sequence, tokens in appends:
        index.append(sequence, tokens)
        texts.setdefault(sequence, []).extend(tokens)
    expected = []
    for tokens in texts.values():
        for end in range(1, len(tokens)):
            agreeing = next((n for n in range(min(end, len(text))) if tokens[end - 1 - n] != text[-1 - n]), None)
            agreeing = min(end, len(text)) if agreeing is None else agreeing
            if agreeing:
                expected.append((agreeing, end, tuple(tokens)))
    found = index.find(text)
    assert sorted((hit.length, hit.end, tuple(hit.tokens)) for hit in found) == sorted(expected)
    assert [hit.length for hit in found] == sorted((hit.length for hit in found), reverse=True)


@settings(deadline=None, max_examples=40)
@given(APPENDS)
def test_bytes_return_to_zero_when_all_sequences_go(appends) -> None:
    index = Occurrences((1, 3))
    for sequence, tokens in appends:
        index.append(sequence, tokens)
    for sequence in {sequence for sequence, _ in appends}:
        index.remove(sequence)
    assert index.num_bytes == 0


def test_values_are_products_of_relative_counts() -> None:
    # behind "1 2": 3 twice, 4 once; behind "1 2 3": 5 and 6
    text = [1, 2, 3, 5, 8, 1, 2, 3, 6, 8, 1, 2, 4, 9, 1, 2]
    tree = guess(Suffix(min_match=2, doubt=2.0, min_probability=0.0, max_tokens=4, factor=10, shared_mib=0), text)
    three, four = 2 / (3 + 2 / 2), 1 / (3 + 2 / 2)
    values = {path: tree.values[node] for node, path in enumerate(in_order(tree))}
    assert values[(3,)] == pytest.approx(three)
    assert values[(4,)] == pytest.approx(four)
    assert values[(3, 6)] == pytest.approx(three * 1 / (2 + 2 / 3))
    assert values[(3, 5)] == pytest.approx(three * 1 / (2 + 2 / 3))
    assert sum(tree.values) == pytest.approx(three + four + 2 * three / (2 + 2 / 3))


def in_order(tree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[node] for node in tree.path(last)) for last in range(len(tree))]


def test_the_better_scoring_match_wins_over_the_longer_one() -> None:
    # the longest match "7 1" occurred once; "1" was followed by 2 many times
    text = [7, 1, 5] + [9, 1, 2, 3] * 12 + [7, 1]
    assert guess(Suffix(doubt=10.0, max_tokens=2, shared_mib=0), text, cap=1).tokens == (2,)
    assert guess(Suffix(doubt=0.1, max_tokens=2, shared_mib=0), text, cap=1).tokens == (5,)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 8), st.floats(0, 10))
def test_no_tree_of_alike_places_beats_the_bound(num_places: int, agreeing: int, budget: int, doubt: float) -> None:
    text = ([50 + i for i in range(agreeing)] + [1, 2, 3, 4, 5, 6, 7, 8]) * num_places
    drafter = Suffix(max_hits=64, doubt=doubt, min_probability=0.0, shared_mib=0)
    tokens, hits = text + [50 + i for i in range(agreeing)], []
    index = Occurrences((1, 3), 64)
    index.append(0, tokens)
    hits = [hit for hit in index.find(tokens) if hit.length >= agreeing]
    places = [(hit.tokens, hit.end) for hit in hits]
    _, score = drafter._best(hits, budget, 100)
    longest = max(hit.length for hit in hits)
    assert score <= best_possible(len(places), longest, budget, doubt) + 1e-9


def test_long_matches_are_found_among_many_short_ones() -> None:
    index = Occurrences((1, 3), max_hits=8)
    index.append(0, [1, 2, 3, 4, 40] + [9, 4, 41] * 100)
    hits = index.find([1, 2, 3, 4])
    assert (hits[0].length, hits[0].end) == (4, 4)
    assert [hit.length for hit in hits[1:]] == [1] * 8


def test_outputs_of_a_tenant_are_drafted_for_its_next_request() -> None:
    drafter = Suffix()
    finish(drafter, [1, 2, 3], [10, 11, 12, 13, 14], tenant="a")
    assert (12,) in paths(guess(drafter, [7, 8, 10, 11], num_prompt_tokens=2, tenant="a"))
    assert guess(drafter, [7, 8, 10, 11], num_prompt_tokens=2, tenant="b", key="other") == EMPTY
    assert guess(drafter, [7, 8, 10, 11], num_prompt_tokens=2, tenant="a", adapter="x", key="third") == EMPTY


def test_running_siblings_share_what_they_have_said() -> None:
    drafter = Suffix()
    guess(drafter, [1, 2, 20, 21, 22], num_prompt_tokens=2, key="first")
    assert (22,) in paths(guess(drafter, [1, 2, 20, 21], num_prompt_tokens=2, key="second"))


def test_a_prompt_is_never_shared() -> None:
    drafter = Suffix()
    finish(drafter, [10, 11, 12, 13], [1, 2], tenant="a")
    assert guess(drafter, [10, 11], tenant="a") == EMPTY


def test_memory_stays_below_the_cap_and_the_oldest_outputs_go_first() -> None:
    drafter, cap = Suffix(shared_mib=0.05), 0.05 * (1 << 20)
    random = Random(1)
    for number in range(60):
        output = [1000 * number + i for i in range(random.randrange(5, 40))]
        finish(drafter, [1, 2], output, key=str(number), tenant=f"t{number % 2}")
        assert drafter.state_bytes <= cap
    assert guess(drafter, [3, 0, 1], num_prompt_tokens=1, tenant="t0", key="x") == EMPTY
    assert guess(drafter, [3, 59000, 59001], num_prompt_tokens=1, tenant="t1", key="y").tokens[0] == 59002


def test_a_busy_tenant_pushes_out_its_own_outputs_first() -> None:
    drafter = Suffix(shared_mib=0.05)
    finish(drafter, [1, 2], [10, 11, 12, 13], tenant="quiet")
    for number in range(1, 80):
        finish(drafter, [1, 2], [1000 * number + i for i in range(30)], key=str(number), tenant="busy")
    assert guess(drafter, [3, 10, 11], num_prompt_tokens=1, tenant="quiet", key="x").tokens[0] == 12


def test_a_running_output_that_was_evicted_goes_on() -> None:
    drafter, text = Suffix(shared_mib=0.01), [1]
    for _ in range(300):
        text.append(len(text) + 1)
        assert guess(drafter, text, num_prompt_tokens=1).problem() is None
    drafter.drop("request")
    assert 0 < drafter.state_bytes <= 0.01 * (1 << 20)


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=12), st.data())
def test_common_end(tokens: list[int], text: list[int], data: st.DataObject) -> None:
    end = data.draw(st.integers(0, len(tokens)))
    expected = 0
    while expected < min(end, len(text)) and tokens[end - 1 - expected] == text[-1 - expected]:
        expected += 1
    assert common_end(tokens, end, text) == expected
