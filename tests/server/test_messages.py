"""Anthropic's Messages API: answers, event streams, blocks, translation to chat, errors in its own form."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import httpx
import pytest

from engine import errors
from engine.types import ChatPrompt
from tests.fakes_engine import PIECES, FakeEngine
from tests.server.support import KEY, App, app, connection, eventually, make_config, running
from tests.server.test_responses import THINKING_AND_CALLS, WEATHER

PATH = "/v1/messages"
TEXT = "".join(PIECES)
HELLO: dict[str, Any] = {"model": "fake", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
TOOLS: list[dict[str, Any]] = [
    {"name": "weather", "description": "of a city", "input_schema": WEATHER, "cache_control": {"type": "ephemeral"}},
    {"name": "time", "input_schema": {"type": "object", "properties": {}}, "type": "custom"},
]


async def create(server: App, **fields: Any) -> httpx.Response:
    return await server.post(PATH, {**HELLO, **fields})


def read_events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.endswith("\n\n")
    events = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def types(events: list[dict[str, Any]]) -> list[str]:
    """Event types, deltas by their own type and in a row once."""
    names: list[str] = []
    for event in events:
        name = event["delta"]["type"] if event["type"] == "content_block_delta" else event["type"]
        if not (name.endswith("_delta") and names and names[-1] == name):
            names.append(name)
    return names


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert response.headers["request-id"] == response.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    return error


def prompt_of(server: App) -> ChatPrompt:
    prompt = server.engine.seen[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def test_the_answer_has_every_field_and_input_tokens_leave_out_cached_ones() -> None:
    async with app() as server:
        answer = (await create(server)).json()
        assert answer["id"].startswith("msg_")
        assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "fake")
        assert answer["content"] == [{"type": "text", "text": TEXT}]
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
        first = answer["usage"]
        assert (first["cache_read_input_tokens"], first["cache_creation_input_tokens"]) == (0, 0)
        assert first["output_tokens"] == len(PIECES)
        second = (await create(server)).json()["usage"]
        assert second["cache_read_input_tokens"] > 0
        assert second["input_tokens"] + second["cache_read_input_tokens"] == first["input_tokens"]


async def test_a_text_stream_has_all_events_in_order() -> None:
    async with app(FakeEngine(delay_s=0.001)) as server:
        events = read_events(await create(server, stream=True))
        assert types(events) == [
            "message_start", "content_block_start", "text_delta", "content_block_stop", "message_delta", "message_stop",
        ]  # fmt: skip
        start = events[0]["message"]
        assert (start["content"], start["stop_reason"]) == ([], None)
        assert start["usage"]["input_tokens"] > 0
        assert events[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == TEXT
        assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
        assert events[-2]["usage"]["output_tokens"] == len(PIECES)


async def test_pings_fill_silence() -> None:
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    async with app(engine, make_config(sse_ping_s=0.05)) as server:
        answering = asyncio.create_task(create(server, stream=True))
        await eventually(lambda: engine.num_active == 1)
        await asyncio.sleep(0.2)
        engine.hold.set()
        events = read_events(await answering)
        assert events[0] == {"type": "ping"}
        assert events[-1]["type"] == "message_stop"


async def test_thinking_text_and_calls_become_blocks_in_order() -> None:
    async with app(FakeEngine(THINKING_AND_CALLS, delay_s=0.001)) as server:
        events = read_events(await create(server, stream=True, tools=TOOLS))
        assert types(events) == [
            "message_start",
            "content_block_start", "thinking_delta", "signature_delta", "content_block_stop",
            "content_block_start", "text_delta", "content_block_stop",
            "content_block_start", "input_json_delta", "content_block_stop",
            "content_block_start", "input_json_delta", "content_block_stop",
            "message_delta", "message_stop",
        ]  # fmt: skip
        starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        assert [block["type"] for block in starts] == ["thinking", "text", "tool_use", "tool_use"]
        assert [block["name"] for block in starts[2:]] == ["weather", "time"]
        assert starts[2]["id"] != starts[3]["id"]
        assert starts[2]["input"] == {}
        indices = [event["index"] for event in events if "index" in event]
        assert indices == sorted(indices)
        partial = [e["delta"]["partial_json"] for e in events if e.get("index") == 2 and "delta" in e]
        assert json.loads("".join(partial)) == {"city": "Oslo"}
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        assert events[-2]["usage"]["output_tokens_details"]["thinking_tokens"] > 0
        whole = (await create(server, tools=TOOLS)).json()
        thinking, text, first, second = whole["content"]
        assert (thinking["type"], thinking["thinking"]) == ("thinking", "let me see")
        assert thinking["signature"]
        assert (text["type"], text["text"].strip()) == ("text", "I'll look.")
        assert (first["name"], first["input"], second["input"]) == ("weather", {"city": "Oslo"}, {})
        assert whole["stop_reason"] == "tool_use"


async def test_thinking_can_be_left_out_of_the_answer() -> None:
    async with app(FakeEngine(THINKING_AND_CALLS, delay_s=0.001)) as server:
        thinking = {"type": "adaptive", "display": "omitted"}
        answer = (await create(server, thinking=thinking, tools=TOOLS)).json()
        assert (answer["content"][0]["type"], answer["content"][0]["thinking"]) == ("thinking", "")
        events = read_events(await create(server, thinking=thinking, tools=TOOLS, stream=True))
        assert "thinking_delta" not in types(events)


async def test_stop_reasons() -> None:
    async with app() as server:
        cut = (await create(server, max_tokens=2)).json()
        assert (cut["stop_reason"], cut["stop_sequence"]) == ("max_tokens", None)
        stopped = (await create(server, stop_sequences=["zzz", " wor"])).json()
        assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", " wor")
        assert stopped["content"][0]["text"] == "Hello"
    async with app(FakeEngine(THINKING_AND_CALLS)) as server:
        for max_tokens, parts in ((9, {}), (10, {"city": "Oslo"})):
            half = (await create(server, tools=TOOLS, max_tokens=max_tokens)).json()
            assert half["stop_reason"] == "max_tokens", "a call that was cut must not be run"
            assert half["content"][-1]["input"] == parts, "as the client's own reading of the stream"


async def test_an_answer_without_text_still_has_a_block() -> None:
    async with app(FakeEngine(["x"], eos=True)) as server:
        assert (await create(server)).json()["content"] == [{"type": "text", "text": ""}]


async def test_system_and_blocks_become_chat_messages() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", **cached}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "looking"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": "é"}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "1"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "no such file", "is_error": True},
                {"type": "tool_result", "tool_use_id": "t3"},
                {
                    "type": "document",
                    "title": "T",
                    "source": {"type": "text", "media_type": "text/plain", "data": "body"},
                },
                {"type": "text", "text": "so?"},
            ],
        },
    ]
    async with app(FakeEngine(max_model_len=1000)) as server:
        system = [{"type": "text", "text": "be", **cached}, {"type": "text", "text": "brief"}]
        answer = await create(server, messages=messages, system=system)
        assert answer.status_code == 200, answer.text
        system_message, user, assistant, *results, last = prompt_of(server).messages
        assert system_message == {"role": "system", "content": "be\nbrief"}
        assert user["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert (assistant["content"], assistant["reasoning_content"]) == ("looking", "hm")
        functions = [call["function"] for call in assistant["tool_calls"]]
        assert [(function["name"], json.loads(function["arguments"])) for function in functions] == [
            ("f", {"x": "é"}),
            ("g", {}),
        ]
        assert [(message["role"], message["tool_call_id"], message["content"]) for message in results] == [
            ("tool", "t1", "1"),
            ("tool", "t2", "Error: no such file"),
            ("tool", "t3", ""),
        ]
        assert last["content"] == [{"type": "text", "text": "T\nbody"}, {"type": "text", "text": "so?"}]


async def test_a_last_assistant_message_is_gone_on_from() -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Once"}]
    async with app() as server:
        assert (await create(server, messages=messages)).json()["content"][0]["text"] == TEXT
        assert prompt_of(server).continue_final_message
        assert not prompt_of(server).add_generation_prompt
        call = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
        response = await create(server, messages=[*HELLO["messages"], call])
        assert (response.status_code, error_of(response)["type"]) == (400, "invalid_request_error")


async def test_sampling_thinking_and_extra_fields_reach_the_engine() -> None:
    async with app(FakeEngine(max_model_len=4096)) as server:
        fields = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "seed": 3, "metadata": {"user_id": "x"}}
        thinking = {"type": "enabled", "budget_tokens": 1024}
        answer = await create(server, **fields, thinking=thinking, max_tokens=2000, output_config={"effort": "low"})
        assert answer.status_code == 200, answer.text
        request = server.engine.seen[-1]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.25, 0.5, 7, 3)
        kwargs = prompt_of(server).template_kwargs
        assert (kwargs["enable_thinking"], kwargs["reasoning_effort"]) == (True, "low")
        await create(server, thinking={"type": "disabled"}, output_config={"effort": "high"})
        assert prompt_of(server).template_kwargs["enable_thinking"] is False
        await create(server)
        assert "enable_thinking" not in prompt_of(server).template_kwargs, "as the model has it"


async def test_tools_reach_the_template_in_chats_form() -> None:
    async with app(FakeEngine()) as server:
        for choice in ({"type": "auto", "disable_parallel_tool_use": True}, {"type": "none"}):
            assert (await create(server, tools=TOOLS, tool_choice=choice)).status_code == 200
        await create(server, tools=TOOLS)
        tools = prompt_of(server).tools
        assert tools is not None
        assert [tool["function"]["name"] for tool in tools] == ["weather", "time"]
        assert tools[0]["function"]["parameters"] == WEATHER
        assert "cache_control" not in str(tools)


async def test_a_format_becomes_a_constraint() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with app() as server:
        await create(server, output_config={"format": {"type": "json_schema", "schema": schema}})
        constraint = server.engine.seen[-1].constraint
        assert constraint is not None
        assert (constraint.kind, json.loads(constraint.value)) == ("json_schema", schema)


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is required"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"messages": []}, "messages must have 1"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role must be one of"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0 must be a block of type text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}]},
        "messages.0.content.0.content.0 must be a block",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": "x"}}]}]},
        "this server reads no files",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
        "belongs",
    ),
    ({"system": [IMAGE]}, "system.0.type"),
    ({"temperature": 3}, "temperature must be"),
    ({"stop_sequences": ["x"] * 5}, "stop_sequences must have at most 4"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is required"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, "thinking.budget_tokens must be at least 1024"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1024}, "must be below max_tokens"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "no built-in tools"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name"),
    ({"tools": [{"name": "a"}]}, "tools.0.input_schema is required"),
    ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nope"}}, "tool_choice.name"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort must be one of"),
    ({"output_config": {"format": {"type": "regex"}}}, "output_config.format.type"),
    ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
    ({"n": 2}, "n is always 1"),
    ({"messages": [{"role": "user", "content": "x" * 300}]}, "256"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_field_is_named_in_an_error_of_anthropics_form(stream: bool) -> None:
    async with app() as server:
        for fields, text in BAD:
            response = await create(server, **{**fields, "stream": stream})
            assert response.status_code == 400, (fields, response.text)
            error = error_of(response)
            assert error["type"] == "invalid_request_error"
            assert text in error["message"], (fields, error)


FAULTS: list[tuple[Exception, int, str]] = [
    (errors.QueueFull("full", retry_after_s=3), 429, "rate_limit_error"),
    (errors.CapacityError("waited", retry_after_s=3), 503, "overloaded_error"),
    (errors.NotReady("loading", retry_after_s=3), 503, "overloaded_error"),
    (errors.DeadlineExceeded("late"), 504, "timeout_error"),
    (errors.NumericalError("nan"), 500, "api_error"),
    (ValueError("secret"), 500, "api_error"),
]


@pytest.mark.parametrize(("fault", "status", "kind"), FAULTS, ids=lambda value: type(value).__name__)
async def test_faults_have_anthropics_types_before_and_after_the_first_token(
    fault: Exception, status: int, kind: str
) -> None:
    async with app(FakeEngine(error=fault)) as server:
        response = await create(server, stream=True)
        assert (response.status_code, error_of(response)["type"]) == (status, kind)
        if status in (429, 503):
            assert response.headers["retry-after"] == "3"
    async with app(FakeEngine(error=fault, error_after=2, delay_s=0.001)) as server:
        response = await create(server, stream=True)
        events = read_events(response)
        assert set(events[-1]) == {"type", "error"}
        assert (events[-1]["type"], events[-1]["error"]["type"]) == ("error", kind)
        assert "secret" not in response.text


async def test_routing_and_key_errors_have_anthropics_form_on_these_routes_only() -> None:
    async with app(config=make_config(api_keys=(KEY,))) as server:
        for path in (PATH, f"{PATH}/count_tokens", f"{PATH}/batches"):
            for headers in ({}, {"x-api-key": "x" * 32}):
                response = await server.post(path, HELLO, **headers)
                assert (response.status_code, error_of(response)["type"]) == (401, "authentication_error")
        key = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
        assert (await server.post(PATH, HELLO, **key)).status_code == 200
        unknown = await server.post(PATH, {**HELLO, "model": "nope"}, **key)
        assert (unknown.status_code, error_of(unknown)["type"]) == (404, "not_found_error")
        batches = await server.post(f"{PATH}/batches", {}, **key)
        assert (batches.status_code, error_of(batches)["type"]) == (404, "not_found_error")
        wrong_method = await server.http.get(PATH, headers=key)
        assert (wrong_method.status_code, error_of(wrong_method)["type"]) == (405, "invalid_request_error")
        assert "request-id" not in (await server.http.get("/v1/models", headers=key)).headers
        assert set((await server.http.get("/v1/messagesx", headers=key)).json()) == {"error"}
    async with app(config=make_config(limits={"max_body_bytes": 10})) as server:
        response = await create(server)
        assert (response.status_code, error_of(response)["type"]) == (413, "request_too_large")


async def test_null_is_absent_for_every_optional_field() -> None:
    from server.messages.schema import MessagesRequest

    async with app() as server:
        names = set(MessagesRequest.model_fields) - {"messages", "max_tokens"}
        answer = await create(server, **dict.fromkeys(names))
        assert answer.status_code == 200, answer.text


async def test_counted_tokens_are_those_of_the_usage() -> None:
    async with app(FakeEngine(max_model_len=4000)) as server:
        body = {key: value for key, value in HELLO.items() if key != "max_tokens"}
        for extra in ({}, {"system": "be brief"}, {"tools": TOOLS, "system": "x"}):
            counted = await server.post(f"{PATH}/count_tokens", {**body, **extra})
            assert counted.status_code == 200, counted.text
            usage = (await create(server, **extra)).json()["usage"]
            assert counted.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
        assert not (await server.post(f"{PATH}/count_tokens", {**body, "messages": []})).is_success


async def test_the_official_client_raises_its_own_exceptions() -> None:
    engine = FakeEngine(delay_s=0.001, error=errors.EngineDead("gone"), error_after=10)
    async with running(engine, make_config(api_keys=(KEY,), drain_timeout_s=0.1)) as server:
        url = server.context.url
        async with anthropic.AsyncAnthropic(base_url=url, api_key="x" * 32, max_retries=0) as stranger:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                await stranger.messages.create(**HELLO)
            assert refused.value.type == "authentication_error"
        async with anthropic.AsyncAnthropic(base_url=url, auth_token=KEY, api_key=None, max_retries=0) as client:
            assert (await client.messages.create(**HELLO)).content[0].to_dict() == {"type": "text", "text": TEXT}
            with pytest.raises(anthropic.APIStatusError, match="gone"):
                async with client.messages.stream(**HELLO) as stream:
                    await stream.get_final_message()
            assert engine.num_active == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    engine = FakeEngine(["x"] * 1000, delay_s=0.005, max_model_len=2000)
    async with running(engine) as server:
        async with connection(server) as client:
            client.post(PATH, json.dumps({**HELLO, "max_tokens": 1000, "stream": stream}).encode())
            await eventually(lambda: engine.num_yielded > 3)
        await eventually(lambda: engine.num_active == 0)
        assert len(engine.aborted) == 1
        await eventually(lambda: server.context.gate.num_in_flight == 0)
