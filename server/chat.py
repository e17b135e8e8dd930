"""POST /v1/chat/completions: the OpenAI form of the chat pipeline's events."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.types import Delta, TextOutput
from server import logprobs
from server.body import read_object
from server.chat_pipeline import ChatJob, ChoiceEvent, EventReader, collect, prepare
from server.context import ServerContext
from server.http_responses import json_response
from server.outputs import UsageCounter
from server.schemas import ChatRequest
from server.sse import TextFrames, frame, stream_answer
from server.validation import parse


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        context.require_ready()
        body = await read_object(request, context.config.limits)
        fields = parse(ChatRequest, body, context.config.limits, context.metrics)
        job = await prepare(context, fields, tenant=request.state.tenant, request_id=request.state.request_id)
        writer = ChatWriter(job, context.fingerprint_of(job.model))
        if fields.stream:
            return await stream_answer(context, [job.request], request, writer, answer_id=writer.answer_id)
        return json_response(writer.whole(await collect(context, job, request.receive)))

    return router


class ChatWriter:
    """Words the answer, whole or in chunks."""

    def __init__(self, job: ChatJob, fingerprint: str) -> None:
        fields = job.fields
        self._fields = fields
        self._reader = EventReader(job)
        self._usage = UsageCounter()
        self.answer_id = f"chatcmpl-{secrets.token_hex(16)}"
        self._head = {
            "id": self.answer_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": job.model,
            "system_fingerprint": fingerprint,
        }
        self._echoed = fields.messages[-1].text if fields.echo and fields.messages[-1].role == "assistant" else ""
        options = fields.stream_options
        self._has_usage = options is not None and options.include_usage
        self._is_usage_continuous = options is not None and self._has_usage and options.continuous_usage_stats
        self._started: set[int] = set()
        rest = b'},"logprobs":null,"finish_reason":null}]' + (b',"usage":null' if self._has_usage else b"")
        self._content_frame = TextFrames(self._head, '"delta":{"content":', rest)
        self._is_plain = not (fields.logprobs or fields.return_token_ids or self._is_usage_continuous)

    def whole(self, events: list[ChoiceEvent]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        for event in events:
            self._usage.add(0, event)
        answer: dict[str, Any] = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._whole_choice(event) for event in events],
            "usage": self._usage.as_dict(),
        }
        first = events[0]
        if self._fields.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.for_prompt(first.prompt_logprobs, self._fields.prompt_logprobs)
        if self._fields.return_token_ids:
            answer["prompt_token_ids"] = first.prompt_token_ids
        if self._fields.service_tier is not None:
            answer["service_tier"] = "default"
        return answer

    def write(self, frames: list[bytes], index: int, output: TextOutput) -> None:
        if self._is_plain and output.finish_reason is None and output.choice in self._started:
            delta = output.delta
            if delta is None or not (delta.reasoning or delta.tool_calls):  # nearly every piece of nearly every stream
                self._usage.add(index, output)
                text = output.text if delta is None else delta.content
                if text:
                    frames.append(self._content_frame(output.choice, text))
                return
        event = self._reader.read(output)
        self._usage.add(index, event)
        choice = event.choice
        if choice not in self._started:
            self._started.add(choice)
            frames.append(self._role_frame(event))
            if self._echoed:
                frames.append(self._content_frame(choice, self._echoed))
        delta = event.delta
        if self._is_plain and not delta.reasoning and not delta.tool_calls:
            if delta.content:
                frames.append(self._content_frame(choice, delta.content))
        else:
            frames += self._delta_frames(event)
        if event.finish_reason is not None:
            extras = {"finish_reason": event.finish_reason, "stop_reason": event.stop_reason}
            frames.append(self._frame(event, {}, extras))

    def end(self, frames: list[bytes]) -> None:
        if self._has_usage:
            frames.append(frame({**self._head, "choices": [], "usage": self._usage.as_dict()}))

    def _delta_frames(self, event: ChoiceEvent) -> list[bytes]:
        """One chunk per kind of content; log-probabilities and token ids ride with the first."""
        deltas = _deltas(event.delta)
        if not deltas and not event.token_ids:
            return []
        extras = self._extras(event)
        frames = [self._frame(event, deltas[0] if deltas else {"content": ""}, extras)]
        return frames + [self._frame(event, delta, {}) for delta in deltas[1:]]

    def _role_frame(self, event: ChoiceEvent) -> bytes:
        top: dict[str, Any] = {}
        if self._fields.return_token_ids:
            top["prompt_token_ids"] = event.prompt_token_ids
        if self._fields.service_tier is not None:
            top["service_tier"] = "default"
        return self._frame(event, {"role": "assistant", "content": ""}, {}, top)

    def _frame(
        self,
        event: ChoiceEvent,
        delta: Mapping[str, Any],
        extras: Mapping[str, Any],
        top: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": event.choice, "delta": delta, "logprobs": None, "finish_reason": None, **extras}
        chunk: dict[str, Any] = {**self._head, "choices": [choice], **(top or {})}
        if self._has_usage:
            chunk["usage"] = self._usage.as_dict() if self._is_usage_continuous else None
        return frame(chunk)

    def _extras(self, event: ChoiceEvent) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if event.logprobs is not None:
            num_top = self._fields.top_logprobs or 0
            as_ids = self._fields.return_tokens_as_token_ids
            extras["logprobs"] = logprobs.for_chat(event.logprobs, num_top, as_ids=as_ids)
        if self._fields.return_token_ids:
            extras["token_ids"] = event.token_ids
        return extras

    def _whole_choice(self, event: ChoiceEvent) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": event.choice,
            "message": self._message(event.delta),
            "logprobs": None,
            "finish_reason": event.finish_reason,
            "stop_reason": event.stop_reason,
        }
        choice.update(self._extras(event))
        return choice

    def _message(self, delta: Delta) -> dict[str, Any]:
        """Content is null when there are only calls or thinking; keys without a value are left out."""
        content = self._echoed + delta.content
        is_bare = not delta.tool_calls and not delta.reasoning
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or is_bare else None,
            "refusal": None,
        }
        if delta.reasoning:
            message["reasoning"] = message["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in delta.tool_calls
            ]
        return message


def _deltas(delta: Delta) -> list[dict[str, Any]]:
    """The `delta` objects of the chunks that a piece of output becomes."""
    deltas: list[dict[str, Any]] = []
    if delta.reasoning:
        deltas.append({"reasoning": delta.reasoning, "reasoning_content": delta.reasoning})
    if delta.content:
        deltas.append({"content": delta.content})
    for call in delta.tool_calls:
        if call.name is None:
            function = {"arguments": call.arguments}
            deltas.append({"tool_calls": [{"index": call.index, "function": function}]})
        else:
            head = {"index": call.index, "id": call.id, "type": "function"}
            deltas.append({"tool_calls": [{**head, "function": {"name": call.name, "arguments": ""}}]})
            if call.arguments:
                deltas.append({"tool_calls": [{"index": call.index, "function": {"arguments": call.arguments}}]})
    return deltas
