"""The machine of all formats that write calls as JSON objects behind a marker: one, several, or an array of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from engine.text.parsers.base import ToolParser
from engine.text.parsers.json_call import CallObject, Scan


class JsonCalls(ToolParser):
    """begins   what introduces calls
    ends        what may stand behind them; nothing is lost when it is missing
    separators  what may stand between two objects outside of an array
    """

    begins: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[tuple[str, ...]] = ()
    separators: ClassVar[str] = ""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(tools)
        self._raw = ""  # taken since the marker, while no call has been announced
        self._object: CallObject | None = None
        self._is_list = False
        self._num_before = 0  # calls before the marker

    def _text(self) -> bool:
        marker = self._content_until(self.begins)
        if marker is None:
            return False
        self._begin(marker)
        return True

    def _begin(self, marker: str) -> None:
        self._raw, self._is_list, self._num_before = marker, False, self._found.num_calls
        self._state = self._body

    def _body(self) -> bool:
        """Between objects: brackets, separators, white space."""
        self._raw += self._skip_space()
        if not self._rest:
            return False
        char = self._rest[0]
        has_calls = self._found.num_calls > self._num_before
        if char == "{":
            self._object = self._new_object()
            self._state = self._in_object
        elif char == "[" and not self._is_list and not has_calls:
            self._is_list = True
            self._raw += self._take(1)
        elif char == "," and self._is_list and has_calls:
            self._take(1)
        elif char == "]" and self._is_list and has_calls:
            self._take(1)
            self._state = self._after
        elif has_calls:
            self._state = self._after
        else:
            self._refuse()
        return True

    def _new_object(self) -> CallObject:
        return CallObject(self._found)

    def _in_object(self) -> bool:
        call = self._object
        assert call is not None
        self._take(call.feed(self._rest))
        if call.state is Scan.READING:
            return False
        if call.state is Scan.BROKEN and not call.is_open:
            self._raw += call.raw
            if self._found.num_calls > self._num_before:
                self._found.content(self._raw)
                self._state = self._after
            else:
                self._refuse()
            return True
        self._raw = ""
        self._state = self._body if self._is_list and call.state is Scan.DONE else self._after
        return True

    def _refuse(self) -> None:
        """What followed the marker is no call."""
        self._found.content(self._raw)
        self._raw = ""
        self._state = self._text

    def _after(self) -> bool:
        """Behind calls: an end marker belongs to them, and so does a separator before another object."""
        if not self._is_list and self.separators:
            stripped = self._rest.lstrip()
            if not stripped and not self._is_over:
                return False
            if stripped and stripped[0] in self.separators:
                self._rest = stripped[1:]
                self._begin(stripped[0])
                return True
        if not self.ends:
            self._state = self._text
            return True
        marker = self._content_until((*self.ends, *self.begins))
        if marker is None:
            return False
        self._found.drop_space()
        if marker in self.ends:
            self._state = self._text
        else:
            self._begin(marker)
        return True

    def _end(self) -> None:
        if self._state == self._in_object and self._object is not None:
            self._object.end()
            self._found.content("" if self._object.is_open else self._raw + self._object.raw)
        elif self._state == self._body:
            self._found.content(self._raw if self._found.num_calls == self._num_before else "")
        super()._end()
