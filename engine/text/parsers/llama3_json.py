"""{"name": ..., "parameters": {...}}, several behind semicolons, sometimes behind <|python_tag|>: Llama 3.

Without a marker only an answer that begins with such an object is calls, and only with the name of a given function:
an answer may be JSON on its own account.
"""

from __future__ import annotations

from engine.text.parsers.base import CallShape
from engine.text.parsers.json_call import CallObject
from engine.text.parsers.json_calls import JsonCalls
from engine.text.parsers.registry import tool_parser

TAG = "<|python_tag|>"


@tool_parser("llama3_json", "llama4_json")
class Llama3Json(JsonCalls):
    begins = (TAG,)
    markers = (TAG,)
    separators = ";"
    shape = CallShape('{"name": "NAME", "parameters": ', "}", separator="; ")

    def _text(self) -> bool:
        """The very beginning: an object here is a call without a marker."""
        space = self._skip_space()
        if not self._rest and not self._is_over:
            self._rest = space
            return False
        self._state = self._later_text
        if self._rest.startswith("{"):
            self._begin(space)
        else:
            self._found.content(space)
        return True

    def _later_text(self) -> bool:
        return super()._text()

    def _refuse(self) -> None:
        super()._refuse()
        self._state = self._later_text

    def _new_object(self) -> CallObject:
        return CallObject(self._found, self._parameters.__contains__, is_strict=True)
