"""POST /v1/responses: answers, event streams, items, translation to chat, errors."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from engine import errors
from engine.types import ChatPrompt
from tests.fakes_engine import PIECES, FakeEngine
from tests.server.support import App, app, connection, error_of, eventually, make_config, running

PATH = "/v1/responses"
TEXT = "".join(PIECES)
THINKING_AND_CALLS = (
    "<think>", "let me", " see", "</think>\n", "I'll ", "look.", "\n<tool_call>\n",
    '{"name": "weather", "arguments": {"city"', ': "Os', 'lo"}}', "\n</tool_call>\n<tool_call>\n",
    '{"name": "time", "arguments": {}}', "\n</tool_call>",
)  # fmt: skip
WEATHER: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "name": "weather", "description": "of a city", "parameters": WEATHER},
    {"type": "function", "name": "time", "parameters": {"type": "object", "properties": {}}},
]


def read_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, whose names and numbers are checked."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        if frame.startswith(":"):
            continue
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    numbers = [event["sequence_number"] for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(events)))
    return events


def types(events: list[dict[str, Any]]) -> list[str]:
    """Event types without their common beginning; deltas in a row once."""
    names: list[str] = []
    for event in events:
        name = event["type"].removeprefix("response.")
        if not (name.endswith("delta") and names and names[-1] == name):
            names.append(name)
    return names


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("id", "call_id", "created_at", "completed_at")}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


async def create(server: App, **fields: Any) -> httpx.Response:
    return await server.post(PATH, {"input": "hi", **fields})


def prompt_of(server: App) -> ChatPrompt:
    prompt = server.engine.seen[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def test_the_answer_has_every_field_that_the_specification_requires() -> None:
    async with app() as server:
        answer = (await create(server, metadata={"a": "b"}, instructions="be brief", temperature=0.5)).json()
        assert answer["id"].startswith("resp_")
        assert (answer["object"], answer["status"], answer["model"]) == ("response", "completed", "fake")
        assert (answer["error"], answer["incomplete_details"], answer["previous_response_id"]) == (None, None, None)
        assert (answer["metadata"], answer["instructions"]) == ({"a": "b"}, "be brief")
        assert (answer["temperature"], answer["top_p"], answer["truncation"]) == (0.5, 1.0, "disabled")
        assert (answer["tools"], answer["tool_choice"], answer["parallel_tool_calls"]) == ([], "auto", True)
        assert answer["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
        assert answer["reasoning"] == {"effort": None, "summary": None}
        [message] = answer["output"]
        assert message["id"].startswith("msg_")
        assert (message["type"], message["role"], message["status"]) == ("message", "assistant", "completed")
        assert message["content"] == [{"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}]
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert usage["output_tokens"] == len(PIECES)
        assert usage["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
        assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
        again = (await create(server, metadata={"a": "b"}, instructions="be brief", temperature=0.5)).json()
        assert again["usage"]["input_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("delay_s", [0.0, 0.001])
async def test_a_text_stream_has_all_events_in_order_and_ends_with_the_whole_response(delay_s: float) -> None:
    async with app(FakeEngine(delay_s=delay_s)) as server:
        events = read_events(await create(server, stream=True))
        assert types(events) == [
            "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
            "output_text.done", "content_part.done", "output_item.done", "completed",
        ]  # fmt: skip
        assert events[0]["sequence_number"] == 0
        assert (events[0]["response"]["status"], events[0]["response"]["usage"]) == ("in_progress", None)
        item_id = events[2]["item"]["id"]
        assert events[2]["item"]["content"] == []
        assert all(event["item_id"] == item_id for event in events[3:-2])
        assert "".join(event["delta"] for event in events if event["type"].endswith("delta")) == TEXT
        assert all(event["logprobs"] == [] for event in events if event["type"].startswith("response.output_text"))
        last = events[-1]["response"]
        assert events[-2]["item"] == last["output"][0]
        assert last["usage"]["output_tokens"] == len(PIECES)
        assert "[DONE]" not in str(events)


async def test_a_comment_fills_silence_and_no_done_frame_follows() -> None:
    async with app(FakeEngine(delay_s=0.15), make_config(sse_ping_s=0.1)) as server:
        response = await create(server, stream=True, max_output_tokens=2)
        assert ": keep-alive\n\n" in response.text
        assert read_events(response)[-1]["type"] == "response.incomplete"
        assert "[DONE]" not in response.text


async def test_thinking_text_and_calls_become_items_in_order_with_their_own_events() -> None:
    async with app(FakeEngine(THINKING_AND_CALLS, delay_s=0.001)) as server:
        events = read_events(await create(server, stream=True, tools=TOOLS))
        item = ["output_item.added", "content_part.added"]
        call = [
            "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        ]  # fmt: skip
        assert types(events) == [
            "created", "in_progress",
            *item, "reasoning_text.delta", "reasoning_text.done", "content_part.done", "output_item.done",
            *item, "output_text.delta", "output_text.done", "content_part.done", "output_item.done",
            *call, *call, "completed",
        ]  # fmt: skip
        response = events[-1]["response"]
        reasoning, message, first, second = response["output"]
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "let me see"}]
        assert reasoning["summary"] == []
        assert message["content"][0]["text"].strip() == "I'll look."
        assert (first["name"], json.loads(first["arguments"])) == ("weather", {"city": "Oslo"})
        assert (second["name"], second["arguments"]) == ("time", "{}")
        assert first["call_id"] != second["call_id"]
        assert [item["id"].partition("_")[0] for item in response["output"]] == ["rs", "msg", "fc", "fc"]
        assert len({item["id"] for item in response["output"]}) == 4
        assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        for index, kind in ((0, "reasoning_text"), (1, "output_text"), (2, "function_call_arguments")):
            deltas = [
                e["delta"] for e in events if e["type"] == f"response.{kind}.delta" and e["output_index"] == index
            ]
            done = next(e for e in events if e["type"] == f"response.{kind}.done" and e["output_index"] == index)
            assert "".join(deltas) == (done["text"] if "text" in done else done["arguments"])


async def test_streamed_and_whole_answers_are_equal() -> None:
    for engine, fields in (
        (FakeEngine(THINKING_AND_CALLS, delay_s=0.001), {"tools": TOOLS}),
        (FakeEngine(delay_s=0.001), {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
        (FakeEngine(delay_s=0.001), {"max_output_tokens": 3, "cache_salt": "x"}),
    ):
        async with app(engine) as server:
            await create(server, **fields)  # both of the next ones find the prompt in the cache
            whole = (await create(server, **fields)).json()
            streamed = read_events(await create(server, stream=True, **fields))[-1]["response"]
            assert without_ids(streamed) == without_ids(whole)


async def test_log_probabilities_come_with_the_text() -> None:
    async with app(FakeEngine(delay_s=0.001)) as server:
        fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        events = read_events(await create(server, stream=True, **fields))
        entries = [e for event in events if event["type"] == "response.output_text.delta" for e in event["logprobs"]]
        assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == TEXT
        assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
        assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == entries
        assert events[-1]["response"]["top_logprobs"] == 2


async def test_a_cut_answer_is_incomplete() -> None:
    async with app() as server:
        for stream in (False, True):
            response = await create(server, max_output_tokens=2, stream=stream)
            answer = read_events(response)[-1]["response"] if stream else response.json()
            assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
            assert answer["output"][0]["status"] == "incomplete"
            assert answer["max_output_tokens"] == 2


async def test_instructions_and_items_become_chat_messages() -> None:
    items = [
        {"type": "message", "role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "looking"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "message", "role": "assistant", "content": "done"},
        {"type": "message", "role": "assistant", "content": "really"},
        {"role": "user", "content": "so?"},
    ]
    async with app() as server:
        assert (await create(server, input=items, instructions="be brief")).status_code == 200

        def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
            return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}

        system, user, assistant, *rest = prompt_of(server).messages
        assert system == {"role": "system", "content": "be brief\n\nrules"}
        assert user["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert (assistant["content"], assistant["reasoning_content"]) == ("looking", "hm")
        assert assistant["tool_calls"] == [call("c1", "f", '{"x": 1}'), call("c2", "g", "{}")]
        assert [(message["role"], message["content"]) for message in rest] == [
            ("tool", "1"),
            ("tool", "2"),
            ("assistant", "done"),
            ("assistant", "really"),
            ("user", "so?"),
        ]
        assert [message.get("tool_call_id") for message in rest[:2]] == ["c1", "c2"]


async def test_sampling_reasoning_and_extra_fields_reach_the_engine() -> None:
    async with app() as server:
        fields = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "seed": 3, "stop": [" wor"], "priority": 2}
        answer = (await create(server, **fields, reasoning={"effort": "low"}, text={"verbosity": "low"})).json()
        assert answer["output"][0]["content"][0]["text"] == "Hello"
        assert (answer["reasoning"]["effort"], answer["text"]["verbosity"]) == ("low", "low")
        request = server.engine.seen[-1]
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.25, 0.5, 7, 3)
        assert request.priority == 2
        assert prompt_of(server).template_kwargs["reasoning_effort"] == "low"


async def test_tools_reach_the_template_in_chats_form_and_are_echoed_in_theirs() -> None:
    async with app(FakeEngine()) as server:
        answer = (await create(server, tools=TOOLS, parallel_tool_calls=False)).json()
        tools = prompt_of(server).tools
        assert tools is not None
        assert [tool["function"]["name"] for tool in tools] == ["weather", "time"]
        assert tools[0]["function"]["parameters"] == WEATHER
        assert [tool["name"] for tool in answer["tools"]] == ["weather", "time"]
        assert answer["parallel_tool_calls"] is False
        choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]}
        answer = (await create(server, tools=TOOLS, tool_choice=choice)).json()
        assert answer["tool_choice"] == choice
        tools = prompt_of(server).tools
        assert tools is not None
        assert [tool["function"]["name"] for tool in tools] == ["time"]


async def test_a_format_becomes_the_constraint_of_chats_response_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    async with app() as server:
        shape = {"type": "json_schema", "name": "thing", "schema": schema, "strict": True}
        answer = (await create(server, text={"format": shape})).json()
        assert answer["text"]["format"] == shape
        constraint = server.engine.seen[-1].constraint
        assert constraint is not None
        assert constraint.kind == "json_schema"
        assert json.loads(constraint.value) == schema
        await create(server, text={"format": {"type": "json_object"}})
        constraint = server.engine.seen[-1].constraint
        assert constraint is not None
        assert constraint.kind == "json_object"
        await create(server, text={"format": {"type": "text"}})
        assert server.engine.seen[-1].constraint is None


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "missing_required_parameter"),
    ({"input": 3}, "input", "invalid_type"),
    ({"input": []}, "input", "invalid_value"),
    ({"input": [{"type": "web_search_call"}]}, "input.0", "invalid_value"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "invalid_value"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input.0.content.0.type",
        "invalid_value",
    ),
    ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input.0.id", "item_not_found"),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f"}]},
        "input.0.arguments",
        "missing_required_parameter",
    ),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]},
        "input.0.arguments",
        "invalid_value",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nope"}}, "tool_choice", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": {"type": "mcp", "server_label": "x"}}, "tool_choice", "invalid_value"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing_required_parameter"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "invalid_value"),
    ({"include": ["everything"]}, "include.0", "invalid_value"),
    ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"max_output_tokens": 10**6}, "max_output_tokens", "invalid_value"),
    ({"temperature": 3}, "temperature", "invalid_value"),
    ({"truncation": "some"}, "truncation", "invalid_value"),
    ({"metadata": {"a": 1}}, "metadata", "invalid_type"),
    ({"metadata": {"a": "x" * 513}}, "metadata", "invalid_value"),
    ({"background": True, "store": False}, "store", "invalid_value"),
    ({"previous_response_id": "resp_x"}, "previous_response_id", "previous_response_not_found"),
    ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
    ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
    ({"max_tokens": 3}, "max_tokens", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"n": 2}, "n", "unsupported_parameter"),
    ({"custom_logit_processor": "x"}, "custom_logit_processor", "unsupported_parameter"),
    ({"model": "nope"}, "model", "model_not_found"),
    ({"input": "x" * 300}, "input", "context_length_exceeded"),
]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_field_is_named_with_the_name_it_has_here(stream: bool) -> None:
    async with app() as server:
        for fields, param, code in BAD:
            response = await create(server, **{**fields, "stream": stream})
            assert response.status_code == (404 if code.endswith("not_found") else 400), (fields, response.text)
            error = error_of(response)
            assert (error["param"], error["code"]) == (param, code), (fields, error)
        assert server.context.gate.num_in_flight == 0


async def test_null_is_absent_for_every_field() -> None:
    from server.responses.schema import ResponsesRequest

    async with app() as server:
        names = {field.alias or name for name, field in ResponsesRequest.model_fields.items()} - {"input"}
        answer = await create(server, **dict.fromkeys(names))
        assert answer.status_code == 200, answer.text


async def test_an_error_before_the_first_token_is_a_status_and_later_it_is_two_events() -> None:
    async with app(FakeEngine(error=errors.QueueFull("full", retry_after_s=3))) as server:
        response = await create(server, stream=True)
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    async with app(FakeEngine(delay_s=0.001, error=errors.EngineDead("gone"), error_after=2)) as server:
        events = read_events(await create(server, stream=True))
        *_, item_done, failure, last = events
        assert item_done["type"] == "response.output_item.done"
        assert (failure["type"], failure["code"], failure["message"]) == ("error", "engine_dead", "gone")
        item = last["response"]["output"][0]
        assert last["type"] == "response.failed"
        assert last["response"]["error"] == {"code": "server_error", "message": "gone"}
        assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Hello")
        assert (await server.http.get(f"{PATH}/{last['response']['id']}")).json() == last["response"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_its_request(stream: bool) -> None:
    engine = FakeEngine(["x"] * 1000, delay_s=0.005, max_model_len=2000)
    async with running(engine) as server:
        async with connection(server) as client:
            client.post(PATH, json.dumps({"input": "x", "stream": stream}).encode())
            await eventually(lambda: engine.num_yielded > 3)
        await eventually(lambda: engine.num_active == 0)
        assert len(engine.aborted) == 1
        await eventually(lambda: server.context.gate.num_in_flight == 0)


async def test_truncation_drops_the_oldest_turns_and_keeps_system_and_question() -> None:
    turns = [{"role": role, "content": f"{role} {i} " + "x" * 8} for i in range(9) for role in ("user", "assistant")]
    items = [{"role": "system", "content": "rules"}, *turns, {"role": "user", "content": "the question"}]
    async with app() as server:
        refused = await create(server, input=items, max_output_tokens=20)
        assert error_of(refused)["code"] == "context_length_exceeded"
        answer = await create(server, input=items, max_output_tokens=20, truncation="auto")
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["input_tokens"] <= 256 - 20
        system, *kept = prompt_of(server).messages
        assert system["content"] == "rules"
        assert [message["role"] for message in kept] == ["user", "assistant"] * (len(kept) // 2) + ["user"]
        assert kept[-1]["content"] == "the question"
        assert len(kept) >= 5, "no more is dropped than must be"
        hopeless = await create(server, input="x" * 300, truncation="auto")
        assert error_of(hopeless)["code"] == "context_length_exceeded"


async def test_input_tokens_are_counted_as_the_usage_counts_them() -> None:
    async with app() as server:
        body = {"input": "how many?", "instructions": "count"}
        counted = (await server.post(f"{PATH}/input_tokens", body)).json()
        assert counted == {
            "object": "response.input_tokens",
            "input_tokens": (await server.post(PATH, body)).json()["usage"]["input_tokens"],
        }
