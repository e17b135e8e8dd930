"""Tools and thinking through a real server with Mimir, whose template has both."""

from __future__ import annotations

import json
from typing import Any

import httpx

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": CITY}}
ZONE = {
    "type": "object",
    "properties": {"zone": {"enum": ["utc", "local"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": ZONE}}
THINK = {"chat_template_kwargs": {"enable_thinking": True}}


def chat(url: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "temperature": 0, **fields}
    response = httpx.post(f"{url}/v1/chat/completions", json={"max_tokens": 120, **body}, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def streamed(url: str, **fields: Any) -> tuple[str, str, str]:
    """Content, thinking and arguments of the first call."""
    body = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "temperature": 0, **fields}
    parts = ["", "", ""]
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={"max_tokens": 120, "stream": True, **body}, timeout=60
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    delta = choice["delta"]
                    parts[0] += delta.get("content") or ""
                    parts[1] += delta.get("reasoning") or ""
                    for call in delta.get("tool_calls", ()):
                        parts[2] += call["function"]["arguments"]
    return parts[0], parts[1], parts[2]


def test_a_required_call_follows_its_schema_streamed_or_not(server_url: str) -> None:
    fields = {"tools": [WEATHER, TIME], "tool_choice": "required", "parallel_tool_calls": False}
    choice = chat(server_url, **fields)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "get_time":
        assert arguments in ({"zone": "utc"}, {"zone": "local"})
    else:
        assert set(arguments) == {"city"}
    assert streamed(server_url, **fields)[2] == call["function"]["arguments"]


def test_a_named_call_is_that_function_also_hot_and_behind_thinking(server_url: str) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    for extra in ({"temperature": 1.5, "seed": 3}, {**THINK, "thinking_budget": 4}):
        choice = chat(server_url, tools=[WEATHER, TIME], tool_choice=named, **extra)["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_time"
        assert json.loads(call["function"]["arguments"])["zone"] in ("utc", "local")
        assert choice["finish_reason"] == "stop"


def test_the_history_of_a_call_goes_through_the_template(server_url: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "What is the weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "I should look."},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    body = {"messages": messages, "tools": [WEATHER]}
    answer = httpx.post(f"{server_url}/tokenize", json={**body, "return_token_strs": True}, timeout=60).json()
    text = "".join(answer["token_strs"])
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in text
    assert "<tool_response>\nrain\n</tool_response>" in text
    assert chat(server_url, **body)["usage"]["prompt_tokens"] == answer["count"]


def test_thinking_is_counted_and_ends_at_its_budget(server_url: str) -> None:
    free = chat(server_url, **THINK)
    assert free["choices"][0]["message"]["reasoning"]
    bound = chat(server_url, **THINK, thinking_budget=3, return_token_ids=True)
    choice = bound["choices"][0]
    details = bound["usage"]["completion_tokens_details"]
    end = httpx.post(f"{server_url}/tokenize", json={"prompt": "</think>", "add_special_tokens": False}, timeout=60)
    (end_id,) = end.json()["tokens"]
    assert details["reasoning_tokens"] == choice["token_ids"].index(end_id) + 1
    assert 4 <= details["reasoning_tokens"] <= 6, "three tokens of thinking and what ends it"
    assert free["choices"][0]["message"]["reasoning"].startswith(choice["message"]["reasoning"])
    content, reasoning, _ = streamed(server_url, **THINK, thinking_budget=3)
    assert (content, reasoning) == (choice["message"]["content"], choice["message"]["reasoning"])


def test_an_answer_behind_thinking_is_constrained_too(server_url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "zone", "schema": ZONE}}
    for extra in (THINK, {**THINK, "thinking_budget": 2}, {}):
        answer = chat(server_url, response_format=form, **extra)["choices"][0]
        if answer["finish_reason"] == "stop":
            assert json.loads(answer["message"]["content"])["zone"] in ("utc", "local")
        else:
            content = answer["message"]["content"] or "{"  # none: cut off inside of its thinking
            assert (answer["finish_reason"], content[0]) == ("length", "{")


def test_n_streams_are_parsed_each_for_itself(server_url: str) -> None:
    fields = {"tools": [WEATHER, TIME], "tool_choice": "required", "n": 3, "temperature": 1.0, "seed": 1}
    choices = chat(server_url, **fields)["choices"]
    ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert len(ids) == len(set(ids)) >= 3
