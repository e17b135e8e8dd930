"""[TOOL_CALLS]: an array of call objects, or since tokenizer v11 a name, [ARGS] and the arguments, once per call.

Ids are nine letters and digits, which Mistral's templates insist on when they get the call back.
"""

from __future__ import annotations

import re

from engine.text.parsers.base import MAX_NAME_CHARS, CallShape, short_id
from engine.text.parsers.json_call import JsonValue, Scan
from engine.text.parsers.json_calls import JsonCalls
from engine.text.parsers.registry import tool_parser

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
HEAD = re.compile(rf"\s*([A-Za-z0-9_.-]+)\s*(?:{re.escape(CALL_ID)}\s*([A-Za-z0-9]+)\s*)?(?:{re.escape(ARGS)})?\s*")


@tool_parser("mistral")
class Mistral(JsonCalls):
    begins = (CALLS,)
    markers = (CALLS, ARGS, CALL_ID)
    new_id = staticmethod(short_id)
    shape = CallShape(
        '{"name": "NAME", "arguments": ', "}", separator=", ", prefix="[TOOL_CALLS][", suffix="]", trigger=CALLS
    )

    def _begin(self, marker: str) -> None:
        super()._begin(marker)
        self._state = self._which

    def _which(self) -> bool:
        """An array or object, or a name."""
        self._raw += self._skip_space()
        if not self._rest:
            return False
        self._state = self._body if self._rest[0] in "[{" else self._head
        return True

    def _head(self) -> bool:
        """The name, perhaps an id, up to the brace of the arguments."""
        brace = self._rest.find("{")
        match = HEAD.fullmatch(self._rest[:brace]) if 0 <= brace <= MAX_NAME_CHARS else None
        if brace < 0 and not self._is_over and len(self._rest) <= MAX_NAME_CHARS:
            return False
        if match is None:
            self._refuse()
            return True
        self._take(brace)
        self._found.open_call(match[1], match[2])
        self._raw = ""
        self._value = JsonValue()
        self._state = self._arguments
        return True

    def _arguments(self) -> bool:
        self._found.arguments(self._take(self._value.feed(self._rest)))
        if self._value.state is Scan.READING:
            return False
        self._state = self._text
        return True

    def _end(self) -> None:
        if self._state in (self._which, self._head):
            self._found.content(self._raw)
        super()._end()
