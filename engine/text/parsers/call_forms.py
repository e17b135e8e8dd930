"""What an output with tool calls must look like, as a format of a structural tag (see `engine.constraints`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.parsers.base import ToolParser

Form = dict[str, Any]
ANY_TEXT: Form = {"type": "any_text"}
SPACE: Form = {"type": "regex", "pattern": r"[ \n]{0,4}"}  # what models write before a call
# Text that cannot be mistaken for a call where calls have no marker.
NO_CALL: Form = {"type": "regex", "pattern": r"([ \n]{0,4}[^\s{\[](.|\n)*)?"}


def call_form(
    kind: type[ToolParser],
    tools: Sequence[Mapping[str, Any]],
    *,
    must_call: bool,
    is_parallel: bool,
    answer: Form | None,
) -> Form:
    """Arguments follow their schemas; where calls are optional, only those of strict functions do.

    answer   the form of an output without calls; None: any text
    """
    shape = kind.shape
    assert shape is not None, f"{kind.__name__} has neither a shape nor a forced form"
    tags = [_tag(shape.begin, tool["function"], shape.end, is_bound=must_call) for tool in tools]
    calls: Form = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": shape.separator,
        "at_least_one": True,
        "stop_after_first": not is_parallel,
    }
    if shape.prefix:
        calls = {"type": "tag", "begin": shape.prefix, "content": calls, "end": shape.suffix}
    if shape.thinking_end:
        core = calls if must_call else _or(calls, _behind(shape.answer_begin, answer or ANY_TEXT))
        thinking = {"type": "tag", "begin": shape.thinking_begin, "content": ANY_TEXT, "end": shape.thinking_end}
        return _or(_sequence(thinking, _constant(shape.separator), core), core)
    if must_call:
        return _sequence(SPACE, calls)
    if answer is not None:
        return _or(_sequence(SPACE, calls), answer)
    if not shape.trigger:
        return _or(_sequence(SPACE, calls), NO_CALL)
    return {
        "type": "triggered_tags",
        "triggers": [shape.trigger],
        "tags": [calls] if shape.prefix else tags,
        "stop_after_first": bool(shape.prefix) or not is_parallel,
    }


def _tag(begin: str, function: Mapping[str, Any], end: str, *, is_bound: bool) -> Form:
    schema: Any = {"type": "object"}
    if is_bound or function.get("strict"):
        schema = {**schema, **(function.get("parameters") or {})}
    return {
        "type": "tag",
        "begin": begin.replace("NAME", function["name"]),
        "content": {"type": "json_schema", "json_schema": schema},
        "end": end,
    }


def _behind(begin: str, form: Form) -> Form:
    return {"type": "tag", "begin": begin, "content": form, "end": ""}


def _or(*forms: Form) -> Form:
    return {"type": "or", "elements": list(forms)}


def _sequence(*forms: Form) -> Form:
    return {"type": "sequence", "elements": list(forms)}


def _constant(text: str) -> Form:
    return {"type": "const_string", "value": text}
