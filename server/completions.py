"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from engine.errors import InvalidParameter
from engine.types import ChatPrompt, GenerationRequest, LogprobEntry, ModelInfo, TextOutput
from server import logprobs
from server.body import read_object
from server.context import ServerContext
from server.engine_api import Engine
from server.generation import Generation
from server.http_responses import json_response
from server.outputs import Piece, UsageCounter
from server.sampling import check_ids, request_options, sampling_params
from server.schemas import DEFAULT_COMPLETION_TOKENS, CompletionRequest, Prompt
from server.sse import TextFrames, frame, stream_answer
from server.validation import parse


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        info = context.require_ready()
        body = await read_object(request, context.config.limits)
        fields = parse(CompletionRequest, body, context.config.limits, context.metrics)
        fields.check()
        _check_sizes(fields, info, context.config.limits.max_total_choices)
        model = context.resolve_model(fields.model, with_adapters=True)
        requests = _generation_requests(fields, model, info, context, request)
        if fields.suffix:
            requests = [await _infilled(given, fields.suffix, context.engine) for given in requests]
        echoes = [await _echo(prompt, fields, context.engine) for prompt in fields.prompts] if fields.echo else []
        writer = CompletionWriter(fields, model, context.fingerprint_of(model), echoes)
        if fields.stream:
            return await stream_answer(context, requests, request, writer, answer_id=writer.answer_id)
        async with Generation(context, requests, request.receive) as generation:
            return json_response(writer.whole(await generation.collect()))

    return router


@dataclass(frozen=True)
class Echo:
    """What precedes a choice's own text: its prompt, and the prompt's first token, which has no probability."""

    text: str
    first_token: logprobs.FirstToken | None = None


def _check_sizes(fields: CompletionRequest, info: ModelInfo, max_total: int) -> None:
    """Raises InvalidParameter."""
    total = len(fields.prompts) * fields.num_generated
    if total > max_total:
        raise InvalidParameter(f"prompts times n (or best_of) is {total}; at most {max_total} are allowed", param="n")
    for prompt in fields.prompts:
        if not isinstance(prompt, str):
            check_ids(prompt, info.vocab_size, "prompt")
    if fields.echo and fields.truncate_prompt_tokens is not None:
        raise InvalidParameter("echo and truncate_prompt_tokens exclude each other; leave one out", param="echo")


def _generation_requests(
    fields: CompletionRequest, model: str, info: ModelInfo, context: ServerContext, request: Request
) -> list[GenerationRequest]:
    max_tokens = DEFAULT_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    needs_score = fields.num_generated > fields.n
    prompt_logprobs = [fields.prompt_logprobs, fields.logprobs if fields.echo else None]
    sampling = sampling_params(
        fields,
        info,
        max_tokens=max(max_tokens, 1),  # the engine always chooses a token; 0 drops it again
        logprobs=0 if needs_score and fields.logprobs is None else fields.logprobs,
        prompt_logprobs=max((count for count in prompt_logprobs if count is not None), default=None),
    )
    return [
        GenerationRequest(
            prompt=prompt,
            sampling=sampling,
            num_choices=fields.num_generated,
            add_special_tokens=fields.add_special_tokens,
            prompt_param="prompt" if len(fields.prompts) == 1 else f"prompt.{index}",
            adapter=context.adapter_of(model),
            tenant=request.state.tenant,
            client_request_id=fields.request_id or fields.rid or request.state.request_id,
            **request_options(fields, context.config),
        )
        for index, prompt in enumerate(fields.prompts)
    ]


async def _infilled(request: GenerationRequest, suffix: str, engine: Engine) -> GenerationRequest:
    """The same request for the text between its prompt and `suffix`."""
    assert not isinstance(request.prompt, ChatPrompt)
    ids, end_ids = await engine.infill(
        request.prompt, suffix, add_special_tokens=request.add_special_tokens, param=request.prompt_param
    )
    stop_ids = (*request.sampling.stop_token_ids, *end_ids)
    sampling = msgspec.structs.replace(request.sampling, stop_token_ids=stop_ids)
    return msgspec.structs.replace(request, prompt=ids, sampling=sampling)


async def _echo(prompt: Prompt, fields: CompletionRequest, engine: Engine) -> Echo:
    text = prompt if isinstance(prompt, str) else await engine.detokenize(prompt)
    if fields.logprobs is None:
        return Echo(text)
    ids = prompt
    if isinstance(ids, str):
        ids = await engine.tokenize(ids, add_special_tokens=fields.add_special_tokens)
    token = engine.token_text(ids[0])
    return Echo(text, logprobs.FirstToken(ids[0], token, len(token) if text.startswith(token) else 0))


