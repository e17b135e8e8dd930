"""POST /v1/completions: fields under all their names, filling in the middle, streams that equal the whole."""

from __future__ import annotations

from typing import Any

import pytest

from engine.submission import truncate
from engine.types import GenerationRequest, LogprobEntry, SamplingParams
from server.logprobs import CompletionLogprobs
from tests.fakes_engine import PIECES, FakeEngine
from tests.server.support import app, error_of, events

TEXT = "".join(PIECES)


async def test_a_suffix_makes_an_infill_prompt_that_ends_at_its_marks() -> None:
    async with app(FakeEngine(can_infill=True)) as server:
        answer = await server.complete(prompt=["ab", "c"], suffix="yz", n=2, stop_token_ids=[7], return_token_ids=True)
        assert answer.status_code == 200
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert [choice["text"] for choice in choices] == [TEXT] * 4
        assert choices[2]["prompt_token_ids"] == [1, ord("c"), 2, *b"yz", 3]
        assert [request.sampling.stop_token_ids for request in server.engine.seen] == [(7, 4)] * 2
        await server.complete(prompt=[97, 98], suffix="z")
        assert server.engine.seen[-1].prompt == [1, 97, 98, 2, ord("z"), 3]


async def test_an_infilled_answer_is_the_same_streamed() -> None:
    async with app(FakeEngine(can_infill=True)) as server:
        chunks = events(await server.complete(suffix="yz", stream=True))[:-1]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT


async def test_a_suffix_is_refused_where_the_model_or_the_request_cannot_have_one() -> None:
    async with app() as server:
        error = error_of(await server.complete(suffix="x"))
        assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
        assert (await server.complete(suffix="")).status_code == 200, "nothing follows"
    async with app(FakeEngine(can_infill=True)) as server:
        for other in ({"echo": True}, {"truncate_prompt_tokens": 3}):
            response = await server.complete(suffix="x", **other)
            assert (response.status_code, error_of(response)["param"]) == (400, "suffix")
        assert not server.engine.seen


ALIASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"no_stop_trim": True}, {"include_stop_str_in_output": True}),
    ({"extra_key": "a"}, {"cache_salt": "a"}),
    ({"extra_key": "a", "cache_salt": "b"}, {"cache_salt": "b:a"}),
    ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, {"truncation_side": "right"}),
    ({"rid": "mine"}, {"client_request_id": "mine"}),
    ({"request_id": "mine"}, {"client_request_id": "mine"}),
    ({"priority": -3, "timeout": 2}, {"priority": -3, "deadline_s": 2.0}),
    ({"stop": "x", "bad_words": ["y"]}, {"stop": ("x",), "bad_words": ("y",)}),
    ({"skip_special_tokens": False, "add_special_tokens": False}, {"skip_special_tokens": False}),
]


@pytest.mark.parametrize(("fields", "expected"), ALIASES)
async def test_fields_reach_the_engine_under_each_name(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    async with app() as server:
        for response in (await server.complete(**fields), await server.chat(**fields)):
            assert response.status_code == 200, response.text
            assert {name: getattr(server.engine.seen[-1], name) for name in expected} == expected


async def test_top_p_0_means_only_the_best_token() -> None:
    async with app() as server:
        await server.complete(top_p=0, temperature=1)
        sampling = server.engine.seen[-1].sampling
        assert (sampling.top_k, sampling.top_p) == (1, 1.0)


@pytest.mark.parametrize("name", ["length_penalty", "top_n_sigma", "xtc_probability", "dry_multiplier", "mirostat"])
async def test_samplers_of_others_are_refused_unless_they_are_off(name: str) -> None:
    off = {"length_penalty": 1.0, "top_n_sigma": -1}.get(name, 0)
    async with app() as server:
        assert (await server.complete(**{name: off})).status_code == 200
        error = error_of(await server.complete(**{name: 0.5}))
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize(("keep", "side", "kept"), [(2, "left", [3, 4]), (2, "right", [1, 2]), (-1, "right", [1, 2])])
def test_truncation_drops_tokens_on_the_side_asked_for(keep: int, side: Any, kept: list[int]) -> None:
    request = GenerationRequest(prompt="", sampling=SamplingParams(), truncate_prompt_tokens=keep, truncation_side=side)
    assert truncate([1, 2, 3, 4], request, 3) == kept


async def test_continuous_usage_counts_up_to_the_whole() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with app(FakeEngine(delay_s=0.002)) as server:
        *chunks, last = events(await server.complete(stream=True, stream_options=options, n=2))[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == last["usage"]["completion_tokens"] == 2 * len(PIECES)
    assert last["choices"] == []


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "logprobs": 2},
        {"prompt": ["ab", "c"], "echo": True, "logprobs": 1, "n": 2},
        {"stop": "wor"},
        {"stop": "wor", "include_stop_str_in_output": True},
        {"max_tokens": 3, "return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 0},
    ],
)
async def test_the_chunks_of_a_stream_join_to_the_whole_answer(fields: dict[str, Any]) -> None:
    async with app(FakeEngine(delay_s=0.001)) as server:
        whole = (await server.complete(**fields)).json()
        chunks = events(await server.complete(**fields, stream=True))[:-1]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        assert [token for part in parts for token in part.get("token_ids", [])] == choice.get("token_ids", [])
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values


def test_offsets_count_characters_where_tokens_are_parts_of_them() -> None:
    parts = [b"Gr", b"\xc3", b"\xb6", b"\xe4\xb8", b"\x96\xe7", b"\x95\x8c!", b" x"]
    entries = [LogprobEntry(1, data.decode("utf-8", "replace"), data, -1.0, 1, []) for data in parts]
    lists = CompletionLogprobs(num_top=0, as_ids=False)
    offsets = [offset for entry in entries for offset in lists.take([entry])["text_offset"]]
    text = b"".join(parts).decode()
    assert offsets == [0, 2, 2, 3, 3, 4, text.index(" x")]
