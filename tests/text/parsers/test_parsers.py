"""Every tool parser on every format: meaning, streaming, and what is left of broken output."""

from __future__ import annotations

import gc
import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.parsers import TOOL_PARSERS
from engine.types import Delta
from tests.text.parsers.samples import BROKEN, FIRST, SAMPLES, SECOND, TOOLS, Sample

MAX_EXAMPLES = 25
PIECES = [
    *(
        '{"name": "weather", "arguments": ',
        '{"name": "weather", "parameters": ',
        FIRST,
        SECOND,
        "}",
        "]",
        "[",
        ",",
        ";",
    ),
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[weather(", "city='x'", ")", "<|python_start|>"),
    *(
        "<|python_end|>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "weather",
        "<｜tool▁calls▁begin｜>",
        "```json\n",
        "\n```",
    ),
    *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|tool_call|>"),
    *("<|/tool_call|>", "functools", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "analysis"),
    *("final", "commentary to=functions.f ", "<function=weather>", "<parameter=city>", "</parameter>", "</function>"),
    *(" ", "\n", "text", "é", "😀", '"', "\\"),
]
ANY_TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map("".join)


def parse(parser: str, pieces: list[str]) -> tuple[Delta, list[Delta]]:
    """The whole answer and the deltas it came in."""
    machine = TOOL_PARSERS[parser](TOOLS)
    deltas = [*(machine.feed(piece) for piece in pieces), machine.finish()]
    return Delta.join(deltas), deltas


def without_ids(delta: Delta) -> tuple[str, str, list[tuple[str | None, str]]]:
    return delta.content, delta.reasoning, [(call.name, call.arguments) for call in delta.tool_calls]


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.parser}: {sample.text[:40]}")
def test_the_meaning_of_an_output_is_found(sample: Sample) -> None:
    answer, _ = parse(sample.parser, [sample.text])
    assert answer.content == sample.content
    assert answer.reasoning == sample.reasoning
    assert [call.name for call in answer.tool_calls] == [name for name, _ in sample.calls]
    for call, (_, expected) in zip(answer.tool_calls, sample.calls, strict=True):
        if isinstance(expected, str):
            assert call.arguments == expected, "arguments are passed on as they were written"
        assert json.loads(call.arguments) == (json.loads(expected) if isinstance(expected, str) else expected)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.parser}: {sample.text[:40]}")
@settings(max_examples=MAX_EXAMPLES)
@given(places=st.lists(st.integers(0, 10_000), max_size=20))
def test_streamed_deltas_join_to_the_unstreamed_answer(sample: Sample, places: list[int]) -> None:
    whole, _ = parse(sample.parser, [sample.text])
    streamed, deltas = parse(sample.parser, cut(sample.text, places))
    assert without_ids(streamed) == without_ids(whole)
    check_protocol(deltas)


def test_one_character_at_a_time_is_a_stream_like_any_other() -> None:
    for sample in SAMPLES:
        whole, _ = parse(sample.parser, [sample.text])
        streamed, deltas = parse(sample.parser, list(sample.text))
        assert without_ids(streamed) == without_ids(whole), sample
        check_protocol(deltas)


def check_protocol(deltas: list[Delta]) -> None:
    """Id and name once, with the first piece of an index; ids unique; indices in order."""
    seen: dict[int, str] = {}
    for delta in deltas:
        for call in delta.tool_calls:
            if call.index in seen:
                assert call.id is None
                assert call.name is None
            else:
                assert call.index == len(seen)
                assert call.name
                assert call.id
                assert call.id not in seen.values()
                seen[call.index] = call.id


@pytest.mark.parametrize("parser", sorted(TOOL_PARSERS))
@settings(max_examples=MAX_EXAMPLES)
@given(text=ANY_TEXT, places=st.lists(st.integers(0, 10_000), max_size=20))
def test_any_text_gives_the_same_answer_however_it_is_cut(parser: str, text: str, places: list[int]) -> None:
    whole, _ = parse(parser, [text])
    streamed, deltas = parse(parser, cut(text, places))
    assert without_ids(streamed) == without_ids(whole)
    check_protocol(deltas)


@pytest.mark.parametrize("sample", BROKEN, ids=lambda sample: f"{sample.parser}: {sample.text[:40]}")
def test_broken_output_is_content_or_the_arguments_so_far(sample: Sample) -> None:
    answer, _ = parse(sample.parser, [sample.text])
    assert answer.content == sample.content
    assert [(call.name, call.arguments) for call in answer.tool_calls] == sample.calls
    for end in range(len(sample.text)):
        whole, _ = parse(sample.parser, [sample.text[:end]])
        streamed, _ = parse(sample.parser, list(sample.text[:end]))
        assert without_ids(streamed) == without_ids(whole)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.calls], ids=lambda sample: sample.text[:30])
def test_a_call_that_is_cut_off_keeps_its_arguments_so_far(sample: Sample) -> None:
    whole, _ = parse(sample.parser, [sample.text])
    for end in range(len(sample.text)):
        answer, _ = parse(sample.parser, [sample.text[:end]])
        for call, complete in zip(answer.tool_calls, whole.tool_calls, strict=False):
            assert call.name == complete.name
            if complete.arguments == FIRST:
                # behind all of them may stand the beginning of a marker, of those that are no JSON
                assert FIRST.startswith(call.arguments) or call.arguments.startswith(FIRST)


def test_two_calls_in_one_stream_have_unique_ids_and_mistrals_are_nine_letters() -> None:
    hermes, _ = parse("hermes", [SAMPLES[1].text])
    assert len({call.id for call in hermes.tool_calls}) == 2
    mistral, _ = parse("mistral", [next(s.text for s in SAMPLES if s.parser == "mistral")])
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", call.id or "") for call in mistral.tool_calls)
    given, _ = parse("mistral", ["[TOOL_CALLS]f[CALL_ID]abc123DEF[ARGS]{}"])
    assert given.tool_calls[0].id == "abc123DEF"


def test_arguments_stream_before_they_are_complete() -> None:
    _, deltas = parse("hermes", ['<tool_call>{"name": "f", "arguments": {"a": "', "bcd", "efg", '"}}</tool_call>'])
    pieces = [call.arguments for delta in deltas for call in delta.tool_calls]
    assert pieces[:3] == ['{"a": "', "bcd", "efg"]


def test_the_answer_streams_when_there_is_no_call() -> None:
    for parser in sorted(TOOL_PARSERS):
        _, deltas = parse(parser, ["Hello", " wor", "ld"])
        assert deltas[1].content, f"{parser} holds plain text back"


def test_a_long_output_takes_time_in_proportion_to_its_length() -> None:
    def seconds(count: int) -> float:
        text = '<tool_call>{"name": "f", "arguments": {"text": "' + "wörd " * count + '"}}</tool_call>'
        pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
        start = time.process_time()
        parse("hermes", pieces)
        return time.process_time() - start

    gc.disable()  # a full collection of what other tests left takes longer than all of this
    try:
        short, long = (min(seconds(count) for _ in range(3)) for count in (2_000, 16_000))
    finally:
        gc.enable()
    assert long < 24 * short + 0.05, "8 times the text; quadratic would be 64 times"


def test_unknown_tools_are_calls_where_a_marker_says_so() -> None:
    answer, _ = parse("hermes", ['<tool_call>{"name": "other", "arguments": {}}</tool_call>'])
    assert [call.name for call in answer.tool_calls] == ["other"]
