"""DeepSeek: one call between <｜tool▁call▁begin｜> and <｜tool▁call▁end｜>, all of them between markers of their own.

V3 and R1 write `function<｜tool▁sep｜>NAME`, a line break and the arguments in a JSON code block; V3.1 and later write
`NAME<｜tool▁sep｜>ARGUMENTS`. Both forms are told apart by what follows the separator.
"""

from __future__ import annotations

import re

from engine.text.parsers.base import MAX_NAME_CHARS, CallShape, ToolParser
from engine.text.parsers.json_call import JsonValue, Scan
from engine.text.parsers.registry import tool_parser

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FENCE = "```"
MAX_HEAD_CHARS = 2 * MAX_NAME_CHARS
FENCED = re.compile(r"\s*([^\s{`]+)\s*(?:```)?(?:json)?\s*")  # the name before arguments in a code block


class DeepSeek(ToolParser):
    markers = (CALLS_BEGIN, CALLS_END, BEGIN, SEPARATOR, END)

    def _text(self) -> bool:
        marker = self._content_until((CALLS_BEGIN, BEGIN, CALLS_END))
        if marker is None:
            return False
        if marker == BEGIN:
            self._state = self._head
        elif marker == CALLS_BEGIN:
            self._state = self._opened
        elif self._found.num_calls:
            self._found.drop_space()
        else:
            self._found.content(marker)
        return True

    def _opened(self) -> bool:
        """Behind the marker that precedes all calls."""
        stripped = self._rest.lstrip()
        if not self._is_over and len(stripped) < len(BEGIN) and BEGIN.startswith(stripped):
            return False
        if stripped.startswith(BEGIN):
            self._rest = stripped
        else:
            self._found.content(CALLS_BEGIN)
        self._state = self._text
        return True

    def _head(self) -> bool:
        """Everything up to the brace of the arguments."""
        brace = self._rest.find("{")
        head = self._rest[:brace] if brace >= 0 else self._rest
        is_possible = len(head) <= MAX_HEAD_CHARS and END not in head
        if brace < 0 and is_possible and not self._is_over:
            return False
        first, separator, second = head.partition(SEPARATOR)
        name = first.strip()
        if second.strip():
            fenced = FENCED.fullmatch(second)
            name = fenced[1] if fenced is not None else ""
        if brace < 0 or not is_possible or not separator or not name or not name.isprintable() or " " in name:
            self._found.content(BEGIN)
            self._state = self._text
            return True
        self._take(brace)
        self._found.open_call(name)
        self._value = JsonValue()
        self._state = self._arguments
        return True

    def _arguments(self) -> bool:
        self._found.arguments(self._take(self._value.feed(self._rest)))
        if self._value.state is Scan.READING:
            return False
        self._state = self._after
        return True

    def _after(self) -> bool:
        """Behind the arguments: the end of the code block is part of the call."""
        stripped = self._rest.lstrip()
        if not self._is_over and len(stripped) < len(FENCE) and FENCE.startswith(stripped):
            return False
        if stripped.startswith(FENCE):
            self._rest = stripped[len(FENCE) :]
        self._state = self._behind_fence
        return True

    def _behind_fence(self) -> bool:
        marker = self._content_until((END, BEGIN, CALLS_END))
        if marker is None:
            return False
        self._found.drop_space()
        self._state = self._head if marker == BEGIN else self._text
        return True

    def _end(self) -> None:
        if self._state == self._head:
            self._found.content(BEGIN)
        elif self._state == self._opened:
            self._found.content(CALLS_BEGIN)
        super()._end()


@tool_parser("deepseek_v3", "deepseek_r1")
class DeepSeekV3(DeepSeek):
    shape = CallShape(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
        "\n```<｜tool▁call▁end｜>",
        separator="\n",
        prefix=CALLS_BEGIN,
        suffix=CALLS_END,
        trigger=CALLS_BEGIN,
    )


@tool_parser("deepseek_v31")
class DeepSeekV31(DeepSeek):
    shape = CallShape(
        "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        prefix=CALLS_BEGIN,
        suffix=CALLS_END,
        trigger=CALLS_BEGIN,
    )
