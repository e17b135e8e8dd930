"""Thinking that stands before an answer, between two markers: <think> ... </think> and its relatives.

White space around the thinking belongs to the markers, so that templates that write it back with their own get the
same text. Only a block at the very beginning is thinking; what looks like one later is content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.text.parsers.base import NOTHING, find_first, len_of_beginning
from engine.types import Delta

# How much of a prompt's end is searched for an opened block, in characters.
TAIL_CHARS = 256


@dataclass(frozen=True)
class Thinking:
    """How a format marks thinking.

    starts, ends   any of them; the first are those that the model writes
    is_implicit    the answer begins with thinking even when nothing says so
    forced_end     what ends the thinking of a request that has used up its budget
    """

    starts: tuple[str, ...]
    ends: tuple[str, ...]
    forced_end: str
    is_implicit: bool = False

    def is_open(self, prompt: str, *, is_continued: bool) -> bool:
        """Whether an answer to this prompt begins inside of thinking.

        is_continued   the prompt ends within an unfinished answer: its thinking may have begun long before
        """
        start = max(prompt.rfind(marker) for marker in self.starts)
        end = max(prompt.rfind(marker) for marker in self.ends)
        if start > end:
            behind = next(prompt[start + len(m) :] for m in self.starts if prompt.startswith(m, start))
            if is_continued or not behind.strip():
                return True
        if not self.is_implicit or is_continued:
            return False
        # closed by the template itself: thinking is switched off
        return not any(prompt.rstrip().endswith(marker) for marker in self.ends)


class ContentParser(Protocol):
    """What looks at the text that is no thinking."""

    def feed(self, text: str) -> Delta: ...

    def finish(self) -> Delta: ...


class PlainContent:
    """All of it is content."""

    def feed(self, text: str) -> Delta:
        return Delta(content=text)

    def finish(self) -> Delta:
        return NOTHING


class ThinkingParser:
    """Splits thinking off and passes the rest on."""

    def __init__(self, thinking: Thinking, content: ContentParser, *, is_open: bool) -> None:
        self.is_thinking: bool | None = True if is_open else None
        self._thinking = thinking
        self._content = content
        self._rest = ""
        self._is_beginning = True  # a start marker may still come
        self._is_behind = False  # between an end marker and the answer

    def feed(self, text: str) -> Delta:
        if self.is_thinking is False and not self._is_behind:
            return self._content.feed(text)
        self._rest += text
        return self._advance(is_over=False)

    def finish(self) -> Delta:
        delta = self._advance(is_over=True)
        rest, self._rest = self._rest, ""
        last = NOTHING
        if self.is_thinking:
            last = Delta(reasoning=rest)
        elif not self._is_behind:
            last = self._content.feed(rest)
        return Delta.join([delta, last, self._content.finish()])

    def _advance(self, *, is_over: bool) -> Delta:
        if self._is_beginning and not self._begin(is_over):
            return NOTHING
        reasoning = self._read_thinking() if self.is_thinking else ""
        if self.is_thinking:
            return Delta(reasoning=reasoning)
        if self._is_behind:
            self._rest = self._rest.lstrip()
            if not self._rest:
                return Delta(reasoning=reasoning)
            self._is_behind = False
        text, self._rest = self._rest, ""
        delta = self._content.feed(text)
        return Delta(delta.content, reasoning, delta.tool_calls) if reasoning else delta

    def _begin(self, is_over: bool) -> bool:
        """Looks for a start marker. False when it is too early to say."""
        stripped = self._rest.lstrip()
        if not is_over and any(marker.startswith(stripped) and marker != stripped for marker in self._thinking.starts):
            return False
        marker = next((marker for marker in self._thinking.starts if stripped.startswith(marker)), None)
        if marker is not None:
            self.is_thinking = True
            stripped = stripped[len(marker) :].lstrip()
            if not stripped and not is_over:
                self._rest = marker
                return False
        self._is_beginning = False
        if self.is_thinking:
            self._rest = stripped
        else:
            self.is_thinking = False
        return True

    def _read_thinking(self) -> str:
        """Takes thinking off the rest, as far as it is certain, without white space at its end."""
        ends: Sequence[str] = self._thinking.ends
        at, marker = find_first(self._rest, ends)
        if marker is not None:
            text, self._rest = self._rest[:at].rstrip(), self._rest[at + len(marker) :]
            self.is_thinking, self._is_behind = False, True
            return text
        at -= len_of_beginning(self._rest, ends)
        text = self._rest[:at].rstrip()
        self._rest = self._rest[len(text) :]
        return text
