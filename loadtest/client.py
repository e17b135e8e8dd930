"""Sends one request to an OpenAI-compatible server and records when each piece of its answer arrived.

Knows no load shape and no statistics. Events are decoded into typed structs that skip what is not measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
ERROR_CHARS = 200
DATA, DONE = b"data:", b"[DONE]"


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server."""

    url: str
    model: str
    api_key: str | None = None
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of every request's body
    stream: bool = True
    temperature: float = 0.0
    timeout_s: float = TIMEOUT_S  # of a whole request
    sends_done: bool = True  # streams end with [DONE]; without it the finish_reason tells a whole answer


@dataclass(frozen=True, kw_only=True)
class Request:
    """A completion when it has a prompt, otherwise a chat. `fields` are further fields of its body."""

    max_tokens: int
    prompt: list[int] | str | None = None
    messages: list[dict[str, Any]] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Answer:
    """What a request said, for the next turn of a conversation."""

    text: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)  # as they go into a message


@dataclass
class Record:
    """One request: times in seconds on one clock, counts from the server's usage.

    `due` is when the request was to be sent. Latencies count from there, so that a request that had to wait for a
    slow server or client is not taken for a fast one.
    """

    sent: float
    due: float | None = None  # None: when it was sent
    first: float | None = None
    finished: float | None = None
    arrivals: list[float] = field(default_factory=list)  # of every piece with text
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    speculative: dict[str, Any] | None = None  # the server's usage.speculative
    finish_reason: str | None = None
    error: str | None = None
    error_kind: str | None = None  # "http 503", "timeout", "disconnected", "stream error", "incomplete" ...
    suspicion: str | None = None  # what is wrong with the counts
    answer: Answer = field(default_factory=Answer)

    @property
    def began(self) -> float:
        return self.sent if self.due is None else self.due

    @property
    def late_s(self) -> float:
        """How much later than intended it was sent."""
        return self.sent - self.began

    @property
    def ttft_s(self) -> float:
        return (self.first or self.finished or self.sent) - self.began

    @property
    def latency_s(self) -> float:
        return (self.finished or self.sent) - self.began

    @property
    def gaps_s(self) -> list[float]:
        """Times between pieces: the inter-token latency when the server sends one token a piece."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def time_per_output_token_s(self) -> float:
        if self.first is None or self.finished is None or self.output_tokens < 2:
            return 0.0
        return (self.finished - self.first) / (self.output_tokens - 1)

    def fail(self, kind: str, message: str) -> None:
        """The first reason stays."""
        if self.error is None:
            self.error_kind, self.error = kind, message[:ERROR_CHARS]


@dataclass
class Run:
    """All records of one measured run."""

    records: list[Record]
    duration_s: float
    unsent: int = 0  # requests that were planned: later turns of a failed conversation, or the time was over

    def __add__(self, other: Run) -> Run:
        return Run(self.records + other.records, self.duration_s + other.duration_s, self.unsent + other.unsent)


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Message | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    speculative: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


def connect(target: Target) -> httpx.AsyncClient:
    """A client without a bound on connections, which is what keeps an open loop open."""
    return httpx.AsyncClient(
        base_url=target.url,
        headers={"Authorization": f"Bearer {target.api_key}"} if target.api_key else {},
        timeout=httpx.Timeout(target.timeout_s, connect=CONNECT_TIMEOUT_S),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


async def send(http: httpx.AsyncClient, target: Target, request: Request, *, due: float | None = None) -> Record:
    """Never raises for what the server or the network does: the record says what happened."""
    record = Record(sent=time.perf_counter(), due=due)
    path = "/v1/completions" if request.messages is None else "/v1/chat/completions"
    try:
        async with asyncio.timeout(target.timeout_s):
            async with http.stream("POST", path, json=_body(target, request)) as response:
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    record.fail(f"http {response.status_code}", f"{response.status_code}: {response.text}")
                elif target.stream:
                    await _read_stream(response, record, must_end=target.sends_done)
                else:
                    _take(_decoder.decode(await response.aread()), record)
    except (TimeoutError, httpx.TimeoutException):
        record.fail("timeout", f"no answer within {target.timeout_s:g} s")
    except httpx.ConnectError as error:
        record.fail("connection refused", str(error))
    except httpx.HTTPError as error:
        record.fail("disconnected", f"{type(error).__name__}: {error}")
    except msgspec.DecodeError as error:
        record.fail("unreadable", f"no JSON of the API: {error}")
    record.finished = time.perf_counter()
    if record.error is None:
        _check(record, request, target)
    return record


def _body(target: Target, request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": request.max_tokens,
        "temperature": target.temperature,
        "stream": target.stream,
    }
    if request.messages is None:
        body["prompt"] = request.prompt
    else:
        body["messages"] = request.messages
    if target.stream:
        body["stream_options"] = {"include_usage": True}
    if target.ignore_eos:
        body["ignore_eos"] = True
    return {**body, **target.extra, **request.fields}


async def _read_stream(response: httpx.Response, record: Record, *, must_end: bool) -> None:
    rest, is_done = b"", False
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            is_done = _read_line(line, record) or is_done
    if must_end and not is_done:
        record.fail("incomplete", "the stream ended without [DONE]")


def _read_line(line: bytes, record: Record) -> bool:
    """Whether it was the last of the stream."""
    if not line.startswith(DATA):
        return False
    data = line[len(DATA) :].strip()
    if data == DONE:
        return True
    _take(_decoder.decode(data), record)
    return False


def _take(event: _Event, record: Record) -> None:
    now = time.perf_counter()
    if event.error is not None:
        message = event.error.get("message", event.error) if isinstance(event.error, dict) else event.error
        record.fail("stream error", str(message))
    for choice in event.choices:
        if _append(choice, record.answer):
            record.first = record.first or now
            record.arrivals.append(now)
        record.finish_reason = choice.finish_reason or record.finish_reason
    if event.usage is not None:
        usage = event.usage
        record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens
        record.cached_tokens = (usage.prompt_tokens_details or _Details()).cached_tokens or 0
        record.speculative = usage.speculative or record.speculative


def _append(choice: _Choice, answer: Answer) -> bool:
    """Whether the piece says anything. Thoughts are timed like text and are no part of the next prompt."""
    message = choice.delta or choice.message or _Message(content=choice.text)
    answer.text += message.content or ""
    for call in message.tool_calls or ():
        while len(answer.tool_calls) <= call.index:
            answer.tool_calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        known, function = answer.tool_calls[call.index], call.function or _Function()
        known["id"] += call.id or ""
        known["function"]["name"] += function.name or ""
        known["function"]["arguments"] += function.arguments or ""
    return bool(message.content or message.reasoning or message.reasoning_content or message.tool_calls)


def _check(record: Record, request: Request, target: Target) -> None:
    """Fails an answer that is not whole, and suspects counts that what was sent and received contradicts."""
    if record.output_tokens == 0 and record.arrivals:
        record.fail("no usage", "text came, but no usage with its number of tokens")
    elif record.finish_reason is None:
        record.fail("incomplete", "the answer ended without a finish_reason")
    elif len(record.arrivals) > record.output_tokens:
        record.suspicion = f"{len(record.arrivals)} pieces with text of {record.output_tokens} tokens"
    elif record.output_tokens > request.max_tokens:
        record.suspicion = f"{record.output_tokens} tokens where {request.max_tokens} were the most"
    elif record.finish_reason == "length" and target.ignore_eos and record.output_tokens < request.max_tokens:
        record.suspicion = f"{record.output_tokens} tokens of {request.max_tokens}, yet it ended by length"
    elif isinstance(request.prompt, list) and record.prompt_tokens != len(request.prompt):
        record.suspicion = f"{record.prompt_tokens} tokens counted in a prompt of {len(request.prompt)}"
