"""Parsers of models' output: thinking and tool calls, one file per format, by name. Torch-free."""

from __future__ import annotations

from engine.text.parsers import (  # noqa: F401  importing registers
    deepseek,
    granite,
    harmony,
    hermes,
    llama3_json,
    mistral,
    phi4,
    pythonic,
    qwen3_coder,
    reasoning,
)
from engine.text.parsers.base import CallShape, OutputParser, ToolParser
from engine.text.parsers.registry import REASONING_PARSERS, TOOL_PARSERS

__all__ = ["REASONING_PARSERS", "TOOL_PARSERS", "CallShape", "OutputParser", "ToolParser"]
