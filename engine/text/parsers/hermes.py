"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen 2.5 and 3, Granite 4, Mimir."""

from __future__ import annotations

from engine.text.parsers.base import CallShape
from engine.text.parsers.json_calls import JsonCalls
from engine.text.parsers.registry import tool_parser


@tool_parser("hermes", "qwen25", "qwen3", "mimir")
class Hermes(JsonCalls):
    begins = ("<tool_call>",)
    ends = ("</tool_call>",)
    markers = ("<tool_call>", "</tool_call>")
    shape = CallShape(
        '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", separator="\n", trigger="<tool_call>"
    )
