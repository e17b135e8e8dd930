"""Fields of the generation routes: types, bounds at their edges, nulls, unknown and unsupported ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.schemas import ChatRequest, CompletionRequest
from server.validation import CHAT_ONLY, UNSUPPORTED
from tests.fakes_engine import VOCAB_SIZE, FakeEngine
from tests.server.support import CHAT, COMPLETIONS, HELLO, app, error_of, make_config

# field -> (values that pass, values that do not)
BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 0.0, 2, 1e-9], [-0.01, 2.01, "1", True, []]),
    "top_p": ([1, 0.0001, 0], [1.0001, -1, "1"]),
    "top_k": ([-1, 0, 1, 2**31 - 1, 5.0], [-2, 2**31, 0.5, True]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "typical_p": ([0.5, 1], [0, 1.1]),
    "presence_penalty": ([-2, 2], [-2.01, 2.01]),
    "frequency_penalty": ([-2, 2], [-2.01, 2.01]),
    "repetition_penalty": ([0.1, 2], [0, -1, 101]),
    "seed": ([-(2**63), 2**63 - 1, -1, 0, 7.0], [-(2**63) - 1, 2**63, 0.5, "1", False]),
    "n": ([1, 15, 16], [0, 17, -1, 1.5]),
    "max_tokens": ([1, 255, 256, 16.0], [-1, 257, 16.5, "16", True]),
    "min_tokens": ([0, 16], [-1, 17]),
    "stop": (["x", ["x"] * 4, "x" * 256, []], ["", ["x"] * 5, "x" * 257, [""], [1], 1, {}]),
    "stop_token_ids": ([[], [0, VOCAB_SIZE - 1], [1] * 128], [[-1], [VOCAB_SIZE], [2**63], [1] * 129, "1", [True]]),
    "allowed_token_ids": ([[0], [1.0], [1] * 1024], [[], [-1], [VOCAB_SIZE], [2**31], [1] * 1025]),
    "logit_bias": (
        [{}, {"0": 1}, {str(VOCAB_SIZE - 1): -100}, {"5": 1e9}],
        [{"-1": 1}, {str(VOCAB_SIZE): 1}, {"x": 1}, {"1": "x"}, {"1": True}, {"9" * 20: 1}, [], {"\u0661": 1}],
    ),
    "bad_words": ([[], ["x"] * 256], [["x"] * 257, [""], "x", [1]]),
    "prompt_logprobs": ([0, 20], [-1, 21]),
    "truncate_prompt_tokens": ([-1, 1, 5], [0, -2]),
    "priority": ([-5, 0, 5], ["high", 2**31, 0.5]),
    "cache_salt": (["a", "A-z.0_9", "x" * 128], ["", "x" * 129, "a b", "a/b", "\u00e9", 1]),
    "user": (["someone@example.org", "x" * 128], ["x" * 129, 1]),
    "metadata": ([{}, {str(i): "x" for i in range(16)}], [{str(i): "x" for i in range(17)}, [], "x"]),
    "timeout": ([0.1, 600, 86400], [0, -1, 86401]),
    "stream": ([False], ["true", 1, 0]),
    "ignore_eos": ([True, False], ["yes", 1]),
    "echo": ([False], [1]),
}


@pytest.mark.parametrize("field", BOUNDS)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_every_field_is_bounded_at_its_edges(path: str, field: str) -> None:
    base = HELLO if path == CHAT else {"prompt": "ab"}
    base = {"max_tokens": 16, **base}
    good, bad = BOUNDS[field]
    async with app() as server:
        for value in good:
            response = await server.post(path, {**base, field: value})
            assert response.status_code == 200, (value, response.text)
        for value in bad:
            response = await server.post(path, {**base, field: value})
            assert response.status_code == 400, value
            error = error_of(response)
            assert error["type"] == "invalid_request_error"
            assert (error["param"] or "").split(".")[0] == field
            assert error["code"] in ("invalid_value", "invalid_type")
            assert field in error["message"]


@pytest.mark.parametrize(("path", "field", "limit"), [(CHAT, "top_logprobs", 20), (COMPLETIONS, "logprobs", 5)])
async def test_logprobs_are_bounded_exactly(path: str, field: str, limit: int) -> None:
    base = {**HELLO, "logprobs": True} if path == CHAT else {"prompt": "ab"}
    async with app() as server:
        for value in (0, limit - 1, limit):
            assert (await server.post(path, {**base, field: value})).status_code == 200
        for value in (-1, limit + 1):
            assert error_of(await server.post(path, {**base, field: value}))["param"] == field


async def test_numbers_of_things_are_bounded_exactly() -> None:
    message = {"role": "user", "content": "x"}
    part = {"type": "text", "text": "x"}
    limits = {"max_messages": 3, "max_content_parts": 3, "max_prompts": 3, "max_template_kwargs": 3}
    async with app(config=make_config(limits=limits)) as server:
        for count, status in ((2, 200), (3, 200), (4, 400)):
            for path, body in (
                (CHAT, {"messages": [message] * count}),
                (CHAT, {"messages": [{"role": "user", "content": [part] * count}]}),
                (CHAT, {**HELLO, "chat_template_kwargs": {str(i): i for i in range(count)}}),
                (COMPLETIONS, {"prompt": ["x"] * count}),
            ):
                assert (await server.post(path, body)).status_code == status, body


async def test_prompts_times_n_is_bounded_exactly() -> None:
    async with app(config=make_config(limits={"max_total_choices": 6})) as server:
        for body, status in (
            ({"prompt": ["x"] * 3, "n": 2}, 200),
            ({"prompt": ["x"] * 7, "n": 1}, 400),
            ({"prompt": ["x"] * 2, "n": 4}, 400),
            ({"prompt": ["x"] * 2, "n": 1, "best_of": 4}, 400),
        ):
            response = await server.post(COMPLETIONS, body)
            assert response.status_code == status
            assert status == 200 or error_of(response)["param"] == "n"


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], ["a", 1], [1, "a"], [[1], "a"], [True], [-1], [VOCAB_SIZE], 5, {}]
)
async def test_prompts_of_no_known_shape_are_refused(prompt: Any) -> None:
    async with app() as server:
        response = await server.complete(prompt=prompt)
        assert response.status_code == 400
        assert error_of(response)["param"] == "prompt"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([1], "messages.0"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "alien", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": ["x"]}], "messages.0.content.0"),
        ([{"role": "user", "content": "x"}, {"role": 7}], "messages.1.role"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages.0.tool_calls.0.function.name"),
    ],
)
async def test_errors_in_messages_name_the_place(messages: Any, param: str) -> None:
    async with app() as server:
        response = await server.chat(messages=messages)
        assert response.status_code == 400
        assert error_of(response)["param"] == param


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
async def test_a_missing_field_is_named(path: str, param: str) -> None:
    async with app() as server:
        for body in ({}, {param: None}):
            error = error_of(await server.post(path, body))
            assert (error["param"], error["code"]) == (param, "missing_required_parameter")


@pytest.mark.parametrize(("path", "kind"), [(CHAT, ChatRequest), (COMPLETIONS, CompletionRequest)])
async def test_null_equals_absence_for_every_field(path: str, kind: Any) -> None:
    base = HELLO if path == CHAT else {"prompt": "ab"}
    async with app() as server:
        await server.post(path, base)
        nulls = dict.fromkeys(kind.model_fields) | dict.fromkeys(UNSUPPORTED) | {"response_format": None}
        response = await server.post(path, {**nulls, **base})
        assert response.status_code == 200, response.text
        plain, with_nulls = server.engine.seen
        assert plain.sampling == with_nulls.sampling
        assert plain.prompt == with_nulls.prompt


async def test_nulls_inside_messages_and_options_equal_absence() -> None:
    message = {"role": "user", "content": "x", "name": None, "tool_calls": None, "tool_call_id": None, "refusal": None}
    async with app() as server:
        response = await server.chat(messages=[message], stream=True, stream_options={"include_usage": None})
        assert response.status_code == 200


async def test_unknown_fields_are_ignored_and_counted() -> None:
    async with app() as server:
        assert (await server.chat(frobnicate=1, x_y="z", top_a=0.5)).status_code == 200
        text = await server.metrics()
        assert "kvasir_unknown_request_fields_total 3.0" in text
        assert "frobnicate" not in text


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_fields_that_would_change_the_answer_are_refused_not_dropped(path: str) -> None:
    base = HELLO if path == CHAT else {"prompt": "ab"}
    async with app() as server:
        for name in UNSUPPORTED if path == CHAT else (*UNSUPPORTED, *CHAT_ONLY):
            response = await server.post(path, {**base, name: {"type": "json_object"}})
            assert response.status_code == 400
            error = error_of(response)
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert not server.engine.seen
        neutral = {"response_format": {"type": "text"}, "tool_choice": "none", "use_beam_search": False}
        assert (await server.post(path, {**base, **neutral})).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"chat_template_kwargs": {"x": {"nested": 1}}}, "chat_template_kwargs"),
    ],
)
async def test_chat_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], param: str) -> None:
    async with app() as server:
        response = await server.chat(**fields)
        assert response.status_code == 400, response.text
        assert error_of(response)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"n": 1, "best_of": 2, "stream": True}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "truncate_prompt_tokens": 1}, "echo"),
    ],
)
async def test_completion_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], param: str) -> None:
    async with app() as server:
        response = await server.complete(**fields)
        assert response.status_code == 400, response.text
        assert error_of(response)["param"] == param


async def test_error_bodies_list_few_problems_and_echo_nothing() -> None:
    secret = "hunter2" * 1000
    body: dict[str, Any] = dict.fromkeys(ChatRequest.model_fields, secret)
    body |= {"logit_bias": {secret: 1}, "model": secret}
    body["messages"] = [{"role": secret, "content": {secret: secret}, "name": [secret]}] * 100
    async with app() as server:
        response = await server.post(CHAT, body)
        assert response.status_code == 400
        error = error_of(response)
        assert "hunter2" not in response.text
        assert error["message"].count(";") <= 5
        unknown = await server.chat(model=secret)
        assert unknown.status_code == 404
        assert "hunter2" not in unknown.text


async def test_many_bad_parts_cost_no_more_than_one() -> None:
    body = {"messages": [{"role": "user", "content": [{}] * 256}] * 300}
    async with app() as server:
        response = await server.post(CHAT, body)
        assert response.status_code == 400
        assert len(response.content) < 1000
        assert len(json.dumps(body)) > 200_000


async def test_sampling_defaults_come_from_request_then_model_then_neutral() -> None:
    defaults = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 3}
    async with app(FakeEngine(generation_defaults=defaults)) as server:
        await server.chat(temperature=0.1, min_p=0.2)
        sampling = server.engine.seen[-1].sampling
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.1, 0.95, 20, 0.2)
        assert sampling.repetition_penalty == 1.0
        assert sampling.max_tokens == 3
        await server.complete(temperature=0)
        assert server.engine.seen[-1].sampling.temperature == 0.0
        assert server.engine.seen[-1].sampling.max_tokens == 16, "the completions default is OpenAI's"


async def test_seed_is_passed_only_when_it_was_given() -> None:
    async with app() as server:
        for seed in (None, -1, 0, 42):
            await server.chat(seed=seed)
        assert [request.seed_given for request in server.engine.seen] == [False, False, True, True]
        assert server.engine.seen[-1].sampling.seed == 42


async def test_the_deadline_is_the_shorter_of_the_request_and_the_server() -> None:
    async with app() as server:
        for timeout in (None, 5, 10_000):
            await server.chat(timeout=timeout)
        limit_s = server.context.config.scheduler.max_request_s
        assert [request.deadline_s for request in server.engine.seen] == [limit_s, 5.0, limit_s]
