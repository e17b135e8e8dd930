"""The official Python client against a real server process on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator

import openai
import pytest
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from engine import errors
from server.lifecycle import DrainingServer
from tests.fakes_engine import PIECES, FakeEngine
from tests.server.support import KEY, make_config, running

TEXT = "".join(PIECES)
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def server() -> AsyncIterator[DrainingServer]:
    async with running(FakeEngine(delay_s=0.001), make_config(api_keys=(KEY,), drain_timeout_s=0.1)) as server:
        yield server


@pytest.fixture
async def client(server: DrainingServer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.context.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def stream_text(stream: openai.AsyncStream[ChatCompletionChunk]) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="fake", messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    assert answer._request_id


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(PIECES)


async def test_chat_stream_helper_accumulates(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="fake", messages=MESSAGES) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"


async def test_completions_and_their_stream(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="fake", prompt=["a", "b"], n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    stream = await client.completions.create(model="fake", prompt=[1, 2, 3], stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["fake", "org/alias"]
    assert (await client.models.retrieve("org/alias")).id == "org/alias"


async def test_errors_become_the_clients_exceptions(client: openai.AsyncOpenAI, server: DrainingServer) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="fake", messages=MESSAGES, temperature=9)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="nope", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="x" * 32).models.list()
    engine = server.context.engine
    assert isinstance(engine, FakeEngine)
    engine.error, engine.error_after = errors.EngineDead("gone"), engine.num_yielded + 2
    stream = await client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="gone"):
        await stream_text(stream)


async def test_a_burst_of_refusals_is_survived_by_retries(client: openai.AsyncOpenAI, server: DrainingServer) -> None:
    engine = server.context.engine
    assert isinstance(engine, FakeEngine)
    engine.error = errors.QueueFull("full", retry_after_s=1)
    original, calls = engine.generate, 0

    def generate(request: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            engine.error = None
        return original(request)  # type: ignore[arg-type]

    engine.generate = generate  # type: ignore[method-assign,assignment]
    answer = await client.with_options(max_retries=2).chat.completions.create(model="fake", messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT
    assert calls == 2
