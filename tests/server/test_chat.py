"""POST /v1/chat/completions: answers, streams, logprobs, prompts."""

from __future__ import annotations

from typing import Any

import pytest

from engine.types import ChatPrompt
from tests.fakes_engine import PIECES, FakeEngine
from tests.server.support import HELLO, app, error_of, events, make_config

TEXT = "".join(PIECES)


def texts(chunks: list[Any]) -> dict[int, str]:
    """Choice index -> concatenated content."""
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"] if chunk != "[DONE]" else ():
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["delta"].get("content", "")
    return joined


async def test_the_answer_has_every_key_that_clients_read() -> None:
    async with app() as server:
        answer = (await server.chat(n=2)).json()
        assert answer["id"].startswith("chatcmpl-")
        assert answer["object"] == "chat.completion"
        assert isinstance(answer["created"], int)
        assert answer["model"] == "fake"
        assert answer["system_fingerprint"].startswith("kvasir-")
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        for choice in answer["choices"]:
            assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
            assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)
        usage = answer["usage"]
        assert usage["completion_tokens"] == 2 * len(PIECES)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_cached_tokens_are_zero_first_then_positive_and_split_by_salt() -> None:
    async with app() as server:
        cached = []
        for salt in (None, None, "a", "a", "b"):
            usage = (await server.chat(cache_salt=salt)).json()["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
            assert cached[-1] < usage["prompt_tokens"]
        assert [count > 0 for count in cached] == [False, True, False, True, False]


async def test_the_stream_has_one_role_and_one_finish_chunk_per_choice_then_usage_then_done() -> None:
    async with app(FakeEngine(delay_s=0.001)) as server:
        response = await server.chat(stream=True, n=3, stream_options={"include_usage": True})
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        *chunks, usage_chunk, done = events(response)
        assert done == "[DONE]"
        assert usage_chunk["choices"] == []
        assert usage_chunk["usage"]["completion_tokens"] == 3 * len(PIECES)
        assert all(chunk["usage"] is None for chunk in chunks)
        assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in [*chunks, usage_chunk]}) == 1
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        for index in range(3):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert all("role" not in choice["delta"] for choice in own[1:])
            assert (own[-1]["delta"], own[-1]["finish_reason"], own[-1]["stop_reason"]) == ({}, "stop", None)
            assert [choice["finish_reason"] for choice in own[:-1]] == [None] * (len(own) - 1)
        assert texts(chunks) == {0: TEXT, 1: TEXT, 2: TEXT}


async def test_without_include_usage_no_chunk_speaks_of_usage() -> None:
    async with app() as server:
        for options in (None, {"include_usage": False}, {"include_obfuscation": True}):
            *chunks, done = events(await server.chat(stream=True, stream_options=options))
            assert done == "[DONE]"
            assert all("usage" not in chunk for chunk in chunks)


async def test_continuous_usage_counts_up() -> None:
    async with app(FakeEngine(delay_s=0.001)) as server:
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, usage_chunk, _ = events(await server.chat(stream=True, stream_options=options))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == usage_chunk["usage"]["completion_tokens"] == len(PIECES)


@pytest.mark.parametrize("delay_s", [0.0, 0.001])
async def test_streamed_and_whole_answers_are_equal(delay_s: float) -> None:
    fields = {"logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2}
    async with app(FakeEngine(delay_s=delay_s)) as server:
        whole = (await server.chat(**fields)).json()
        chunks = events(await server.chat(**fields, stream=True))[:-1]
        assert texts(chunks) == {0: TEXT, 1: TEXT}
        assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        for index in range(2):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            ids = [token_id for choice in own for token_id in choice.get("token_ids", ())]
            logprobs = [entry for choice in own if choice["logprobs"] for entry in choice["logprobs"]["content"]]
            assert ids == whole["choices"][index]["token_ids"]
            assert logprobs == whole["choices"][index]["logprobs"]["content"]


@pytest.mark.parametrize("num_top", [None, 0, 3])
async def test_logprobs_have_exactly_the_asked_tops_and_true_bytes(num_top: int | None) -> None:
    async with app() as server:
        choice = (await server.chat(logprobs=True, top_logprobs=num_top)).json()["choices"][0]
        entries = choice["logprobs"]["content"]
        assert choice["logprobs"]["refusal"] is None
        assert all(len(entry["top_logprobs"]) == (num_top or 0) for entry in entries)
        assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == TEXT
        named = (await server.chat(logprobs=True, return_tokens_as_token_ids=True)).json()["choices"][0]
        assert named["logprobs"]["content"][0]["token"] == "token_id:100"


async def test_the_end_token_has_no_logprob_because_it_is_not_in_the_text() -> None:
    async with app(FakeEngine(["a", "b", "end"], eos=True)) as server:
        for stream in (False, True):
            response = await server.chat(logprobs=True, stream=stream)
            chunks = events(response)[:-1] if stream else [response.json()]
            parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
            assert [entry["token"] for part in parts for entry in part["content"]] == ["a", "b"]
        choice = (await server.chat(logprobs=True, return_token_ids=True)).json()["choices"][0]
        assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == 3, "ids and logprobs stay aligned"


async def test_infinite_logprobs_become_a_number() -> None:
    async with app() as server:
        answer = (await server.chat(prompt_logprobs=1)).json()
        first, second, *_ = answer["prompt_logprobs"]
        assert first is None
        own = next(iter(second.values()))
        assert own["logprob"] == -9999.0
        assert set(own) == {"logprob", "rank", "decoded_token"}
        assert len(second) == 2


async def test_a_stop_string_is_reported_and_kept_only_on_request() -> None:
    async with app() as server:
        choice = (await server.chat(stop=" wor")).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
            "Hello",
            "stop",
            " wor",
        )
        kept = (await server.chat(stop=["x", " wor"], include_stop_str_in_output=True)).json()["choices"][0]
        assert kept["message"]["content"] == "Hello wor"
        last = events(await server.chat(stop=" wor", stream=True))[-2]["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", " wor")


