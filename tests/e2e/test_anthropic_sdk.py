"""The Messages API through the official anthropic client, against a real server with the bundled model."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic.types import MessageParam, ToolParam

MODEL = "mimir"
QUESTION: list[MessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
SUM: list[MessageParam] = [{"role": "user", "content": "What is 2 plus 3?"}]
ADD: ToolParam = {
    "name": "add",
    "description": "Adds two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(server_url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server_url, api_key="not-needed", max_retries=0, timeout=60)


def test_create_and_its_usage(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model=MODEL, max_tokens=40, messages=QUESTION, system="Answer briefly.", extra_body={"temperature": 0}
    )
    assert message.content[0].type == "text"
    assert message.content[0].text
    assert message.stop_reason in ("end_turn", "max_tokens")
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION, system="Answer briefly.")
    usage = message.usage
    assert usage.cache_read_input_tokens is not None
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert message._request_id


def test_the_stream_helper_ends_with_the_same_message(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 40,
        "messages": QUESTION,
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].type == whole.content[0].type == "text"
    assert text == final.content[0].text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.cache_read_input_tokens
    assert final.stop_reason == whole.stop_reason


def test_a_call_and_its_result(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "tools": [ADD], "extra_body": {"temperature": 0}}
    whole = client.messages.create(**options, messages=SUM, tool_choice={"type": "any"})
    call = whole.content[-1]
    assert call.type == "tool_use"
    assert (call.name, set(call.input), whole.stop_reason) == ("add", {"a", "b"}, "tool_use")
    with client.messages.stream(**options, messages=SUM, tool_choice={"type": "tool", "name": "add"}) as stream:
        final = stream.get_final_message()
    streamed = final.content[-1]
    assert streamed.type == "tool_use"
    assert set(streamed.input) == {"a", "b"}
    assert final.stop_reason == "tool_use"
    answer = client.messages.create(
        **options,
        messages=[
            *SUM,
            whole.to_param(),
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "5"}]},
        ],
        tool_choice={"type": "none"},
    )
    assert answer.content[0].type == "text"


def test_thinking_is_a_block_of_its_own_and_can_be_sent_back(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 1500,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "extra_body": {"temperature": 0},
    }
    whole = client.messages.create(**options, messages=SUM)
    assert whole.content[0].type == "thinking"
    assert whole.content[0].thinking
    with client.messages.stream(**options, messages=SUM) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert {"thinking", "signature"} <= kinds
    assert final.content[0] == whole.content[0]
    more: list[MessageParam] = [*SUM, whole.to_param(), {"role": "user", "content": "And 1 more?"}]
    assert client.messages.create(**options, messages=more).content


def test_stop_sequences_are_reported(client: anthropic.Anthropic) -> None:
    first = client.messages.create(model=MODEL, max_tokens=40, messages=QUESTION, extra_body={"temperature": 0})
    assert first.content[0].type == "text"
    word = first.content[0].text.split()[1]
    stopped = client.messages.create(
        model=MODEL, max_tokens=40, messages=QUESTION, stop_sequences=[word], extra_body={"temperature": 0}
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", word)


def test_errors_become_the_clients_exceptions(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        client.messages.create(model=MODEL, max_tokens=10, messages=[])
    assert bad.value.type == "invalid_request_error"
    assert bad.value.request_id
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nope", max_tokens=10, messages=QUESTION)
    image: Any = {"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}
    with pytest.raises(anthropic.BadRequestError, match="text only"):
        client.messages.create(model=MODEL, max_tokens=10, messages=[{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.BadRequestError, match="tokens"):
        client.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "x" * 10**6}])
