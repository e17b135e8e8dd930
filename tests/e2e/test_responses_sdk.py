"""The Responses API through the official openai client, against a real server with the bundled model."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import FunctionToolParam, Response, ResponseFunctionToolCall
from pydantic import BaseModel, Field

MODEL = "mimir"
QUESTION = "What is the capital of France?"
ADD: FunctionToolParam = {
    "type": "function",
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}
THINKING: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}


@pytest.fixture
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="not-needed", max_retries=0, timeout=60)


def test_create_retrieve_and_delete(client: openai.OpenAI) -> None:
    response = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=40)
    assert response.output_text
    assert response.usage is not None
    assert response.usage.output_tokens > 0
    assert client.responses.retrieve(response.id).to_dict() == response.to_dict()
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_the_stream_helper_follows_every_event_and_ends_with_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=40)
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=40) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == final.output_text == whole.output_text
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert final.usage is not None
    assert whole.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens_details.cached_tokens > 0


def test_parse_gives_the_object_that_the_schema_describes(client: openai.OpenAI) -> None:
    class Person(BaseModel):  # bounded, so that the object ends within the tokens asked for whatever the model writes
        name: str = Field(max_length=30)
        age: int = Field(ge=0, le=150)

    response = client.responses.parse(
        model=MODEL, input="Anna is 31 years old.", text_format=Person, temperature=0, max_output_tokens=200
    )
    assert isinstance(response.output_parsed, Person)
    with client.responses.stream(
        model=MODEL, input="Anna is 31 years old.", text_format=Person, temperature=0, max_output_tokens=200
    ) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed


def test_a_required_call_is_answered_in_the_next_response(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model=MODEL,
        input="What is 2 plus 3?",
        tools=[ADD],
        tool_choice="required",
        temperature=0,
        max_output_tokens=100,
    )
    call = first.output[-1]
    assert isinstance(call, ResponseFunctionToolCall)
    assert call.name == "add"
    assert set(json.loads(call.arguments)) == {"a", "b"}
    second = client.responses.create(
        model=MODEL,
        previous_response_id=first.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "5"}],
        tools=[ADD],
        tool_choice="none",
        temperature=0,
        max_output_tokens=40,
    )
    assert second.output_text
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in items] == ["message", "function_call", "function_call_output"]


def test_a_streamed_call_joins_to_the_whole_one(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "input": "What is 2 plus 3?",
        "tools": [ADD],
        "tool_choice": {"type": "function", "name": "add"},
        "temperature": 0,
        "max_output_tokens": 100,
    }
    whole = client.responses.create(**options).output[-1]
    with client.responses.stream(**options) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        streamed = stream.get_final_response().output[-1]
    assert isinstance(whole, ResponseFunctionToolCall)
    assert streamed.type == "function_call"
    assert "".join(pieces) == streamed.arguments == whole.arguments


def test_thinking_is_an_item_of_its_own(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "input": "What is 3 plus 4?", "temperature": 0, "extra_body": THINKING}
    response = client.responses.create(**options, max_output_tokens=200)
    assert response.output[0].type == "reasoning"
    assert response.output[0].content
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    stream = client.responses.create(**options, max_output_tokens=200, stream=True)
    text = "".join(event.delta for event in stream if event.type == "response.reasoning_text.delta")
    assert text == response.output[0].content[0].text


def test_log_probabilities(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input=QUESTION,
        temperature=0,
        max_output_tokens=5,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
    )
    message = response.output[0]
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs
    assert all(len(entry.top_logprobs) == 3 for entry in part.logprobs)
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs).decode() == part.text


def test_background_work_is_fetched_cancelled_and_streamed_again(client: openai.OpenAI) -> None:
    queued = client.responses.create(
        model=MODEL, input="Count.", background=True, max_output_tokens=3000, temperature=1
    )
    assert queued.status in ("queued", "in_progress")
    assert client.responses.cancel(queued.id).status == "cancelled"
    with client.responses.stream(
        model=MODEL, input=QUESTION, background=True, temperature=0, max_output_tokens=40
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    done: Response = client.responses.retrieve(final.id)
    assert done.status in ("completed", "incomplete")
    with client.responses.stream(response_id=final.id, starting_after=4) as again:
        rest = list(again)
    assert [event.sequence_number for event in rest] == [event.sequence_number for event in events[5:]]


def test_input_tokens_are_counted(client: openai.OpenAI) -> None:
    count = client.responses.input_tokens.count(model=MODEL, input=QUESTION, tools=[ADD])
    response = client.responses.create(model=MODEL, input=QUESTION, tools=[ADD], max_output_tokens=1)
    assert response.usage is not None
    assert count.input_tokens == response.usage.input_tokens


def test_errors_name_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model=MODEL, input="x", tools=[{"type": "web_search"}])
    assert bad.value.param == "tools.0.type"
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(
            model=MODEL, input=[{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"}]
        )
    assert bad.value.param == "input.0.arguments"
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model=MODEL, input="word " * 5000)
    assert (bad.value.param, bad.value.code) == ("input", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input="x", previous_response_id="resp_unknown")
