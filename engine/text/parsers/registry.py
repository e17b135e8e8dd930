"""Parsers by name. A parser registers itself with a decorator; the package's `__init__` imports all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from engine.errors import ConfigError
from engine.text.parsers.base import ToolParser
from engine.text.parsers.thinking import Thinking

TOOL_PARSERS: dict[str, type[ToolParser]] = {}
REASONING_PARSERS: dict[str, Thinking] = {}

ParserClass = TypeVar("ParserClass", bound=type[ToolParser])


def tool_parser(*names: str) -> Callable[[ParserClass], ParserClass]:
    """Registers a class under its name and the names that others use for the format."""

    def register(parser: ParserClass) -> ParserClass:
        for name in names:
            assert name not in TOOL_PARSERS, f"two parsers are named {name!r}"
            TOOL_PARSERS[name] = parser
        return parser

    return register


def check_name(option: str, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError for a name that is neither known nor auto or none."""
    if name not in known and name not in ("auto", "none"):
        raise ConfigError(f"{option} is {name!r}; it must be auto, none or one of {', '.join(sorted(known))}")
