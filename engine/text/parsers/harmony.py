"""Channels of GPT-OSS: <|channel|>NAME<|message|>BODY<|end|>, then <|start|>assistant and the next one.

analysis is thinking, final is the answer, commentary to=functions.F is a call of F and otherwise content. A call ends
with <|call|> and the answer with <|return|>, which are end-of-sequence tokens and so usually not in the text.
Source: the "OpenAI Harmony response format" guide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.parsers.base import CallShape, ToolParser, find_first, len_of_beginning
from engine.text.parsers.registry import tool_parser

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MAX_HEADER_CHARS = 512
RECIPIENT = re.compile(r"to=(?:functions\.)?([A-Za-z0-9_.:-]+)")
NAME = re.compile(r"<\|channel\|>\s*([A-Za-z]+)")


@tool_parser("harmony", "openai")
class Harmony(ToolParser):
    markers = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
    shape = CallShape(
        "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
        "<|call|>",
        separator="<|start|>assistant",
        thinking_begin=ANALYSIS,
        thinking_end="<|end|>",
        answer_begin=FINAL,
    )

    def __init__(self, tools: Sequence[Mapping[str, Any]] = (), *, has_reasoning: bool = True) -> None:
        super().__init__(tools)
        self._has_reasoning = has_reasoning
        self._is_first = True
        self.is_thinking = None

    def _text(self) -> bool:
        """Before a message: its header, up to <|message|>."""
        openings = (START, CHANNEL)
        opening = self._starts_with(openings)
        if opening is None:
            return False
        # the prompt ends with <|start|>assistant, after which a recipient may stand before the channel
        if not opening and not (self._is_first and self._rest.startswith(" to=")):
            if self._is_first and not self._is_over and " to=".startswith(self._rest):
                return False
            return self._bare()
        end = self._rest.find(MESSAGE)
        if end < 0 and len(self._rest) <= MAX_HEADER_CHARS:
            return False
        if not 0 <= end <= MAX_HEADER_CHARS:
            self._found.content(self._take(len(opening)))
            return self._bare()
        header = self._take(end)
        self._take(len(MESSAGE))
        self._is_first = False
        self._open(header)
        return True

    def _bare(self) -> bool:
        """Text outside of any message: content, up to the next message."""
        self.is_thinking = self._is_first = False
        marker = self._content_until((*ENDS, START, CHANNEL))
        if marker is None:
            return False
        if marker not in ENDS:
            self._rest = marker + self._rest
        return True

    def _open(self, header: str) -> None:
        name, recipient = NAME.search(header), RECIPIENT.search(header)
        self.is_thinking = False
        if recipient is not None and self._parameters:
            self._found.open_call(recipient[1])
            self._body = self._found.arguments
        elif name is not None and name[1] == "analysis" and self._has_reasoning:
            self.is_thinking = True
            self._body = self._found.reasoning
        else:
            self._body = self._found.content
        self._state = self._message

    def _message(self) -> bool:
        ends = (*ENDS, START)
        at, marker = find_first(self._rest, ends)
        if marker is None and not self._is_over:
            at -= len_of_beginning(self._rest, ends)
        if at:
            self._body(self._take(at))
        if marker is None:
            return False
        if marker != START:
            self._take(len(marker))
        self.is_thinking = None
        self._state = self._text
        return True