async def test_max_completion_tokens_wins_and_the_answer_says_length() -> None:
    async with app() as server:
        answer = (await server.chat(max_tokens=5, max_completion_tokens=2)).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 2


async def test_without_max_tokens_the_default_applies_unless_limits_are_strict() -> None:
    async with app() as server:
        await server.chat()
        assert server.engine.seen[-1].sampling.max_tokens == 256, "the smaller of the default and the context"
    async with app(config=make_config(strict_max_tokens=True)) as server:
        await server.chat()
        assert server.engine.seen[-1].sampling.max_tokens == 0, "as much as fits"


async def test_context_overflow_is_400_with_the_numbers() -> None:
    async with app() as server:
        response = await server.chat(messages=[{"role": "user", "content": "x" * 300}])
        assert response.status_code == 400
        error = error_of(response)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert "256" in error["message"]


async def test_messages_reach_the_template_as_they_were_sent() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        {"role": "user", "content": "x", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    ]
    async with app() as server:
        assert (await server.chat(messages=messages, chat_template_kwargs={"a": 1})).status_code == 200
        prompt = server.engine.seen[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.messages == messages
        assert prompt.template_kwargs == {"a": 1}
        assert prompt.add_generation_prompt
        assert not server.engine.seen[-1].add_special_tokens


async def test_continue_final_message_and_echo() -> None:
    messages = [*HELLO["messages"], {"role": "assistant", "content": "Once "}]
    async with app() as server:
        answer = (await server.chat(messages=messages, continue_final_message=True, echo=True)).json()
        assert answer["choices"][0]["message"]["content"] == "Once " + TEXT
        prompt = server.engine.seen[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert prompt.continue_final_message
        assert not prompt.add_generation_prompt
        streamed = events(await server.chat(messages=messages, continue_final_message=True, echo=True, stream=True))
        assert texts(streamed) == {0: "Once " + TEXT}


async def test_reasoning_effort_goes_to_the_template() -> None:
    async with app() as server:
        for effort, thinking in (("none", False), ("high", True)):
            await server.chat(reasoning_effort=effort)
            prompt = server.engine.seen[-1].prompt
            assert isinstance(prompt, ChatPrompt)
            switches = {"enable_thinking": thinking, "thinking": thinking}  # the names that templates have for it
            assert prompt.template_kwargs == {"reasoning_effort": effort, **switches}


async def test_the_model_name_is_optional_and_echoed() -> None:
    async with app() as server:
        for given, echoed in ((None, "fake"), ("", "fake"), ("fake", "fake"), ("org/alias", "org/alias")):
            assert (await server.chat(model=given)).json()["model"] == echoed
        response = await server.chat(model="gpt-4")
        assert response.status_code == 404
        error = error_of(response)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "org/alias" in error["message"]


async def test_service_tier_is_echoed_as_default_when_sent() -> None:
    async with app() as server:
        assert (await server.chat(service_tier="auto")).json()["service_tier"] == "default"
        assert "service_tier" not in (await server.chat()).json()


async def test_the_fingerprint_changes_with_what_changes_the_numbers() -> None:
    from engine.config import CacheConfig, Config

    async with app() as first, app(config=Config(cache=CacheConfig(kv_cache_dtype="float16"))) as second:
        prints = [(await server.chat()).json()["system_fingerprint"] for server in (first, second, first)]
        assert prints[0] == prints[2] != prints[1]
