"""Output items of a response, built from the chat pipeline's events, with every change told as an event.

The same builder makes streamed and whole answers: without a listener it only builds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.types import Delta, ToolCallDelta
from server import logprobs
from server.chat_pipeline import ChoiceEvent
from server.responses.items import new_id

NOTHING = Delta()
# (event type, its fields without type and sequence_number)
Listener = Callable[[str, dict[str, Any]], None]


class _Item:
    """One output item while it is written."""

    prefix: str
    kind: str

    def __init__(self, index: int, tell: Listener) -> None:
        self.id = new_id(self.prefix)
        self.index = index
        self._tell = tell
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def open(self) -> None:
        self._tell("response.output_item.added", {"output_index": self.index, "item": self.as_dict("in_progress")})

    def add(self, text: str, entries: list[dict[str, Any]] | None = None) -> None:
        """`entries` are log-probabilities of the text."""
        raise NotImplementedError

    def close(self, status: str) -> dict[str, Any]:
        """Tells the ends of the parts and of the item, which is returned."""
        item = self.as_dict(status)
        self._tell("response.output_item.done", {"output_index": self.index, "item": item})
        return item

    def as_dict(self, status: str) -> dict[str, Any]:
        raise NotImplementedError

    def _say(self, event: str, **fields: Any) -> None:
        self._tell(event, {"item_id": self.id, "output_index": self.index, **fields})


class _Parts(_Item):
    """An item whose text is its only content part."""

    event: str

    def open(self) -> None:
        super().open()
        self._say("response.content_part.added", content_index=0, part=self._part())

    def close(self, status: str) -> dict[str, Any]:
        self._say(f"response.{self.event}.done", content_index=0, text=self.text, **self._details())
        self._say("response.content_part.done", content_index=0, part=self._part())
        return super().close(status)

    def _part(self) -> dict[str, Any]:
        raise NotImplementedError

    def _details(self) -> dict[str, Any]:
        return {}


class _Reasoning(_Parts):
    prefix, kind, event = "rs_", "reasoning", "reasoning_text"

    def add(self, text: str, entries: list[dict[str, Any]] | None = None) -> None:
        self._texts.append(text)
        self._say("response.reasoning_text.delta", content_index=0, delta=text)

    def as_dict(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        return {"id": self.id, "type": self.kind, "summary": [], "content": content, "status": status}

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}


class _Message(_Parts):
    prefix, kind, event = "msg_", "message", "output_text"

    def __init__(self, index: int, tell: Listener) -> None:
        super().__init__(index, tell)
        self._logprobs: list[dict[str, Any]] = []

    def add(self, text: str, entries: list[dict[str, Any]] | None = None) -> None:
        self._texts.append(text)
        self._logprobs += entries or []
        self._say("response.output_text.delta", content_index=0, delta=text, logprobs=entries or [])

    def as_dict(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        return {"id": self.id, "type": self.kind, "status": status, "role": "assistant", "content": content}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._logprobs)}

    def _details(self) -> dict[str, Any]:
        return {"logprobs": list(self._logprobs)}


class _Call(_Item):
    prefix, kind = "fc_", "function_call"

    def __init__(self, index: int, tell: Listener, call_id: str, name: str) -> None:
        super().__init__(index, tell)
        self._call_id = call_id
        self._name = name

    def add(self, text: str, entries: list[dict[str, Any]] | None = None) -> None:
        self._texts.append(text)
        self._say("response.function_call_arguments.delta", delta=text)

    def close(self, status: str) -> dict[str, Any]:
        self._say("response.function_call_arguments.done", name=self._name, arguments=self.text)
        return super().close(status)

    def as_dict(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": self.kind,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
            "status": status,
        }


class OutputBuilder:
    """The items of one answer. Items follow each other: one is open at a time."""

    def __init__(self, tell: Listener, *, num_top_logprobs: int = 0, as_ids: bool = False) -> None:
        self.items: list[dict[str, Any]] = []  # those that are complete
        self._tell = tell
        self._num_top = num_top_logprobs
        self._as_ids = as_ids
        self._open: _Item | None = None
        self._call_index: int | None = None
        self._early: list[dict[str, Any]] = []  # log-probabilities of tokens whose text is still to come

    def add(self, event: ChoiceEvent) -> None:
        """What became known, in the order in which a model writes: thinking, text, calls."""
        delta = event.delta
        if event.logprobs is not None:
            self._early += logprobs.for_chat(event.logprobs, self._num_top, as_ids=self._as_ids)["content"]
        if delta.reasoning:
            self._reasoning().add(delta.reasoning)
        if delta.content:
            self._message().add(delta.content, self._early)
        if delta != NOTHING:
            self._early = []
        for call in delta.tool_calls:
            item = self._call(call)
            if call.arguments:
                item.add(call.arguments)

    def finish(self, status: str, *, is_whole: bool = True) -> list[dict[str, Any]]:
        """Ends the open item with `status` (completed or incomplete). All items; a whole answer has at least one."""
        if is_whole and self._open is None and not self.items:
            self._message()
        if self._early and isinstance(self._open, _Message):
            self._open.add("", self._early)
        self._end_open(status)
        return self.items

    def _reasoning(self) -> _Item:
        return self._open if isinstance(self._open, _Reasoning) else self._begin(_Reasoning)

    def _call(self, call: ToolCallDelta) -> _Item:
        if isinstance(self._open, _Call) and call.index == self._call_index:
            return self._open
        self._call_index = call.index
        return self._begin(_Call, call.id or new_id("call_"), call.name or "")

    def _message(self) -> _Item:
        return self._open if isinstance(self._open, _Message) else self._begin(_Message)

    def _begin(self, kind: Callable[..., _Item], *args: str) -> _Item:
        self._end_open("completed")
        self._open = kind(len(self.items), self._tell, *args)
        self._open.open()
        return self._open

    def _end_open(self, status: str) -> None:
        if self._open is not None:
            self.items.append(self._open.close(status))
            self._open = None
