"""<|tool_call|>[{"name": ..., "arguments": {...}}, ...]: Granite 3; from 3.1 on behind <tool_call>.

Granite 4 writes Hermes' form.
"""

from __future__ import annotations

from engine.text.parsers.base import CallShape
from engine.text.parsers.json_calls import JsonCalls
from engine.text.parsers.registry import tool_parser


@tool_parser("granite")
class Granite(JsonCalls):
    begins = ("<|tool_call|>", "<tool_call>")
    markers = ("<|tool_call|>", "<tool_call>")
    shape = CallShape(
        '{"name": "NAME", "arguments": ',
        "}",
        separator=", ",
        prefix="<|tool_call|>[",
        suffix="]",
        trigger="<|tool_call|>",
    )
