"""Items of the Responses API as chat messages, and as they are listed. Items are plain dicts here, checked before."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Item = Mapping[str, Any]
Message = dict[str, Any]

# a part of an assistant message -> what must not be there yet
_LATER: dict[str, tuple[str, ...]] = {
    "reasoning_content": ("reasoning_content", "content", "tool_calls"),
    "content": ("content", "tool_calls"),
    "tool_calls": (),
}
_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_"}


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


def with_id(item: Item) -> dict[str, Any]:
    """The item with an id of its own, under which it is listed and can be referred to."""
    return {"id": new_id(_PREFIXES[item["type"]]), **item}


def user_item(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def listed(item: Item) -> dict[str, Any]:
    """As the API shows an input item: content as parts, with a status."""
    shown = {**item, "status": item.get("status", "completed")}
    if shown["type"] == "message" and isinstance(shown["content"], str):
        kind = "output_text" if shown["role"] == "assistant" else "input_text"
        part: dict[str, Any] = {"type": kind, "text": shown["content"]}
        shown["content"] = [{**part, "annotations": []} if kind == "output_text" else part]
    return shown


def to_messages(instructions: str | None, items: Iterable[Item]) -> list[Message]:
    """Chat messages.

    Instructions and system or developer messages at the very beginning become one system message, since many templates
    take no second one. What one turn of the assistant wrote (thinking, text, calls) becomes one assistant message.
    """
    writer = _MessageWriter(instructions)
    for item in items:
        writer.add(item)
    return writer.messages


class _MessageWriter:
    def __init__(self, instructions: str | None) -> None:
        self.messages: list[Message] = []
        if instructions:
            self.messages.append({"role": "system", "content": instructions})

    def add(self, item: Item) -> None:
        kind = item["type"]
        if kind == "message":
            self._add_message(item["role"], item["content"])
        elif kind == "reasoning":
            text = "\n".join(part["text"] for part in item.get("content") or item.get("summary") or ())
            if text:
                self._assistant("reasoning_content")["reasoning_content"] = text
        elif kind == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            self._assistant("tool_calls").setdefault("tool_calls", []).append(call)
        else:
            output = _content(item["output"])
            self.messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})

    def _add_message(self, role: str, content: Any) -> None:
        if role == "assistant":
            self._assistant("content")["content"] = _content(content)
            return
        is_first = len(self.messages) == 1 and self.messages[0]["role"] in ("system", "developer")
        if role in ("system", "developer") and is_first:
            first = self.messages[0]
            first["content"] = _plain(first["content"]) + "\n\n" + _plain(_content(content))
            return
        self.messages.append({"role": role, "content": _content(content)})

    def _assistant(self, part: str) -> Message:
        """The assistant message that `part` still fits into: thinking, then text, then calls."""
        last = self.messages[-1] if self.messages else None
        if last is not None and last["role"] == "assistant" and not any(last.get(name) for name in _LATER[part]):
            return last
        message: Message = {"role": "assistant", "content": None}
        self.messages.append(message)
        return message


def _content(content: str | Sequence[Item]) -> str | list[dict[str, Any]]:
    """One part alone as its text, several as text parts: how they are joined is up to the template."""
    if isinstance(content, str):
        return content
    texts = [part.get("text") or part.get("refusal") or "" for part in content]
    if len(texts) <= 1:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _plain(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
