"""functools[{"name": ..., "arguments": {...}}, ...], or the array between <|tool_call|> and <|/tool_call|>: Phi 4."""

from __future__ import annotations

from engine.text.parsers.base import CallShape
from engine.text.parsers.json_calls import JsonCalls
from engine.text.parsers.registry import tool_parser


@tool_parser("phi4", "phi4_mini_json")
class Phi4(JsonCalls):
    begins = ("functools", "<|tool_call|>")
    ends = ("<|/tool_call|>",)
    markers = ("<|tool_call|>", "<|/tool_call|>")
    shape = CallShape(
        '{"name": "NAME", "arguments": ', "}", separator=", ", prefix="functools[", suffix="]", trigger="functools["
    )
