"""From a chat request to a job for the engine, and from the engine's outputs to events. Knows no JSON of any route.

Chat completions, Responses and Messages share it: each brings its body into the form of a `ChatRequest` and words the
events in its own way.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from engine.config import ServerConfig
from engine.errors import UnsupportedParameter
from engine.types import (
    ChatPrompt,
    Delta,
    GenerationRequest,
    KVUsage,
    LogprobEntry,
    ModelInfo,
    OutputParsing,
    SpeculationUsage,
    TextOutput,
)
from server.chat_tools import CallPlan, plan_calls
from server.context import ServerContext
from server.generation import Generation
from server.sampling import request_options, sampling_params
from server.schemas import ChatFields, ChatRequest
from server.tool_schemas import chosen

# What templates call the switch of the thinking; each takes those that it knows.
THINKING_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True)
class ChatJob:
    """A checked request, ready to run."""

    fields: ChatRequest
    request: GenerationRequest
    calls: CallPlan
    model: str  # the name that answers carry
    end_ids: frozenset[int]  # tokens that end an answer without being part of its text


@dataclass(frozen=True, slots=True)
class ChoiceEvent:
    """What became known about one choice. Exactly one event per choice has a `finish_reason`.

    The deltas of a choice joined (`Delta.join`) are its answer. Token counts are totals so far.
    """

    choice: int
    delta: Delta
    token_ids: list[int]
    logprobs: list[LogprobEntry] | None  # of the tokens that are part of the text, when asked for
    finish_reason: str | None  # stop, length or tool_calls
    stop_reason: str | int | None  # the stop string or stop token id that fired
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_reasoning_tokens: int
    prompt_token_ids: list[int] | None  # with the first event of a choice
    prompt_logprobs: list[LogprobEntry | None] | None  # once, when asked for
    cache_miss: str | None = None  # why the prefix cache did not have all of the prompt; with the first event
    kv: KVUsage | None = None  # what its cache policy has taken so far
    speculative: SpeculationUsage | None = None  # what guessing ahead did so far


class EventReader:
    """Turns the outputs of one job into events, in order. For writers of streams, which get outputs one by one."""

    def __init__(self, job: ChatJob) -> None:
        self._fields = job.fields
        self._end_ids = job.end_ids
        self._is_named = job.calls.choice.is_named
        self._is_changing = not (job.fields.include_reasoning and job.fields.stream_reasoning) or (
            bool(job.calls.tools) and not job.fields.parallel_tool_calls
        )
        self._held_reasoning: dict[int, str] = {}
        self._callers: set[int] = set()  # choices that have called

    def read(self, output: TextOutput) -> ChoiceEvent:
        delta = Delta(content=output.text) if output.delta is None else output.delta
        if self._is_changing:
            delta = self._changed(output.choice, delta, is_last=output.finish_reason is not None)
        if delta.tool_calls:
            self._callers.add(output.choice)
        return ChoiceEvent(
            choice=output.choice,
            delta=delta,
            token_ids=output.token_ids,
            logprobs=self._logprobs(output),
            finish_reason=self._finish_reason(output),
            stop_reason=output.stop_reason,
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            num_output_tokens=output.num_output_tokens,
            num_reasoning_tokens=output.num_reasoning_tokens,
            prompt_token_ids=output.prompt_token_ids,
            prompt_logprobs=output.prompt_logprobs,
            cache_miss=output.cache_miss,
            kv=output.kv,
            speculative=output.speculative,
        )

    def _finish_reason(self, output: TextOutput) -> str | None:
        """An output that was cut off stays so: a partial call must not look like one to execute."""
        if output.finish_reason == "stop" and output.choice in self._callers and not self._is_named:
            return "tool_calls"
        return output.finish_reason

    def _changed(self, choice: int, delta: Delta, *, is_last: bool) -> Delta:
        """The delta without what the request does not want to see, or not yet."""
        fields = self._fields
        calls = delta.tool_calls if fields.parallel_tool_calls else tuple(c for c in delta.tool_calls if c.index == 0)
        reasoning = delta.reasoning if fields.include_reasoning else ""
        if not fields.stream_reasoning:
            held = self._held_reasoning.pop(choice, "") + reasoning
            is_over = is_last or bool(delta.content or delta.tool_calls)
            reasoning = held if is_over else ""
            if not is_over:
                self._held_reasoning[choice] = held
        return Delta(delta.content, reasoning, calls)

    def _logprobs(self, output: TextOutput) -> list[LogprobEntry] | None:
        entries = output.logprobs
        if entries is None or not self._fields.logprobs:
            return None
        is_hidden = output.finish_reason == "stop" and not self._fields.include_stop_str_in_output
        if is_hidden and not self._fields.return_token_ids and entries and entries[-1].token_id in self._end_ids:
            # the token that ended the answer is not in its text, and the bytes of all entries are the text
            return entries[:-1]
        return entries


async def prepare(context: ServerContext, fields: ChatRequest, *, tenant: str, request_id: str) -> ChatJob:
    """Checks everything that a request can get wrong before it runs.

    tenant, request_id   of the HTTP request: `request.state`
    Raises RequestError that names the field, NotReady or EngineDead.
    """
    info = context.require_ready()
    fields.check()
    model = context.resolve_model(fields.model, with_adapters=True)
    options = request_options(fields, context.config)
    calls = plan_calls(fields, context.engine.output_format, options.pop("constraint"))
    prompt = chat_prompt(fields, trusts_template=context.config.server.trust_request_chat_template)
    request = GenerationRequest(
        prompt=prompt,
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
        adapter=context.adapter_of(model),
        tenant=tenant,
        client_request_id=fields.request_id or fields.rid or request_id,
        constraint=calls.constraint,
        parsing=OutputParsing(tools=calls.tools, has_reasoning=fields.separate_reasoning, tool_parser=calls.parser),
        max_thinking_tokens=fields.max_thinking_tokens,
        **options,
    )
    return ChatJob(fields, request, calls, model, frozenset((*info.eos_token_ids, *fields.stop_token_ids)))


async def events(context: ServerContext, job: ChatJob, receive: Receive) -> AsyncGenerator[ChoiceEvent, None]:
    """Runs a job. Closing the iterator, or the client's leaving (seen through `receive`), ends it."""
    reader = EventReader(job)
    async with Generation(context, [job.request], receive) as generation:
        while (pieces := await generation.take()) is not None:
            for _, output in pieces:
                yield reader.read(output)


