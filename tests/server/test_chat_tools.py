"""Tools in chat: what reaches the template, what comes back, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.types import ChatPrompt
from tests.fakes_engine import FakeEngine
from tests.server.support import app, error_of, events

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "description": "now", "parameters": CITY}}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "東京 😀"}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}


def pieces(text: str, size: int = 3) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The message that the deltas of choice 0 make, and its finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": None}
    for chunk in chunks:
        for choice in chunk["choices"] if chunk != "[DONE]" else ():
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning", "")
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(message["calls"]), "each call is announced once, in order"
                    assert call["type"] == "function"
                    assert call["function"]["arguments"] == ""
                    message["calls"][call["index"]] = {"id": call["id"], **call["function"]}
                else:
                    assert set(call) == {"index", "function"}
                    assert set(call["function"]) == {"arguments"}
                    message["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
            message["finish"] = choice["finish_reason"] or message["finish"]
    return message


async def test_calls_come_back_as_tool_calls_and_streams_say_the_same() -> None:
    text = f"Let me look.\n{CALL}\n{SECOND}"
    async with app(FakeEngine(pieces(text), delay_s=0.0005)) as server:
        whole = (await server.chat(tools=[TOOL, OTHER])).json()["choices"][0]
        assert whole["finish_reason"] == "tool_calls"
        assert whole["message"]["content"] == "Let me look.\n"
        first, second = whole["message"]["tool_calls"]
        assert first["type"] == "function"
        assert first["function"] == {"name": "weather", "arguments": '{"city": "東京 😀"}'}
        assert second["function"] == {"name": "time", "arguments": "{}"}
        assert first["id"] != second["id"]
        streamed = joined(events(await server.chat(tools=[TOOL, OTHER], stream=True)))
        assert streamed["content"] == whole["message"]["content"]
        assert streamed["finish"] == "tool_calls"
        for index, call in enumerate(whole["message"]["tool_calls"]):
            assert {name: streamed["calls"][index][name] for name in ("name", "arguments")} == call["function"]


async def test_content_is_null_when_there_are_only_calls_and_the_key_is_absent_without_any() -> None:
    async with app(FakeEngine(pieces(CALL))) as server:
        message = (await server.chat(tools=[TOOL])).json()["choices"][0]["message"]
        assert message["content"] is None
    async with app() as server:
        assert "tool_calls" not in (await server.chat(tools=[TOOL])).json()["choices"][0]["message"]


async def test_an_answer_that_was_cut_off_is_not_one_that_calls() -> None:
    async with app(FakeEngine(pieces(CALL))) as server:
        choice = (await server.chat(tools=[TOOL], max_tokens=20)).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert '{"city": "東京 😀"}'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def test_without_tools_the_text_of_a_call_is_content() -> None:
    async with app(FakeEngine(pieces(CALL))) as server:
        for fields in ({}, {"tools": [TOOL], "tool_choice": "none"}):
            choice = (await server.chat(**fields)).json()["choices"][0]
            assert choice["message"]["content"] == CALL
            assert choice["finish_reason"] == "stop"
            prompt = server.engine.seen[-1].prompt
            assert isinstance(prompt, ChatPrompt)
            assert prompt.tools is None


async def test_the_template_gets_the_tools_as_they_were_sent() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": CITY, "x-extra": [1]}, "y": 2}
    async with app() as server:
        await server.chat(tools=[tool])
        prompt = server.engine.seen[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.tools == [tool]
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
        await server.chat(tools=[TOOL, OTHER], tool_choice=allowed)
        prompt = server.engine.seen[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.tools == [TOOL]


async def test_required_and_named_calls_are_constrained_and_named_ones_end_with_stop() -> None:
    async with app(FakeEngine(pieces(CALL))) as server:
        for choice, finish, num_tags in (("required", "tool_calls", 2), (NAMED, "stop", 1)):
            answer = (await server.chat(tools=[TOOL, OTHER], tool_choice=choice)).json()["choices"][0]
            assert answer["finish_reason"] == finish
            assert answer["message"]["tool_calls"][0]["function"]["name"] == "weather"
            constraint = server.engine.seen[-1].constraint
            assert constraint is not None
            form = json.loads(constraint.value)["format"]["elements"][-1]
            assert form["at_least_one"]
            assert len(form["tags"]) == num_tags
            assert form["tags"][0]["content"]["json_schema"] == CITY


async def test_auto_is_constrained_only_for_strict_functions_and_formats_of_the_answer() -> None:
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    async with app() as server:
        await server.chat(tools=[TOOL])
        assert server.engine.seen[-1].constraint is None
        await server.chat(tools=[strict, OTHER])
        constraint = server.engine.seen[-1].constraint
        assert constraint is not None
        form = json.loads(constraint.value)["format"]
        assert form["type"] == "triggered_tags"
        assert [tag["content"]["json_schema"] for tag in form["tags"]] == [CITY, {"type": "object"}]
        await server.chat(tools=[TOOL], response_format={"type": "json_object"})
        constraint = server.engine.seen[-1].constraint
        assert constraint is not None
        assert json.loads(constraint.value)["format"]["type"] == "or"


async def test_without_parallel_calls_only_the_first_comes() -> None:
    async with app(FakeEngine(pieces(f"{CALL}\n{SECOND}"))) as server:
        for stream in (False, True):
            response = await server.chat(tools=[TOOL, OTHER], parallel_tool_calls=False, stream=stream)
            if stream:
                assert len(joined(events(response))["calls"]) == 1
            else:
                assert len(response.json()["choices"][0]["message"]["tool_calls"]) == 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": []}, "tools"),
    ({"tools": "x"}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools.0.function.parameters"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "tools.0.function"),
    ({"tools": [TOOL, TOOL]}, "tools.1.function.name"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ({"functions": [TOOL["function"]]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "messages.0.function_call"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]},
        "messages.0",
    ),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"documents": [1]}, "documents"),
    ({"verbosity": "loud"}, "verbosity"),
    ({"thinking_budget": -2}, "thinking_budget"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=lambda value: str(value)[:50])
async def test_what_cannot_be_is_400_naming_the_field(fields: dict[str, Any], param: str) -> None:
    async with app() as server:
        response = await server.chat(**fields)
        assert response.status_code == 400
        assert str(error_of(response)["param"]).startswith(param)
        assert not server.engine.seen


async def test_a_model_without_a_format_refuses_tools() -> None:
    async with app(FakeEngine(tool_parser="none")) as server:
        response = await server.chat(tools=[TOOL])
        assert response.status_code == 400
        assert (error_of(response)["code"], error_of(response)["param"]) == ("unsupported_parameter", "tools")


async def test_fields_of_chat_are_refused_by_completions() -> None:
    async with app() as server:
        for fields in ({"tools": [TOOL]}, {"thinking_budget": 3}, {"documents": [{}]}):
            response = await server.complete(**fields)
            assert response.status_code == 400
            assert error_of(response)["param"] == next(iter(fields))
        assert (await server.complete(tool_choice="none")).status_code == 200


# ---- thinking

THOUGHT = "<think>\nfirst\nsecond\n</think>\n\nThe answer."


async def test_thinking_is_told_from_content_under_both_names_and_counted() -> None:
    async with app(FakeEngine(pieces(THOUGHT, 2), delay_s=0.0005)) as server:
        answer = (await server.chat()).json()
        message = answer["choices"][0]["message"]
        assert message["content"] == "The answer."
        assert message["reasoning"] == message["reasoning_content"] == "first\nsecond"
        num_thinking = -(-THOUGHT.index("</think>") // 2) + 4
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == num_thinking
        chunks = events(await server.chat(stream=True, stream_options={"include_usage": True}))
        streamed = joined(chunks)
        assert (streamed["content"], streamed["reasoning"]) == ("The answer.", "first\nsecond")
        assert chunks[-2]["usage"] == answer["usage"] | {
            "prompt_tokens_details": chunks[-2]["usage"]["prompt_tokens_details"]
        }
        for chunk in chunks[:-1]:
            for choice in chunk["choices"]:
                assert not ("content" in choice["delta"] and "reasoning" in choice["delta"])


async def test_an_answer_cut_inside_its_thinking_has_no_content() -> None:
    async with app(FakeEngine(pieces(THOUGHT, 2))) as server:
        answer = (await server.chat(max_tokens=6)).json()
        message = answer["choices"][0]["message"]
        assert message["content"] is None
        assert "first".startswith(message["reasoning"])
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6


async def test_thinking_can_be_left_out_left_in_or_sent_in_one_piece() -> None:
    async with app(FakeEngine(pieces(THOUGHT, 2), delay_s=0.0005)) as server:
        answer = (await server.chat(include_reasoning=False)).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "The answer.", "refusal": None}
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        message = (await server.chat(separate_reasoning=False)).json()["choices"][0]["message"]
        assert message["content"] == THOUGHT
        chunks = events(await server.chat(stream_reasoning=False, stream=True))
        deltas = [choice["delta"] for chunk in chunks[:-1] for choice in chunk["choices"]]
        assert [delta["reasoning"] for delta in deltas if "reasoning" in delta] == ["first\nsecond"]


async def test_the_names_of_the_thinking_budget_mean_the_same() -> None:
    async with app() as server:
        for name in ("thinking_budget", "thinking_token_budget", "thinking_budget_tokens"):
            await server.chat(**{name: 5})
            assert server.engine.seen[-1].max_thinking_tokens == 5
            await server.chat(**{name: -1})
            assert server.engine.seen[-1].max_thinking_tokens is None


async def test_effort_and_verbosity_reach_the_template() -> None:
    async with app() as server:
        await server.chat(reasoning_effort="none", verbosity="low")
        prompt = server.engine.seen[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.template_kwargs == {
            "reasoning_effort": "none",
            "enable_thinking": False,
            "thinking": False,
            "verbosity": "low",
        }
        await server.chat(reasoning_effort="high", chat_template_kwargs={"enable_thinking": False})
        prompt = server.engine.seen[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.template_kwargs["enable_thinking"] is False, "what is said explicitly wins"


async def test_documents_reach_the_template_and_hints_are_accepted() -> None:
    async with app() as server:
        response = await server.chat(
            documents=[{"title": "a", "text": "b"}], prediction={"type": "content", "content": ""}
        )
        assert response.status_code == 200
        prompt = server.engine.seen[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.documents == [{"title": "a", "text": "b"}]
