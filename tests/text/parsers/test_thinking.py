"""Thinking told from content, and its tokens counted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.parsed_output import ParsedOutput
from engine.text.parsers import REASONING_PARSERS, TOOL_PARSERS
from engine.text.parsers.thinking import PlainContent, ThinkingParser
from engine.types import Delta
from tests.text.parsers.samples import TOOLS

NAMES = sorted(set(REASONING_PARSERS) - {"harmony"})


def parser(name: str = "qwen3", *, is_open: bool = False, calls: bool = False) -> ThinkingParser:
    content = TOOL_PARSERS["hermes"](TOOLS) if calls else PlainContent()
    return ThinkingParser(REASONING_PARSERS[name], content, is_open=is_open)


def parse(pieces: list[str], name: str = "qwen3", *, is_open: bool = False) -> tuple[str, str]:
    machine = parser(name, is_open=is_open)
    answer = Delta.join([*(machine.feed(piece) for piece in pieces), machine.finish()])
    return answer.reasoning, answer.content


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_open", [False, True])
def test_every_format_splits_thinking_off_without_the_space_around_it(name: str, is_open: bool) -> None:
    thinking = REASONING_PARSERS[name]
    start = "" if is_open else thinking.starts[0]
    text = f"{start}\nI think.\n\nYes.\n{thinking.ends[0]}\n\n The answer. \n"
    assert parse([text], name, is_open=is_open) == ("I think.\n\nYes.", "The answer. \n")
    assert parse(list(text), name, is_open=is_open) == ("I think.\n\nYes.", "The answer. \n")


def test_what_does_not_begin_with_thinking_is_content() -> None:
    for text in ("Hello <think>x</think>", "  <thin", "", "  ", "</think>"):
        assert parse([text]) == ("", text)
        assert parse(list(text)) == ("", text)


def test_thinking_that_is_cut_off_is_thinking() -> None:
    assert parse(["<think>\nabc </thi"]) == ("abc </thi", "")
    assert parse(["abc"], is_open=True) == ("abc", "")
    assert parse(["<think>"]) == ("", "")


def test_a_model_that_repeats_the_opened_marker_is_understood() -> None:
    assert parse(["<think>\nabc</think>x"], is_open=True) == ("abc", "x")


@settings(max_examples=100)
@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", " ", "\n", "a", "é", "<", "</"]), max_size=10).map("".join),
    places=st.lists(st.integers(0, 100), max_size=8),
    is_open=st.booleans(),
)
def test_any_text_is_split_alike_however_it_is_cut(text: str, places: list[int], is_open: bool) -> None:
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert parse(pieces, is_open=is_open) == parse([text], is_open=is_open)


def test_calls_behind_thinking_are_found_and_those_inside_are_thought() -> None:
    call = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    machine = parser(calls=True)
    answer = Delta.join([machine.feed(f"<think>{call}</think>\n{call}"), machine.finish()])
    assert (answer.reasoning, answer.content) == (call, "")
    assert [tool_call.name for tool_call in answer.tool_calls] == ["weather"]


@pytest.mark.parametrize(
    ("prompt", "is_continued", "is_open"),
    [
        ("<|im_start|>assistant\n<think>\n", False, True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False, False),
        ("<|im_start|>assistant\n", False, False),
        ("user: what is <think> for?\nassistant:", False, False),
        ("assistant: <think>\nwell, first", True, True),
        ("assistant: <think>\nwell</think> so", True, False),
    ],
)
def test_the_prompt_says_whether_thinking_is_open(prompt: str, is_continued: bool, is_open: bool) -> None:
    assert REASONING_PARSERS["qwen3"].is_open(prompt, is_continued=is_continued) == is_open


def test_deepseek_thinks_from_the_beginning_unless_the_template_closed_it() -> None:
    thinking = REASONING_PARSERS["deepseek_r1"]
    assert thinking.is_open("<｜Assistant｜>", is_continued=False)
    assert not thinking.is_open("<｜Assistant｜></think>", is_continued=False)


# ---- counting


def count(tokens: list[str], *, is_open: bool = False, held: list[int] | None = None) -> int:
    parsed = ParsedOutput(parser(is_open=is_open))
    for token, num_held in zip(tokens, held or [0] * len(tokens), strict=True):
        parsed.push(token, num_held)
    parsed.finish("")
    return parsed.num_reasoning_tokens


def test_thinking_is_counted_in_tokens_with_its_markers() -> None:
    assert count(["<think>", "\n", "a b", " c", "</think>", "\n\n", "x", "y"]) == 5
    assert count(["<", "think", ">", "a", "</", "think", ">", "x"]) == 7, "markers of several tokens"
    assert count(["a", "</think>", "x"], is_open=True) == 2
    assert count(["a", "b"], is_open=True) == 2
    assert count(["hello", "<think>"]) == 0
    assert count(["<", "b>"]) == 0, "what looked like a marker was none"
    assert count(["", "<think>", "", "</think>", ""]) == 4, "tokens without text count where they stand"


def test_text_that_a_stop_string_holds_back_does_not_move_the_count() -> None:
    parsed = ParsedOutput(parser(is_open=True))
    for text, num_held in (("a", 0), ("", 8), ("</think>x", 0), ("y", 0)):  # "</think>" came one token late
        parsed.push(text, num_held)
    parsed.finish("")
    assert parsed.num_reasoning_tokens == 2
    assert parsed.take() == Delta("xy", "a")
