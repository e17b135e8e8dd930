"""POST /v1/completions: prompt shapes, indices, echo, logprobs, best_of."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes_engine import PIECES, FakeEngine
from tests.server.support import app, events

TEXT = "".join(PIECES)
SHAPES: dict[str, tuple[Any, int]] = {
    "text": ("ab", 1),
    "texts": (["ab", "cde"], 2),
    "ids": ([97, 98], 1),
    "id lists": ([[97, 98], [99, 100, 101]], 2),
    "integral floats": ([97.0, 98], 1),
}


def joined(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """Choice index -> the choice that its chunks add up to."""
    whole: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        for choice in chunk["choices"]:
            own = whole.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reasons": []})
            own["text"] += choice["text"]
            if choice["logprobs"]:
                parts = own["logprobs"] or {name: [] for name in choice["logprobs"]}
                own["logprobs"] = {name: parts[name] + choice["logprobs"][name] for name in parts}
            if choice["finish_reason"]:
                own["finish_reasons"].append(choice["finish_reason"])
    return whole


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3])
async def test_every_prompt_shape_numbers_choices_and_counts_each_prompt_once(shape: str, n: int) -> None:
    prompt, num_prompts = SHAPES[shape]
    async with app(FakeEngine(delay_s=0.0005)) as server:
        whole = (await server.complete(prompt=prompt, n=n)).json()
        assert [choice["index"] for choice in whole["choices"]] == list(range(num_prompts * n))
        assert all(choice["text"] == TEXT for choice in whole["choices"])
        is_text = isinstance(prompt if num_prompts == 1 else prompt[0], str)
        expected = (5 if num_prompts == 2 else 2) + (num_prompts if is_text else 0)  # start token
        assert whole["usage"]["prompt_tokens"] == expected
        assert whole["usage"]["completion_tokens"] == num_prompts * n * len(PIECES)
        assert whole["object"] == "text_completion"
        assert whole["id"].startswith("cmpl-")
        fields = {"prompt": prompt, "n": n, "stream": True, "stream_options": {"include_usage": True}}
        *chunks, usage_chunk, done = events(await server.complete(**fields))
        assert done == "[DONE]"
        assert usage_chunk["usage"] | {"prompt_tokens_details": 0} == whole["usage"] | {"prompt_tokens_details": 0}
        assert all(chunk["usage"] is None for chunk in chunks)
        choices = joined(chunks)
        assert sorted(choices) == list(range(num_prompts * n))
        assert all(choice["text"] == TEXT for choice in choices.values())
        assert all(choice["finish_reasons"] == ["stop"] for choice in choices.values())


@pytest.mark.parametrize("logprobs", [None, 0, 5])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]])
async def test_echo_is_the_same_streamed_and_whole(logprobs: int | None, max_tokens: int, prompt: Any) -> None:
    fields = {"prompt": prompt, "echo": True, "logprobs": logprobs, "max_tokens": max_tokens, "n": 2}
    async with app(FakeEngine(delay_s=0.0005)) as server:
        whole = (await server.complete(**fields)).json()
        chunks = events(await server.complete(**fields, stream=True))[:-1]
        assert whole["usage"]["completion_tokens"] == 2 * max_tokens
        streamed = joined(chunks)
        for choice in whole["choices"]:
            assert choice["text"] == "abc" + "".join(PIECES[:max_tokens])
            assert choice["finish_reason"] == "length"
            own = streamed[choice["index"]]
            assert (own["text"], own["logprobs"]) == (choice["text"], choice["logprobs"])
            assert own["finish_reasons"] == ["length"]
            if logprobs is None:
                assert choice["logprobs"] is None
                continue
            lists = choice["logprobs"]
            num_prompt = 4 if isinstance(prompt, str) else 3
            assert {len(values) for values in lists.values()} == {num_prompt + max_tokens}
            assert lists["token_logprobs"][0] is None
            assert lists["top_logprobs"][0] is None
            assert all(value is not None for value in lists["token_logprobs"][1:])
            assert all(len(top) <= logprobs + 1 for top in lists["top_logprobs"][1:])
            assert all(token in top for token, top in zip(lists["tokens"][1:], lists["top_logprobs"][1:], strict=True))
            for token, offset in list(zip(lists["tokens"], lists["text_offset"], strict=True))[num_prompt - 3 :]:
                assert choice["text"][offset:].startswith(token)


async def test_first_chunk_of_an_echo_is_the_prompt() -> None:
    async with app() as server:
        first = events(await server.complete(prompt="abc", echo=True, stream=True))[0]
        assert first["choices"][0]["text"] == "abc"


async def test_token_ids_are_returned_on_request() -> None:
    async with app(FakeEngine(delay_s=0.0005)) as server:
        choice = (await server.complete(prompt=[1, 2], return_token_ids=True, max_tokens=2)).json()["choices"][0]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 2], [100, 101])
        plain = (await server.complete(prompt=[1, 2])).json()["choices"][0]
        assert "token_ids" not in plain
        chunks = events(await server.complete(prompt=[1, 2], return_token_ids=True, max_tokens=2, stream=True))[:-1]
        assert chunks[0]["choices"][0]["prompt_token_ids"] == [1, 2]
        assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == [100, 101]


async def test_best_of_returns_the_likeliest_and_counts_all() -> None:
    async with app() as server:
        answer = (await server.complete(n=2, best_of=4, logprobs=0)).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        means = [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]]
        assert means == [-0.25, pytest.approx(-1 / 3)], "the fake makes later choices likelier"
        assert answer["usage"]["completion_tokens"] == 4 * len(PIECES)
        plain = (await server.complete(n=1, best_of=2)).json()["choices"][0]
        assert plain["logprobs"] is None
        assert server.engine.seen[-1].num_choices == 2


async def test_prompt_logprobs_come_with_each_choice() -> None:
    async with app() as server:
        answer = (await server.complete(prompt=["ab", "cd"], prompt_logprobs=2, n=2)).json()
        for choice in answer["choices"]:
            first, *others = choice["prompt_logprobs"]
            assert first is None
            assert all(len(entry) == 3 for entry in others)


async def test_errors_name_the_prompt_they_are_about() -> None:
    from tests.server.support import error_of

    async with app() as server:
        assert error_of(await server.complete(prompt="x" * 300))["param"] == "prompt"
        error = error_of(await server.complete(prompt=["ok", "x" * 300]))
        assert (error["param"], error["code"]) == ("prompt.1", "context_length_exceeded")
