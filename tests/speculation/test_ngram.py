"""Prompt lookup copies what followed the most recent occurrence of the longest run."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.speculation.ngram import Ngram, NgramIndex, NgramOptions, confidences
from engine.speculation.tree import EMPTY
from tests.speculation.drafting import guess

TEXT = st.lists(st.integers(0, 3), max_size=40)


def brute_force(token_ids: list[int], shortest: int, longest: int) -> int:
    """Index of the token that followed the most recent occurrence of the longest run that recurs; 0 without one."""
    for length in range(min(longest, len(token_ids)), shortest - 1, -1):
        for place in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[place - length : place] == token_ids[len(token_ids) - length :]:
                return place
    return 0


@given(TEXT, st.integers(1, 3), st.integers(0, 3), st.integers(0, 40))
def test_match_is_the_most_recent_of_the_longest(text: list[int], shortest: int, more: int, split: int) -> None:
    index = NgramIndex(NgramOptions(min_match=shortest, max_match=shortest + more), {})
    index.read(text[:split], 0)
    index.read(text, min(split, len(text)))
    agreeing, place = index.match(text)
    assert place == brute_force(text, shortest, shortest + more)
    assert text[place - agreeing : place] == text[len(text) - agreeing :]


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_a_repeating_text_drafts_its_own_period(period: int) -> None:
    text = list(range(period)) * (1 + 8 // period)
    tree = guess(Ngram(), text, cap=12)
    assert tree.is_chain
    assert tree.tokens == tuple(text[-1 - period + 1 + i % period] for i in range(12))


def test_random_tokens_draft_nothing() -> None:
    random = Random(0)
    drafter, text = Ngram(), [random.randrange(1 << 20)]
    for _ in range(500):
        text.append(random.randrange(1 << 20))
        assert guess(drafter, text) == EMPTY


def test_continuation_near_the_end_is_short_of_nothing() -> None:
    # the only match ends one token before the text does: the draft reads on in itself
    assert guess(Ngram(), [9, 1, 1, 1], cap=5).tokens == (1, 1, 1, 1, 1)


def test_confidence_grows_with_the_agreement() -> None:
    assert confidences(2, 3, 2.0) == pytest.approx([2 / 4, 2 / 4 * 3 / 5, 2 / 4 * 3 / 5 * 4 / 6])
    short = guess(Ngram(), [5, 1, 2, 8, 6, 1, 2])
    long = guess(Ngram(), [4, 5, 1, 2, 8, 4, 5, 1, 2])
    assert short.values[0] < long.values[0]


def test_agreement_beyond_the_longest_lookup_counts() -> None:
    text = list(range(10))
    tree = guess(Ngram(max_match=2), [*text, 99, *text], cap=1)
    assert tree.tokens == (99,)
    assert tree.values[0] == pytest.approx(10 / 12)


def test_options_out_of_bounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_match is 2; need an integer from 3 to 16"):
        Ngram(min_match=3, max_match=2)
    with pytest.raises(ConfigError, match="doubt is nan"):
        Ngram(doubt=float("nan"))
