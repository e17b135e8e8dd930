"""JSON in pieces: where a value ends, and the object {"name": ..., "arguments": ...} that most calls are written as."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import Enum

from engine.text.parsers.base import MAX_NAME_CHARS, Found

NAME_KEYS = frozenset({"name"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
OTHER_KEYS = frozenset({"id", "type"})
SPACE = " \t\n\r"
_STRING_STOP = re.compile(r'["\\]')
_OUTSIDE = re.compile(r"[0-9eE+\-.truefalsn,:\s]*")  # what stands outside of strings and brackets


class Scan(Enum):
    READING = "reading"
    DONE = "done"
    BROKEN = "broken"  # no JSON from here on


class JsonValue:
    """Finds the end of one JSON value. Checks brackets and which characters stand outside of strings, no more."""

    def __init__(self) -> None:
        self.state = Scan.READING
        self._open: list[str] = []  # the closing brackets that are due
        self._is_string = False
        self._is_escaped = False
        self._is_scalar = False

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the value."""
        at = 0
        while at < len(text) and self.state is Scan.READING:
            if self._is_string:
                at = self._string(text, at)
                continue
            char = text[at]
            if char == '"' and not self._is_scalar:
                self._is_string = True
            elif char in "{[" and not self._is_scalar:
                self._open.append("}" if char == "{" else "]")
            elif self._open and char == self._open[-1]:
                self._open.pop()
                if not self._open:
                    self.state = Scan.DONE
            elif self._open:
                end = _OUTSIDE.match(text, at).end()  # type: ignore[union-attr]
                if end == at:
                    self.state = Scan.BROKEN
                    return at
                at = end
                continue
            elif char in ",}]" + SPACE and self._is_scalar:
                self.state = Scan.DONE
                return at
            elif _OUTSIDE.fullmatch(char) and char not in ",:":
                self._is_scalar = True
            else:
                self.state = Scan.BROKEN
                return at
            at += 1
        return at

    def _string(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        stop = _STRING_STOP.search(text, at)
        if stop is None:
            return len(text)
        if stop[0] == "\\":
            self._is_escaped = True
        else:
            self._is_string = False
            if not self._open:
                self.state = Scan.DONE
        return stop.end()


class CallObject:
    """One call object. Arguments are passed on as they are written, from the moment the name is known."""

    def __init__(self, found: Found, accepts: Callable[[str], bool] = bool, *, is_strict: bool = False) -> None:
        """
        accepts     whether a name can be that of a function
        is_strict   an unknown key means that this is no call
        """
        self.state = Scan.READING
        self.is_open = False  # the call was announced: there is no way back to content
        self.raw = ""  # all that was taken, while not open
        self._found = found
        self._accepts = accepts
        self._is_strict = is_strict
        self._expects = "{"  # "{", "key", ":", "value", "," or, at the first key or after one comma, "key or }"
        self._key = ""
        self._value: JsonValue | None = None
        self._text = ""  # of the string or value being read
        self._early = ""  # arguments that came before the name
        self._has_arguments = False
        self._is_passing = False  # the value being read goes out as it comes

    def feed(self, text: str) -> int:
        """How many characters of `text` belong to the object."""
        at = 0
        while at < len(text) and self.state is Scan.READING:
            at += self._step(text[at:])
        if not self.is_open:
            self.raw += text[:at]
        return at

    def end(self) -> None:
        """The text is over inside of the object: what was held of an open call's arguments goes out as it is."""
        if self.is_open and self._value is not None and self._key in ARGUMENT_KEYS and not self._is_passing:
            self._found.arguments(self._text)

    @property
    def _holds_name(self) -> bool:
        return self._expects == "key" or (self._key in NAME_KEYS and not self.is_open)

    def _step(self, text: str) -> int:
        if self._value is not None:
            return self._read_value(text)
        space = len(text) - len(text.lstrip(SPACE))
        if space:
            return space
        char = text[0]
        if self._expects in ("key", "key or }") and char == '"':
            self._start_value(is_key=True)
            return 0
        if self._expects == "value":
            self._start_value(is_key=False)
            return 0
        if char == "{" and self._expects == "{":
            self._expects = "key or }"
        elif char == ":" and self._expects == ":":
            self._expects = "value"
        elif char == "," and self._expects == ",":
            self._expects = "key"
        elif char == "}" and self._expects in ("key or }", ","):
            self._close()
            return 1 if self.state is Scan.DONE else 0
        else:
            self.state = Scan.BROKEN
            return 0
        return 1

    def _start_value(self, *, is_key: bool) -> None:
        self._value, self._text = JsonValue(), ""
        self._is_passing = False
        self._expects = "key" if is_key else "value"

    def _read_value(self, text: str) -> int:
        assert self._value is not None
        is_arguments = self._expects == "value" and self._key in ARGUMENT_KEYS and not self._has_arguments
        if is_arguments and not self._text and text[0] == "{" and self.is_open:
            self._is_passing = True
        count = self._value.feed(text)
        if self._is_passing:
            self._found.arguments(text[:count])
            self._text = "{"
        else:
            self._text += text[:count]
        if self._value.state is Scan.BROKEN:
            self.state = Scan.BROKEN
        elif self._value.state is Scan.DONE:
            self._take_value(is_arguments)
        elif self._holds_name and len(self._text) > MAX_NAME_CHARS:
            self.state = Scan.BROKEN
        return count

    def _take_value(self, is_arguments: bool) -> None:
        text, self._value = self._text, None
        if self._expects == "key":
            key = _string(text)
            if key is None or (self._is_strict and key not in NAME_KEYS | ARGUMENT_KEYS | OTHER_KEYS):
                self.state = Scan.BROKEN
                return
            self._key, self._expects = key, ":"
            return
        self._expects = ","
        if is_arguments:
            self._has_arguments = True
            if not self._is_passing:
                self._early = _as_arguments(text)
        elif self._key in NAME_KEYS and not self.is_open:
            name = _string(text)
            if not name or len(name) > MAX_NAME_CHARS or not self._accepts(name):
                self.state = Scan.BROKEN
                return
            self._found.open_call(name)
            self.is_open, self.raw = True, ""
        if self.is_open and self._early:
            self._found.arguments(self._early)
            self._early = ""

    def _close(self) -> None:
        if not self.is_open:
            self.state = Scan.BROKEN
            return
        self.state = Scan.DONE
        if not self._has_arguments:
            self._found.arguments("{}")


def _string(text: str) -> str | None:
    """The string that a JSON text is, if it is one."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _as_arguments(text: str) -> str:
    """Arguments that are not written as an object: a string that holds them, or null for none."""
    if text == "null":
        return "{}"
    inner = _string(text)
    return text if inner is None else inner or "{}"