async def collect(context: ServerContext, job: ChatJob, receive: Receive) -> list[ChoiceEvent]:
    """The whole answer: one event per choice, in order."""
    reader = EventReader(job)
    async with Generation(context, [job.request], receive) as generation:
        outputs = [output for _, output in await generation.collect()]
    return [reader.read(output) for output in sorted(outputs, key=lambda output: output.choice)]


def chat_prompt(fields: ChatFields, *, trusts_template: bool = False) -> ChatPrompt:
    """What the template gets.

    trusts_template   the operator lets requests bring their own
    Raises InvalidParameter when the prompt fields contradict each other, and UnsupportedParameter.
    """
    fields.check_prompt()
    if fields.chat_template is not None and not trusts_template:
        raise UnsupportedParameter(
            "chat_template is chosen by the operator, unless the server runs with --trust-request-chat-template; "
            "leave it out",
            param="chat_template",
        )
    tools, _ = chosen(fields.tools, fields.tool_choice)
    kwargs: dict[str, Any] = dict(fields.chat_template_kwargs)
    if fields.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", fields.reasoning_effort)
        for name in THINKING_SWITCHES:
            kwargs.setdefault(name, fields.reasoning_effort != "none")
    if fields.verbosity is not None:
        kwargs.setdefault("verbosity", fields.verbosity)
    add_generation_prompt = fields.add_generation_prompt
    if add_generation_prompt is None:
        add_generation_prompt = not fields.continue_final_message
    return ChatPrompt(
        messages=[message.for_template() for message in fields.messages],
        tools=[tool.for_template() for tool in tools] or None,
        documents=fields.documents,
        template=fields.chat_template,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        template_kwargs=kwargs,
    )


def _max_tokens(fields: ChatRequest, info: ModelInfo, config: ServerConfig) -> int | None:
    """None: as much as fits, because a default must not fail the strict check."""
    given = fields.max_completion_tokens or fields.max_tokens
    if given is not None:
        return given
    if config.strict_max_tokens:
        return None
    default = info.generation_defaults.get("max_new_tokens", config.default_max_tokens)
    return min(int(default), info.max_model_len)