class CompletionWriter:
    """Words the answer, whole or in chunks. Choice i of prompt p has index p * n + i."""

    def __init__(self, fields: CompletionRequest, model: str, fingerprint: str, echoes: Sequence[Echo]) -> None:
        self._fields = fields
        self._echoes = echoes
        self._usage = UsageCounter()
        self.answer_id = f"cmpl-{secrets.token_hex(16)}"
        self._head = {
            "id": self.answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        options = fields.stream_options
        self._has_usage = options is not None and options.include_usage
        self._is_usage_continuous = options is not None and self._has_usage and options.continuous_usage_stats
        self._is_scoring = fields.max_tokens == 0
        self._logprobs: dict[int, logprobs.CompletionLogprobs] = {}
        self._prompt_logprobs: dict[int, list[LogprobEntry | None]] = {}  # they come once per prompt
        self._started: set[int] = set()
        rest = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]' + (
            b',"usage":null' if self._has_usage else b""
        )
        self._text_frame = TextFrames(self._head, '"text":', rest)
        self._is_plain = not (
            self._is_usage_continuous or fields.logprobs is not None or fields.return_token_ids or self._is_scoring
        )

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        for index, output in pieces:
            self._note(index, output)
        choices: list[dict[str, Any]] = []
        for prompt_index in range(len(self._fields.prompts)):
            outputs = [output for index, output in pieces if index == prompt_index]
            choices += [self._whole_choice(prompt_index, output) for output in _best(outputs, self._fields.n)]
        answer: dict[str, Any] = {**self._head, "choices": choices, "usage": self._usage_dict()}
        if self._fields.service_tier is not None:
            answer["service_tier"] = "default"
        return answer

    def write(self, frames: list[bytes], index: int, output: TextOutput) -> None:
        self._note(index, output)
        choice_index = index * self._fields.n + output.choice
        is_first = choice_index not in self._started
        if is_first:
            self._started.add(choice_index)
            if self._echoes:
                frames.append(self._frame(self._echo_choice(index, choice_index, output)))
        is_end = output.finish_reason is not None
        if self._is_plain and not is_end:
            if output.text:
                frames.append(self._text_frame(choice_index, output.text))
        elif is_end or ((output.token_ids or output.text) and not self._is_scoring):
            choice = self._own_choice(choice_index, output)
            if is_first and not self._echoes and self._fields.return_token_ids:
                choice["prompt_token_ids"] = output.prompt_token_ids
            frames.append(self._frame(choice))

    def end(self, frames: list[bytes]) -> None:
        if self._has_usage:
            frames.append(frame({**self._head, "choices": [], "usage": self._usage_dict()}))

    def _note(self, index: int, output: TextOutput) -> None:
        self._usage.add(index, output)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[index] = output.prompt_logprobs

    def _frame(self, choice: dict[str, Any]) -> bytes:
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._has_usage:
            chunk["usage"] = self._usage_dict() if self._is_usage_continuous else None
        return frame(chunk)

    def _usage_dict(self) -> dict[str, Any]:
        return self._usage.as_dict(counts_output=not self._is_scoring)

    def _whole_choice(self, prompt_index: int, output: TextOutput) -> dict[str, Any]:
        choice_index = prompt_index * self._fields.n + output.choice
        own = self._echo_choice(prompt_index, choice_index, output) if self._echoes else None
        choice = self._own_choice(choice_index, output)
        if own is not None:
            choice["text"] = own["text"] + choice["text"]
            choice["logprobs"] = _joined(own["logprobs"], choice["logprobs"])
        if self._fields.prompt_logprobs is not None:
            entries = self._prompt_logprobs.get(prompt_index)
            choice["prompt_logprobs"] = logprobs.for_prompt(entries, self._fields.prompt_logprobs)
        if self._fields.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _own_choice(self, choice_index: int, output: TextOutput) -> dict[str, Any]:
        """The generated part of a choice."""
        if self._is_scoring:
            output = msgspec.structs.replace(
                output, text="", token_ids=[], logprobs=[], finish_reason="length", stop_reason=None
            )
        choice: dict[str, Any] = {
            "index": choice_index,
            "text": output.text,
            "logprobs": None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._fields.logprobs is not None:
            choice["logprobs"] = self._logprobs_of(choice_index).take(output.logprobs or ())
        if self._fields.return_token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def _echo_choice(self, prompt_index: int, choice_index: int, output: TextOutput) -> dict[str, Any]:
        """The prompt's part of a choice."""
        echo = self._echoes[prompt_index]
        choice: dict[str, Any] = {
            "index": choice_index,
            "text": echo.text,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
        if self._fields.logprobs is not None:
            entries = self._prompt_logprobs.get(prompt_index, ())
            choice["logprobs"] = self._logprobs_of(choice_index).take(entries, echo.first_token)
        if self._fields.return_token_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
        return choice

    def _logprobs_of(self, choice_index: int) -> logprobs.CompletionLogprobs:
        """One per choice: it remembers the offset in the text."""
        if choice_index not in self._logprobs:
            self._logprobs[choice_index] = logprobs.CompletionLogprobs(
                num_top=self._fields.logprobs or 0, as_ids=self._fields.return_tokens_as_token_ids
            )
        return self._logprobs[choice_index]


def _best(outputs: list[TextOutput], num_returned: int) -> list[TextOutput]:
    """The choices in order; with best_of the likeliest per token, renumbered."""
    outputs = sorted(outputs, key=lambda output: output.choice)
    if len(outputs) <= num_returned:
        return outputs
    outputs.sort(key=_mean_logprob, reverse=True)
    return [msgspec.structs.replace(output, choice=i) for i, output in enumerate(outputs[:num_returned])]


def _mean_logprob(output: TextOutput) -> float:
    entries = output.logprobs or ()
    return sum(entry.logprob for entry in entries) / max(len(entries), 1)


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    """Two `logprobs` objects as one."""
    if first is None or second is None:
        return first or second
    return {name: None if first[name] is None or second[name] is None else first[name] + second[name] for name in first}
