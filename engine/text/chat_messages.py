"""Brings chat messages into the shape that chat templates expect. Knows OpenAI's message fields; renders nothing."""

from __future__ import annotations

import json
from typing import Any, Literal

from engine.errors import InvalidParameter

# What a template takes as message content: a string, a list of parts, or either.
ContentFormat = Literal["string", "list", "both"]
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def normalise(messages: list[dict[str, Any]], content_format: ContentFormat, knows_developer: bool) -> list[Any]:
    """New message dicts; the given ones stay as they are.

    The developer role becomes system unless the template knows it, function becomes tool, arguments of tool calls
    become objects, `reasoning` and `reasoning_content` are both present when one is, content takes the template's form.
    Raises InvalidParameter that names the field.
    """
    return [_message(message, index, content_format, knows_developer) for index, message in enumerate(messages)]


def _message(
    message: dict[str, Any], index: int, content_format: ContentFormat, knows_developer: bool
) -> dict[str, Any]:
    shaped = dict(message)
    if shaped.get("role") == "developer" and not knows_developer:
        shaped["role"] = "system"
    elif shaped.get("role") == "function":  # what tool was called before
        shaped["role"] = "tool"
    calls = shaped.get("tool_calls")
    if calls:
        shaped["tool_calls"] = [_tool_call(call, f"messages.{index}.tool_calls.{n}") for n, call in enumerate(calls)]
    else:
        shaped.pop("tool_calls", None)
    reasoning = shaped.get("reasoning_content") or shaped.get("reasoning")
    if reasoning:
        shaped["reasoning"] = shaped["reasoning_content"] = reasoning
    # templates tell a message that only calls tools by content being none
    if not (calls and shaped.get("content") is None):
        shaped["content"] = _content(shaped.get("content"), content_format, f"messages.{index}.content")
    return shaped


def _content(content: Any, content_format: ContentFormat, param: str) -> str | list[dict[str, str]]:
    if content is None:
        content = ""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content_format == "list" else content
    if not isinstance(content, list):
        raise InvalidParameter(f"{param} must be a string or a list of parts", param=param)
    texts = [_part_text(part, f"{param}.{n}") for n, part in enumerate(content)]
    if content_format == "string":
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _part_text(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get(TEXT_PARTS[kind]) if kind in TEXT_PARTS else None
    if not isinstance(text, str):
        raise InvalidParameter(
            f"{param} must be a text part, for instance {{'type': 'text', 'text': '...'}}; this model reads text only",
            param=param,
        )
    return text


def _tool_call(call: Any, param: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidParameter(f"{param}.function must be an object", param=f"{param}.function")
    arguments = function.get("arguments")
    param = f"{param}.function.arguments"
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InvalidParameter(f"{param} is not valid JSON", param=param) from None
    if not isinstance(arguments, dict):
        raise InvalidParameter(f"{param} must be a JSON object", param=param)
    return {**call, "function": {**function, "arguments": arguments}}
