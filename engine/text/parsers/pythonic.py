"""[f(a=1, b="x"), g()]: calls as a Python list, of Llama 3.2 and 4. Values are literals and become JSON one by one.

Llama 4 puts the list between <|python_start|> and <|python_end|>. Without a marker only an answer that begins with the
list and the name of a given function is calls.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.parsers.base import MAX_NAME_CHARS, ToolParser
from engine.text.parsers.registry import tool_parser

BEGIN, END = "<|python_start|>", "<|python_end|>"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
KEYWORD = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*")
OPENING, CLOSING = "([{", ")]}"


@tool_parser("pythonic", "llama3_pythonic", "llama4_pythonic")
class Pythonic(ToolParser):
    markers = (BEGIN, END)
    # its arguments are no JSON, so calls that must come are written in Llama's JSON form and read as such
    forced_form = "llama3_json"

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(tools)
        self._raw = ""  # taken, while no call has been announced
        self._num_arguments = 0

    def _text(self) -> bool:
        """The very beginning, perhaps behind the marker."""
        stripped = self._rest.lstrip()
        if not self._is_over and len(stripped) < len(BEGIN) and BEGIN.startswith(stripped):
            return False
        if stripped.startswith(BEGIN):
            self._raw, self._rest = self._rest[: -len(stripped)] + BEGIN, stripped[len(BEGIN) :]
            self._state = self._list
        elif stripped.startswith("["):
            self._state = self._list
        else:
            self._state = self._later_text
        return True

    def _later_text(self) -> bool:
        marker = self._content_until((BEGIN, END))
        if marker is None:
            return False
        if marker == BEGIN:
            self._raw, self._state = BEGIN, self._list
        elif self._found.num_calls:
            self._found.drop_space()
        else:
            self._found.content(marker)
        return True

    def _list(self) -> bool:
        self._raw += self._skip_space()
        if not self._rest:
            return False
        if self._rest[0] != "[":
            return self._refuse()
        self._raw += self._take(1)
        self._state = self._name
        return True

    def _name(self) -> bool:
        """A function's name and its parenthesis."""
        self._raw += self._skip_space()
        if not self._rest:
            return False
        match = NAME.match(self._rest)
        if match is None or match.end() > MAX_NAME_CHARS:
            return self._refuse()
        if match.end() == len(self._rest) and not self._is_over:
            return False
        if match[0] not in self._parameters or not self._rest.startswith("(", match.end()):
            return self._refuse()
        self._take(match.end() + 1)
        self._found.open_call(match[0])
        self._raw, self._num_arguments = "", 0
        self._state = self._keyword
        return True

    def _keyword(self) -> bool:
        """An argument's name, or the end of the call."""
        stripped = self._rest.lstrip()
        if not stripped:
            return False
        if stripped[0] == ")":
            self._rest = stripped[1:]
            self._found.arguments("}" if self._num_arguments else "{}")
            self._state = self._next
            return True
        if self._num_arguments and stripped[0] == ",":
            self._rest = stripped[1:]
            self._state = self._keyword_name
            return True
        self._state = self._later_text if self._num_arguments else self._keyword_name
        return True

    def _keyword_name(self) -> bool:
        stripped = self._rest.lstrip()
        if not stripped:
            return False
        if stripped[0] == ")" and self._num_arguments:  # behind a last comma
            self._state = self._keyword
            return True
        equals = self._rest.find("=")
        if equals < 0 and len(self._rest) <= MAX_NAME_CHARS and not self._is_over:
            return False
        match = KEYWORD.fullmatch(self._rest[: equals + 1]) if 0 <= equals <= MAX_NAME_CHARS else None
        if match is None:
            self._state = self._later_text  # the arguments stay as they are, the rest is content
            return True
        self._take(equals + 1)
        self._key = match[1]
        self._scan = LiteralScan()
        self._literal = ""
        self._state = self._value
        return True

    def _value(self) -> bool:
        count = self._scan.feed(self._rest)
        self._literal += self._take(count)
        if not self._scan.is_done:
            return False
        text = _to_json(self._literal)
        if text is None:
            self._rest = f"{self._key}={self._literal}{self._rest}"
            self._state = self._later_text
            return True
        self._found.arguments(f"{', ' if self._num_arguments else '{'}{json.dumps(self._key)}: {text}")
        self._num_arguments += 1
        self._state = self._keyword
        return True

    def _next(self) -> bool:
        """Behind a call: another one, or the end of the list."""
        stripped = self._rest.lstrip()
        if not stripped:
            return False
        self._rest = stripped[1:] if stripped[0] in ",]" else stripped
        self._state = self._name if stripped[0] == "," else self._later_text
        return True

    def _refuse(self) -> bool:
        self._found.content(self._raw)
        self._raw = ""
        self._state = self._later_text
        return True

    def _end(self) -> None:
        if self._state == self._value:
            self._rest = f"{self._key}={self._literal}{self._rest}"
        self._found.content(self._raw)
        super()._end()


class LiteralScan:
    """Finds the comma or closing bracket behind a Python literal."""

    def __init__(self) -> None:
        self.is_done = False
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the literal."""
        for at, char in enumerate(text):
            if self._quote:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == self._quote:
                    self._quote = ""
            elif char in "\"'":
                self._quote = char
            elif char in OPENING:
                self._depth += 1
            elif self._depth and char in CLOSING:
                self._depth -= 1
            elif not self._depth and char in ",)]}":
                self.is_done = True
                return at
        return len(text)


def _to_json(literal: str) -> str | None:
    """A Python literal, or one of JSON, as JSON text; None when it is neither."""
    for read in (ast.literal_eval, json.loads):
        try:
            return json.dumps(read(literal.strip()), ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return None
