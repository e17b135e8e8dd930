"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.config import ServerConfig
from engine.types import ChatPrompt, GenerationRequest, ModelInfo, TextOutput
from server import logprobs
from server.body import read_object
from server.context import ServerContext
from server.generation import Generation
from server.outputs import Piece, UsageCounter
from server.responses import json_response
from server.sampling import request_options, sampling_params
from server.schemas import ChatFields, ChatRequest
from server.sse import encode, frame, start_stream
from server.validation import parse


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        info = context.require_ready()
        body = await read_object(request, context.config.limits)
        fields = parse(ChatRequest, body, context.config.limits, context.metrics)
        fields.check()
        writer = ChatWriter(fields, context.resolve_model(fields.model), context.fingerprint, info.eos_token_ids)
        generation_request = GenerationRequest(
            prompt=chat_prompt(fields),
            sampling=sampling_params(
                fields,
                info,
                max_tokens=_max_tokens(fields, info, context.config.server),
                logprobs=fields.top_logprobs or 0 if fields.logprobs else None,
                prompt_logprobs=fields.prompt_logprobs,
            ),
            num_choices=fields.n,
            add_special_tokens=fields.add_special_tokens,
            prompt_param="messages",
            tenant=request.state.tenant,
            client_request_id=request.state.request_id,
            **request_options(fields, context.config),
        )
        if fields.stream:
            limit = context.config.limits.max_unsent_bytes
            generation = Generation(context, [generation_request], request.receive, max_unsent_bytes=limit)
            return await start_stream(generation, writer, context.config.server.sse_ping_s)
        async with Generation(context, [generation_request], request.receive) as generation:
            return json_response(writer.whole(await generation.collect()))

    return router


def _max_tokens(fields: ChatRequest, info: ModelInfo, config: ServerConfig) -> int | None:
    """None: as much as fits, because a default must not fail the strict check."""
    given = fields.max_completion_tokens or fields.max_tokens
    if given is not None:
        return given
    if config.strict_max_tokens:
        return None
    default = info.generation_defaults.get("max_new_tokens", config.default_max_tokens)
    return min(int(default), info.max_model_len)


def chat_prompt(fields: ChatFields) -> ChatPrompt:
    """What the template gets. Raises InvalidParameter when the prompt fields contradict each other."""
    fields.check_prompt()
    kwargs: dict[str, Any] = dict(fields.chat_template_kwargs)
    if fields.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
        kwargs.setdefault("enable_thinking", fields.reasoning_effort != "none")
    add_generation_prompt = fields.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not fields.continue_final_message
    return ChatPrompt(
        messages=[message.for_template() for message in fields.messages],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        template_kwargs=kwargs,
    )


class ChatWriter:
    """Words the answer, whole or in chunks.

    `_deltas` is the place between engine text and message fields: a parser that tells reasoning and tool calls from
    content belongs there.
    """

    def __init__(self, fields: ChatRequest, model: str, fingerprint: str, eos_token_ids: Iterable[int]) -> None:
        self._fields = fields
        self._end_ids = frozenset((*eos_token_ids, *fields.stop_token_ids))
        self._usage = UsageCounter()
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._echoed = fields.messages[-1].text if fields.echo and fields.messages[-1].role == "assistant" else ""
        options = fields.stream_options
        self._has_usage = options is not None and options.include_usage
        self._is_usage_continuous = options is not None and self._has_usage and options.continuous_usage_stats
        self._started: set[int] = set()
        # A plain content chunk is most of the traffic: its constant parts are encoded once.
        self._prefix = b"data: " + encode(self._head)[:-1] + b',"choices":[{"index":'
        self._suffix = b'},"logprobs":null,"finish_reason":null}]' + (
            b',"usage":null}\n\n' if self._has_usage else b"}\n\n"
        )
        self._is_plain = not (fields.logprobs or fields.return_token_ids or self._is_usage_continuous)

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        outputs = sorted((output for _, output in pieces), key=lambda output: output.choice)
        for output in outputs:
            self._usage.add(0, output)
        answer: dict[str, Any] = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._whole_choice(output) for output in outputs],
            "usage": self._usage.as_dict(),
        }
        first = outputs[0]
        if self._fields.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.for_prompt(first.prompt_logprobs, self._fields.prompt_logprobs)
        if self._fields.return_token_ids:
            answer["prompt_token_ids"] = first.prompt_token_ids
        if self._fields.service_tier is not None:
            answer["service_tier"] = "default"
        return answer

    def write(self, frames: list[bytes], index: int, output: TextOutput) -> None:
        self._usage.add(index, output)
        choice = output.choice
        if choice not in self._started:
            self._started.add(choice)
            frames.append(self._role_frame(output))
            if self._echoed:
                frames.append(self._content_frame(choice, self._echoed))
        if self._is_plain:
            if output.text:
                frames.append(self._content_frame(choice, output.text))
        elif output.token_ids or output.text:
            frames += [self._frame(output, delta, self._extras(output)) for delta in self._deltas(output)]
        if output.finish_reason is not None:
            extras = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
            frames.append(self._frame(output, {}, extras))

    def end(self, frames: list[bytes]) -> None:
        if self._has_usage:
            frames.append(frame({**self._head, "choices": [], "usage": self._usage.as_dict()}))

    def _deltas(self, output: TextOutput) -> list[dict[str, Any]]:
        return [{"content": output.text}]

    def _content_frame(self, choice: int, text: str) -> bytes:
        return b'%b%d,"delta":{"content":%b%b' % (self._prefix, choice, encode(text), self._suffix)

    def _role_frame(self, output: TextOutput) -> bytes:
        top: dict[str, Any] = {}
        if self._fields.return_token_ids:
            top["prompt_token_ids"] = output.prompt_token_ids
        if self._fields.service_tier is not None:
            top["service_tier"] = "default"
        return self._frame(output, {"role": "assistant", "content": ""}, {}, top)

    def _frame(
        self,
        output: TextOutput,
        delta: Mapping[str, Any],
        extras: Mapping[str, Any],
        top: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": output.choice, "delta": delta, "logprobs": None, "finish_reason": None, **extras}
        chunk: dict[str, Any] = {**self._head, "choices": [choice], **(top or {})}
        if self._has_usage:
            chunk["usage"] = self._usage.as_dict() if self._is_usage_continuous else None
        return frame(chunk)

    def _extras(self, output: TextOutput) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self._fields.logprobs and output.logprobs is not None:
            extras["logprobs"] = self._logprobs(output)
        if self._fields.return_token_ids:
            extras["token_ids"] = output.token_ids
        return extras

    def _whole_choice(self, output: TextOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": output.choice,
            "message": {"role": "assistant", "content": self._echoed + output.text, "refusal": None},
            "logprobs": None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        choice.update(self._extras(output))
        return choice

    def _logprobs(self, output: TextOutput) -> dict[str, Any]:
        entries = output.logprobs or []
        is_hidden = output.finish_reason == "stop" and not self._fields.include_stop_str_in_output
        if is_hidden and not self._fields.return_token_ids and entries and entries[-1].token_id in self._end_ids:
            # the token that ended the answer is not in its text, and the bytes of all entries are the text
            entries = entries[:-1]
        num_top = self._fields.top_logprobs or 0
        return logprobs.for_chat(entries, num_top, as_ids=self._fields.return_tokens_as_token_ids)
