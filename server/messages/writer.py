"""The message object and its stream of events, from the chat pipeline's events."""

from __future__ import annotations

import base64
import hashlib
import secrets
from typing import Any

import pydantic_core

from engine.types import TextOutput, ToolCallDelta
from server.anthropic_errors import envelope
from server.chat_pipeline import ChatJob, ChoiceEvent, EventReader
from server.errors import ApiError
from server.sse import Wording, named_frame


class MessageWriter(Wording):
    """One message: its blocks are built once, and told as events when somebody listens. Also its stream's wording."""

    keep_alive = named_frame("ping", {"type": "ping"})
    done = b""  # message_stop is the end

    def __init__(self, job: ChatJob, *, shows_thinking: bool) -> None:
        self._reader = EventReader(job)
        self._stop_sequences = frozenset(job.request.stop)
        self._shows_thinking = shows_thinking
        self._frames: list[bytes] | None = None  # where events go now; None: nobody listens
        self._blocks: list[dict[str, Any]] = []
        self._open: str | None = None  # type of the block that is written
        self._texts: list[str] = []  # of the open block
        self._call_index: int | None = None
        self._last: ChoiceEvent | None = None
        self.answer_id = f"msg_{secrets.token_hex(12)}"
        self._message: dict[str, Any] = {
            "id": self.answer_id,
            "type": "message",
            "role": "assistant",
            "model": job.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": None,
        }

    def whole(self, events: list[ChoiceEvent]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        for event in events:
            self.add(event)
        self._finish()
        return {**self._message, "content": self._blocks, **self._stop(), "usage": self._usage()}

    def write(self, frames: list[bytes], index: int, output: TextOutput) -> None:
        """As `ChunkWriter.write`."""
        self._frames = frames
        event = self._reader.read(output)
        if self._last is None:
            self._last = event
            self._tell("message_start", message={**self._message, "usage": self._usage()})
        self.add(event)

    def end(self, frames: list[bytes]) -> None:
        """As `ChunkWriter.end`."""
        self._frames = frames
        self._finish()
        self._tell("message_delta", delta=self._stop(), usage=self._usage())
        self._tell("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return named_frame("error", envelope(error.status, error.error))

    def add(self, event: ChoiceEvent) -> None:
        """What became known, in the order in which a model writes: thinking, text, calls."""
        self._last = event
        delta = event.delta
        if delta.reasoning:
            self._add_thinking(delta.reasoning)
        if delta.content:
            self._add_text(delta.content)
        for call in delta.tool_calls:
            self._add_call(call)

    def _add_thinking(self, text: str) -> None:
        if self._open != "thinking":
            self._begin({"type": "thinking", "thinking": "", "signature": ""})
        if self._shows_thinking:
            self._texts.append(text)
            self._tell_delta(type="thinking_delta", thinking=text)

    def _add_text(self, text: str) -> None:
        if self._open != "text":
            self._begin({"type": "text", "text": ""})
        self._texts.append(text)
        self._tell_delta(type="text_delta", text=text)

    def _add_call(self, call: ToolCallDelta) -> None:
        if self._open != "tool_use" or call.index != self._call_index:
            self._call_index = call.index
            call_id = call.id or f"toolu_{secrets.token_hex(12)}"
            self._begin({"type": "tool_use", "id": call_id, "name": call.name or "", "input": {}})
        if call.arguments:
            self._texts.append(call.arguments)
            self._tell_delta(type="input_json_delta", partial_json=call.arguments)

    def _begin(self, block: dict[str, Any]) -> None:
        self._end_block()
        self._open = block["type"]
        self._blocks.append(block)
        self._tell("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _end_block(self) -> None:
        if self._open is None:
            return
        block, text = self._blocks[-1], "".join(self._texts)
        if self._open == "text":
            block["text"] = text
        elif self._open == "thinking":
            block["thinking"] = text
            block["signature"] = _signature(text)
            self._tell_delta(type="signature_delta", signature=block["signature"])
        else:
            block["input"] = _input(text)
        self._tell("content_block_stop", index=len(self._blocks) - 1)
        self._open, self._texts = None, []

    def _finish(self) -> None:
        """Ends the open block. There is always one, since clients look at the first."""
        if not self._blocks:
            self._begin({"type": "text", "text": ""})
        self._end_block()

    def _stop(self) -> dict[str, Any]:
        assert self._last is not None
        if self._last.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if any(block["type"] == "tool_use" for block in self._blocks):
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if self._last.stop_reason in self._stop_sequences:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._last.stop_reason}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Cached tokens are not among the input tokens; writing to the prefix cache costs nothing."""
        last = self._last
        assert last is not None
        return {
            "input_tokens": last.num_prompt_tokens - last.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": last.num_cached_tokens,
            "output_tokens": last.num_output_tokens,
            "output_tokens_details": {"thinking_tokens": last.num_reasoning_tokens},
        }

    def _tell_delta(self, **delta: str) -> None:
        self._tell("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _tell(self, event: str, **fields: Any) -> None:
        if self._frames is not None:
            self._frames.append(named_frame(event, {"type": event, **fields}))


def _input(text: str) -> Any:
    """The arguments of a call as an object; of one that was cut off, what of it is there."""
    value = pydantic_core.from_json(text or "{}", allow_partial=True)
    return value if isinstance(value, dict) else {}


def _signature(text: str) -> str:
    """Clients want one and send it back. It proves nothing and is not checked."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()).decode("ascii")
