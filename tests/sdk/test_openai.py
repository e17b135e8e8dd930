"""The official openai client against a real server with the bundled model: chat, completions and models."""

from __future__ import annotations

import itertools
import json
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

MODEL = "mimir"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="not-needed", max_retries=0, timeout=60)


class Answer(BaseModel):
    city: Literal["Berlin", "Paris"]
    is_capital: bool


def test_chat_whole_streamed_and_through_the_stream_helper_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=QUESTION, max_tokens=30, **GREEDY)
    streamed = client.chat.completions.create(
        messages=QUESTION, max_tokens=30, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(streamed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    with client.chat.completions.stream(messages=QUESTION, max_tokens=30, **GREEDY) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_every_chat_choice_has_its_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, seed=1, max_tokens=8, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        assert all(len(entry.top_logprobs) == 2 for entry in entries)
        assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == choice.message.content


def test_parse_gives_the_model_that_was_asked_for(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(messages=QUESTION, max_tokens=600, response_format=Answer, **GREEDY)
    assert isinstance(parsed.choices[0].message.parsed, Answer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_call_has_arguments_that_follow_the_schema(client: openai.OpenAI, stream: bool) -> None:
    parameters = {
        "type": "object",
        "properties": {"unit": {"enum": ["day", "hour"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    options: dict[str, Any] = {
        **GREEDY,
        "messages": QUESTION,
        "max_tokens": 600,
        "tools": [{"type": "function", "function": {"name": "get_time", "parameters": parameters}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    if stream:
        with client.chat.completions.stream(**options) as helper:
            message = helper.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**options).choices[0].message
    (call,) = message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "get_time"
    assert json.loads(call.function.arguments)["unit"] in ("day", "hour")


@pytest.mark.parametrize("logprobs", [None, 0, 5])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_covers_the_prompt_and_is_the_same_streamed(
    client: openai.OpenAI, logprobs: int | None, max_tokens: int
) -> None:
    prompt = "The sky is blue. Größe 世界"
    options: dict[str, Any] = {
        **GREEDY, "prompt": prompt, "echo": True, "logprobs": logprobs, "max_tokens": max_tokens
    }  # fmt: skip
    whole = client.completions.create(**options).choices[0]
    parts = [chunk.choices[0] for chunk in client.completions.create(stream=True, **options)]
    assert parts[0].text == prompt
    assert "".join(part.text for part in parts) == whole.text
    assert whole.text.startswith(prompt)
    if logprobs is None:
        assert whole.logprobs is None
        return
    assert whole.logprobs is not None
    lists = whole.logprobs.model_dump()
    for name, values in lists.items():
        joined = [getattr(part.logprobs, name) for part in parts if part.logprobs]
        assert list(itertools.chain.from_iterable(joined)) == values
    assert lists["token_logprobs"][0] is None
    assert lists["top_logprobs"][0] is None
    assert all(value <= 0 for value in lists["token_logprobs"][1:])
    assert all(max(logprobs, 1) <= len(top) <= logprobs + 1 for top in lists["top_logprobs"][1:])
    own = [
        (token, offset)
        for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True)
        if "\ufffd" not in token and not token.startswith("<|")  # parts of characters, and marks outside of the text
    ]
    assert "".join(whole.text[offset : offset + len(token)] for token, offset in own) == "".join(t for t, _ in own)
    assert lists["text_offset"] == sorted(lists["text_offset"])


def test_prompts_of_every_shape_and_their_choices(client: openai.OpenAI) -> None:
    for prompt, count in (("one", 1), (["one", "two"], 2), ([300, 301], 1), ([[300, 301], [302]], 2)):
        answer = client.completions.create(prompt=prompt, n=2, max_tokens=3, **GREEDY)  # type: ignore[call-overload]
        assert [choice.index for choice in answer.choices] == list(range(2 * count))
        pairs = zip(answer.choices[::2], answer.choices[1::2], strict=True)
        assert all(a.text == b.text for a, b in pairs), "greedy choices of one prompt are equal"


def test_a_suffix_is_refused_by_a_model_without_the_tokens_for_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="a", suffix="b")
    assert (caught.value.param, caught.value.code) == ("suffix", "unsupported_parameter")


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/such")
