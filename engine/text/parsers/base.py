"""What all output parsers are made of: the part of a delta under construction, and a machine over text in pieces.

A parser decides by what stands in the text alone, never by where one piece of it ended, so that the deltas joined are
the same for every way to cut the text. Nothing is lost: what turns out not to be a call is content.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from engine.types import Delta, ToolCallDelta

MAX_NAME_CHARS = 256  # a name that is longer is no name
ID_ALPHABET = string.ascii_letters + string.digits


class OutputParser(Protocol):
    """Tells thinking and calls from content, in text that arrives in pieces."""

    @property
    def is_thinking(self) -> bool | None:
        """Whether the text so far ends inside of thinking; None: the next characters will tell."""

    def feed(self, text: str) -> Delta:
        """Takes the next piece; returns what has become certain."""

    def finish(self) -> Delta:
        """The end of the text: what was held back."""


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def short_id() -> str:
    """Nine letters and digits: what Mistral's templates insist on."""
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(9))


class Found:
    """The delta under construction.

    White space between, before and after calls separates them and is not content; an answer of nothing but white
    space is. Everything else that is no call is.
    """

    def __init__(self, new_id: Callable[[], str] = call_id) -> None:
        self.num_calls = 0
        self._new_id = new_id
        self._content: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._reasoning: list[str] = []
        self._space = ""  # held: white space after a call, or at the beginning
        self._is_separating = True

    def content(self, text: str) -> None:
        if self._is_separating:
            self._space += text
            if not self._space or self._space.isspace():
                return
            text, self._space = self._space, ""
            self._is_separating = False
        self._content.append(text)

    def reasoning(self, text: str) -> None:
        self._reasoning.append(text)

    def open_call(self, name: str, given_id: str | None = None) -> None:
        self._calls.append(ToolCallDelta(self.num_calls, given_id or self._new_id(), name))
        self.num_calls += 1
        self._space, self._is_separating = "", True

    def arguments(self, text: str) -> None:
        """More of the newest call's arguments."""
        self._calls.append(ToolCallDelta(self.num_calls - 1, arguments=text))

    def drop_space(self) -> None:
        """White space held so far separated something."""
        if self._is_separating:
            self._space = ""

    def end(self) -> None:
        """The text is over."""
        if self._space and not self.num_calls:
            self._content.append(self._space)
        self._space = ""

    def take(self) -> Delta:
        """What came since the last call."""
        if not (self._content or self._reasoning or self._calls):
            return NOTHING
        delta = Delta("".join(self._content), "".join(self._reasoning), tuple(self._calls))
        self._content, self._reasoning, self._calls = [], [], []
        return delta if len(delta.tool_calls) < 2 else Delta.join([delta, NOTHING])


NOTHING = Delta()


@dataclass(frozen=True)
class CallShape:
    """How calls are written around the JSON of their arguments. NAME stands for the function's name.

    begin, end       around the arguments
    prefix, suffix   around all calls; separator between two
    trigger          what only a call begins with; empty: calls have no marker
    thinking_begin, thinking_end, answer_begin   where thinking and answers are messages beside the calls
    """

    begin: str
    end: str
    separator: str = ""
    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    thinking_begin: str = ""
    thinking_end: str = ""
    answer_begin: str = ""


class ToolParser:
    """A machine over text: `_state` looks at the start of `_rest` and says whether it got anywhere.

    A state returns False when it needs more text. Once `_is_over`, what is there is all there will be.
    """

    # special tokens that the format is written with: they must not be dropped from the text
    markers: ClassVar[tuple[str, ...]] = ()
    shape: ClassVar[CallShape | None] = None
    # the parser, by name, whose shape calls take that must come; for formats whose arguments are no JSON
    forced_form: ClassVar[str | None] = None
    new_id: ClassVar[Callable[[], str]] = staticmethod(call_id)
    is_thinking: bool | None = False

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        """tools: in the form of requests, {"type": "function", "function": {...}}."""
        self._parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._found = Found(type(self).new_id)
        self._rest = ""
        self._state: Callable[[], bool] = self._text
        self._is_over = False

    def feed(self, text: str) -> Delta:
        self._rest += text
        while self._rest and self._state():
            pass
        return self._found.take()

    def finish(self) -> Delta:
        self._is_over = True
        while self._rest and self._state():
            pass
        self._end()
        self._found.end()
        return self._found.take()

    def _text(self) -> bool:
        """The first state."""
        raise NotImplementedError

    def _end(self) -> None:
        """The text has ended in the present state; `_rest` is what that state could not use."""
        self._found.content(self._take(len(self._rest)))

    # ---- tools of states

    def _take(self, count: int) -> str:
        """Removes the first characters of the rest and returns them."""
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def _skip_space(self) -> str:
        """Removes white space from the start of the rest and returns it."""
        return self._take(len(self._rest) - len(self._rest.lstrip()))

    def _content_until(self, markers: Sequence[str]) -> str | None:
        """Moves content up to the first marker; removes and returns that marker, or None when there is none yet."""
        at, marker = find_first(self._rest, markers)
        if marker is None and not self._is_over:
            at = len(self._rest) - len_of_beginning(self._rest, markers)
        self._found.content(self._take(at))
        return None if marker is None else self._take(len(marker))

    def _starts_with(self, texts: Sequence[str]) -> str | None:
        """The longest of the texts with which the rest starts; "" when it starts with none; None: too early to say."""
        hits = [text for text in texts if self._rest.startswith(text)]
        is_open = any(text.startswith(self._rest) and len(text) > len(self._rest) for text in texts)
        if is_open and not self._is_over:
            return None
        return max(hits, key=len, default="")


def find_first(text: str, markers: Sequence[str]) -> tuple[int, str | None]:
    """Where the first of the markers begins, and which; the end of the text and None when there is none."""
    best, found = len(text), None
    for marker in markers:
        at = text.find(marker)
        if at >= 0 and (at < best or (at == best and found is not None and len(marker) > len(found))):
            best, found = at, marker
    return best, found


def len_of_beginning(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of the text that could become a marker."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if marker.startswith(text[-length:]):
                longest = length
                break
    return longest
