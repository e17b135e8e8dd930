"""Detokenizer: deltas add up to the full decode, stop strings equal their plain definition, in every chunking."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.launch import resolve_model_path
from engine.text.detokenizer import Detokenizer
from engine.text.stop_matcher import StopMatcher
from engine.text.tokenizer import Tokenizer
from tests.text import vocabularies

BUNDLED = Tokenizer.from_folder(resolve_model_path("mimir"))
# The ids of single bytes: random sequences of them are mostly invalid UTF-8, cut anywhere.
BYTE_IDS = [token_id for token_id in range(BUNDLED.vocab_size) if len(BUNDLED.token_bytes(token_id)) == 1]
BYTE_IDS_BY_VALUE = {BUNDLED.token_bytes(token_id)[0]: token_id for token_id in BYTE_IDS}

any_ids = st.lists(st.one_of(st.integers(0, BUNDLED.vocab_size + 3), st.sampled_from(BYTE_IDS)), max_size=30) | st.text(
    alphabet="a🙂👍🏽é漢\u0301\u0000", max_size=8
).flatmap(lambda text: st.just([BYTE_IDS_BY_VALUE[value] for value in text.encode()]))
cuts = st.lists(st.integers(1, 4), max_size=30)


def chunks(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """`ids` cut into pieces of the given sizes, the rest singly."""
    pieces, position = [], 0
    for size in [*sizes, *([1] * len(ids))]:
        if position < len(ids):
            pieces.append(list(ids[position : position + size]))
            position += size
    return pieces


def run(detokenizer: Detokenizer, pieces: Sequence[Sequence[int]]) -> tuple[str, int, str | None]:
    """The whole text, the number of tokens that count, and the stop string."""
    text, num_tokens = "", 0
    for piece in pieces:
        delta = detokenizer.push(piece)
        text += delta.text
        num_tokens += delta.num_tokens
        if delta.stop is not None:
            return text, num_tokens, delta.stop
    rest = detokenizer.finish()
    return text + rest.text, num_tokens, rest.stop


@settings(max_examples=150, deadline=None)
@given(ids=any_ids, sizes=cuts, skips=st.booleans())
def test_deltas_add_up_to_the_full_decode(ids: list[int], sizes: list[int], skips: bool) -> None:
    text, num_tokens, _ = run(Detokenizer(BUNDLED, skip_special_tokens=skips), chunks(ids, sizes))
    assert text == BUNDLED.decode(ids, skip_special_tokens=skips)
    assert num_tokens == len(ids)


def first_stop(text: str, stops: Sequence[str], num_untested: int) -> tuple[int, int, str] | None:
    """Definition: the occurrence that ends first, the longest of those; ends within `num_untested` do not count."""
    found = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > num_untested
    ]
    return min(found, default=None)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab🙂", max_size=24),
    stops=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=5), min_size=1, max_size=4),
    sizes=cuts,
    includes=st.booleans(),
    min_tokens=st.integers(0, 6),
)
@example(text="aabaab", stops=["aab", "ab"], sizes=[2], includes=False, min_tokens=0)
@example(text="abababa", stops=["ababa"], sizes=[], includes=False, min_tokens=5)
def test_stop_strings_equal_their_definition_on_the_full_text(
    text: str, stops: list[str], sizes: list[int], includes: bool, min_tokens: int
) -> None:
    ids = [BYTE_IDS_BY_VALUE[value] for value in text.encode()]
    num_untested = len(BUNDLED.decode(ids[:min_tokens]).rstrip("\ufffd"))
    detokenizer = Detokenizer(BUNDLED, stop=stops, include_stop=includes, min_tokens=min_tokens)
    shown, num_tokens, stop = run(detokenizer, chunks(ids, sizes))
    expected = first_stop(text, stops, num_untested)
    if expected is None:
        assert (shown, num_tokens, stop) == (text, len(ids), None)
    else:
        end, start, found = expected
        assert (shown, stop) == (text[: end if includes else start], found)
        assert BUNDLED.decode(ids[:num_tokens]).startswith(text[:end]), "the token that completes it counts"
        assert not BUNDLED.decode(ids[: num_tokens - 1]).startswith(text[:end]), "no token after it counts"


def test_no_part_of_a_stop_string_is_shown_early() -> None:
    detokenizer = Detokenizer(BUNDLED, stop=["STOP"])
    shown = [detokenizer.push([BYTE_IDS_BY_VALUE[value]]).text for value in b"aSTSTOX"]
    assert shown == ["a", "", "", "ST", "", "", "STOX"]


def test_incomplete_characters_are_held_back_and_flushed_at_the_end() -> None:
    detokenizer = Detokenizer(BUNDLED)
    first, *_, last = [BYTE_IDS_BY_VALUE[value] for value in "🙂".encode()]
    assert detokenizer.push([first]).text == ""
    assert detokenizer.finish().text == "\ufffd"
    detokenizer = Detokenizer(BUNDLED)
    assert detokenizer.push([last, BYTE_IDS_BY_VALUE[ord("a")]]).text == "\ufffda"


def test_held_text_is_flushed_when_the_stream_ends_without_the_stop_string() -> None:
    detokenizer = Detokenizer(BUNDLED, stop=["<end>"])
    assert detokenizer.push(BUNDLED.encode("ok <en")).text == "ok "
    assert detokenizer.finish().text == "<en"


def test_sentencepiece_text_continues_the_prompt_with_its_space(tmp_path: Path) -> None:
    tokenizer = vocabularies.load(tmp_path, "sentencepiece")
    ids = tokenizer.encode("hello wö 🙂", add_special_tokens=False)
    assert run(Detokenizer(tokenizer), [[token_id] for token_id in ids])[0] == " hello wö 🙂"


@pytest.mark.parametrize(
    ("has_spaces", "expected"), [(True, " hello <|end|> <|turn|>"), (False, " hello <|end|><|turn|>")]
)
def test_spaces_between_special_tokens_of_word_vocabularies(tmp_path: Path, has_spaces: bool, expected: str) -> None:
    tokenizer = vocabularies.load(tmp_path, "word_piece")
    ids = [tokenizer.encode("hello")[0], 1, 2]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False, spaces_between_special_tokens=has_spaces)
    assert run(detokenizer, [ids])[0] == expected


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    def seconds(num_tokens: int) -> float:
        detokenizer = Detokenizer(BUNDLED, stop=["never there"])
        ids = BUNDLED.encode(" n ever neve never there")[:3] * num_tokens
        started = time.perf_counter()
        for token_id in ids:
            detokenizer.push([token_id])
        return time.perf_counter() - started

    short = min(seconds(500) for _ in range(3))
    assert min(seconds(8000) for _ in range(2)) < 16 * 8 * short, "16 times the tokens; quadratic would be 256 times"


def test_a_long_stop_string_costs_no_rescan() -> None:
    matcher = StopMatcher(["a" * 255 + "b", "a" * 200 + "c"])
    started = time.perf_counter()
    assert matcher.feed("a" * 20000) is None
    assert time.perf_counter() - started < 2.0
    assert matcher.num_held == 255
    match = matcher.feed("b")
    assert match is not None
    assert (match.start, match.end) == (20001 - 256, 20001)
