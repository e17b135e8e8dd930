"""Every request ends in a record that says what happened; nothing that went wrong is counted as done."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtest.client import Record, Request, Target, connect, send
from tests.loadtest.scripted_server import Script, answer, event, scripted

ASKED = Request(prompt=[5, 6, 7], max_tokens=4)


async def record_of(script: Script, request: Request = ASKED, **target: Any) -> Record:
    async with scripted(script) as url:
        chosen = Target(url=url, model="m", **target)
        async with connect(chosen) as http:
            return await send(http, chosen, request)


async def test_a_whole_answer_has_its_tokens_pieces_and_text() -> None:
    record = await record_of(answer)
    assert (record.error, record.suspicion, record.finish_reason) == (None, None, "length")
    assert (record.prompt_tokens, record.output_tokens, len(record.arrivals)) == (3, 4, 4)
    assert record.answer.text == "word " * 4
    assert record.sent <= record.arrivals[0] == record.first
    assert record.first is not None
    assert record.first <= (record.finished or 0)


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ([b"HTTP/1.1 503 x\r\nContent-Length: 4\r\n\r\nbusy"], "http 503"),
        ([event(choices=[{"text": "a"}]), None], "disconnected"),
        ([event(choices=[{"text": "a"}]), 5.0], "timeout"),
        ([event(choices=[{"text": "a"}])], "incomplete"),
        ([event(choices=[{"text": "a"}]), b"data: [DONE]\n\n"], "no usage"),
        ([event(error={"message": "gone"}), b"data: [DONE]\n\n"], "stream error"),
        ([b"data: {no json\n\n"], "unreadable"),
        ([event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4}), b"data: [DONE]\n\n"], "incomplete"),
    ],
)
async def test_what_goes_wrong_is_an_error_of_its_kind(pieces: list[bytes | float | None], kind: str) -> None:
    record = await record_of(lambda body: pieces, timeout_s=0.5 if kind == "timeout" else 30.0)
    assert record.error_kind == kind
    assert record.error
    assert record.finished is not None


async def test_a_server_known_to_end_without_done_still_has_to_give_a_finish_reason() -> None:
    whole = await record_of(lambda body: answer(body)[:-1], sends_done=False)
    assert whole.error is None
    cut = await record_of(lambda body: [event(choices=[{"text": "a"}]), *answer(body)[-2:-1]], sends_done=False)
    assert cut.error == "the answer ended without a finish_reason"


async def test_nobody_listening_is_an_error_too() -> None:
    async with scripted(answer) as url:
        pass
    target = Target(url=url, model="m")
    async with connect(target) as http:
        assert (await send(http, target, ASKED)).error_kind == "connection refused"


@pytest.mark.parametrize(
    ("completion_tokens", "prompt_tokens", "doubt"),
    [(3, 3, "4 pieces"), (9, 3, "4 were the most"), (4, 2, "prompt of 3")],
)
async def test_counts_that_contradict_the_events_are_in_doubt(
    completion_tokens: int, prompt_tokens: int, doubt: str
) -> None:
    def script(body: dict[str, Any]) -> list[bytes | float | None]:
        *pieces, _, done = answer(body)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        return [*pieces, event(choices=[], usage=usage), done]

    record = await record_of(script)
    assert record.error is None
    assert doubt in (record.suspicion or "")


async def test_events_may_be_cut_anywhere_and_carry_calls_thoughts_and_speculation() -> None:
    call = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a"'}}
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    stream = b"".join(
        [
            b": a comment\n\n",
            event(choices=[{"delta": {"role": "assistant", "content": ""}}]),
            event(choices=[{"delta": {"reasoning": "hm"}}]),
            event(choices=[{"delta": {"tool_calls": [call]}}]),
            event(choices=[{"delta": {"tool_calls": [rest]}, "finish_reason": "tool_calls"}]),
            event(
                choices=[],
                usage={"prompt_tokens": 3, "completion_tokens": 4, "speculative": {"steps": 2, "accepted": 1}},
            ),
            b"data: [DONE]\n\n",
        ]
    )
    pieces: list[bytes | float | None] = [stream[i : i + 11] for i in range(0, len(stream), 11)]
    record = await record_of(lambda body: pieces)
    assert record.error is None
    assert len(record.arrivals) == 3
    assert record.answer.text == ""
    assert record.speculative == {"steps": 2, "accepted": 1}
    (known,) = record.answer.tool_calls
    assert (known["id"], known["function"]) == ("c1", {"name": "add", "arguments": '{"a": 1}'})


async def test_a_whole_answer_without_stream_counts_the_same() -> None:
    body = json.dumps(
        {
            "choices": [{"message": {"content": "hello"}, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 4},
        }
    ).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    record = await record_of(lambda _: [head + body], stream=False)
    assert (record.error, record.output_tokens, record.answer.text) == (None, 4, "hello")


async def test_what_is_sent_is_what_was_asked_for() -> None:
    bodies: list[dict[str, Any]] = []
    messages = [{"role": "user", "content": "hi"}]
    async with scripted(answer, bodies) as url:
        target = Target(url=url, model="m", extra={"top_k": 1}, temperature=0.5, ignore_eos=False)
        async with connect(target) as http:
            await send(http, target, Request(messages=messages, max_tokens=2, fields={"tools": []}))
    (body,) = bodies
    assert (body["messages"], body["top_k"], body["tools"], body["temperature"]) == (messages, 1, [], 0.5)
    assert "ignore_eos" not in body
    assert body["stream_options"] == {"include_usage": True}
