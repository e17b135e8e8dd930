"""<tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>: Qwen 3 Coder.

Values are bare text; the tool's schema says which of them are no strings. Each value becomes JSON when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.parsers.base import MAX_NAME_CHARS, ToolParser
from engine.text.parsers.registry import tool_parser

CALL, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"


@tool_parser("qwen3_coder", "qwen3_xml")
class Qwen3Coder(ToolParser):
    markers = (CALL, CALL_END)
    # its arguments are no JSON, so calls that must come are written in Hermes' form and read as such
    forced_form = "hermes"

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(tools)
        self._raw = ""  # taken, while no call has been announced
        self._name = ""
        self._key = ""
        self._num_arguments = 0

    def _text(self) -> bool:
        """Some models leave out <tool_call>."""
        marker = self._content_until((CALL, FUNCTION))
        if marker is None:
            return False
        self._raw = marker
        self._state = self._function if marker == CALL else self._function_name
        return True

    def _function(self) -> bool:
        self._raw += self._skip_space()
        marker = self._starts_with((FUNCTION,))
        if marker is None or not self._rest:
            return False
        if not marker:
            return self._refuse()
        self._raw += self._take(len(marker))
        self._state = self._function_name
        return True

    def _function_name(self) -> bool:
        end = self._name_end()
        if end is None:
            return False
        name = self._rest[:end].strip() if end >= 0 else ""
        if not name:
            return self._refuse()
        self._take(end + 1)
        self._found.open_call(name)
        self._raw, self._name, self._num_arguments = "", name, 0
        self._state = self._parameter
        return True

    def _name_end(self) -> int | None:
        """Where the ">" behind a name is; -1 when there is none to come; None when it is too early to say."""
        end = self._rest.find(">")
        if 0 <= end <= MAX_NAME_CHARS:
            return end
        return None if end < 0 and len(self._rest) <= MAX_NAME_CHARS and not self._is_over else -1

    def _parameter(self) -> bool:
        """Between values."""
        self._skip_space()
        marker = self._starts_with((PARAMETER, FUNCTION_END))
        if marker is None or not self._rest:
            return False
        if marker == PARAMETER:
            self._take(len(marker))
            self._state = self._parameter_name
        else:
            self._take(len(marker))
            self._found.arguments("}" if self._num_arguments else "{}")
            self._state = self._after
        return True

    def _parameter_name(self) -> bool:
        end = self._name_end()
        if end is None:
            return False
        if end < 0:
            self._rest = PARAMETER + self._rest
            self._state = self._after
            return True
        self._key = self._rest[:end].strip()
        self._take(end + 1)
        self._state = self._value
        return True

    def _value(self) -> bool:
        """A value is written between line breaks of its own."""
        end = self._rest.find(PARAMETER_END)
        if end < 0:
            return False
        self._pass(_trimmed(self._rest[:end]))
        self._take(end + len(PARAMETER_END))
        self._state = self._parameter
        return True

    def _pass(self, value: str, *, is_cut: bool = False) -> None:
        text = json.dumps(value, ensure_ascii=False)[:-1] if is_cut else self._to_json(value)
        key = json.dumps(self._key, ensure_ascii=False)
        self._found.arguments(f"{', ' if self._num_arguments else '{'}{key}: {text}")
        self._num_arguments += 1

    def _to_json(self, value: str) -> str:
        """As the schema has it; a value that is not of its type stays a string."""
        properties = self._parameters.get(self._name, {}).get("properties", {})
        schema = properties.get(self._key)
        kinds = schema.get("type", "string") if isinstance(schema, dict) else "string"
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if isinstance(schema, dict) and "type" not in schema and schema:
            kinds = ["object"]  # anyOf, $ref and the like: JSON where it is JSON
        if any(kind != "string" for kind in kinds):
            try:
                return json.dumps(json.loads(_as_json_word(value.strip())), ensure_ascii=False, allow_nan=False)
            except (ValueError, RecursionError):
                return json.dumps(value, ensure_ascii=False)
        return json.dumps(value, ensure_ascii=False)

    def _after(self) -> bool:
        marker = self._content_until((CALL_END, CALL, FUNCTION))
        if marker is None:
            return False
        self._found.drop_space()
        if marker == CALL_END:
            self._state = self._text
        else:
            self._raw = marker
            self._state = self._function if marker == CALL else self._function_name
        return True

    def _refuse(self) -> bool:
        self._found.content(self._raw)
        self._raw = ""
        self._state = self._text
        return True

    def _end(self) -> None:
        if self._state == self._value:
            self._pass(self._take(len(self._rest)).removeprefix("\n"), is_cut=True)
        elif self._state == self._parameter_name:
            self._rest = PARAMETER + self._rest
        self._found.content(self._raw)
        super()._end()


def _trimmed(value: str) -> str:
    return value.removeprefix("\n").removesuffix("\n")


def _as_json_word(value: str) -> str:
    """Python's words for JSON's."""
    return {"True": "true", "False": "false", "None": "null"}.get(value, value)
