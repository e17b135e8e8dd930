"""Loads keep to their bounds, send what is due when it is due, and count what they do not send."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from typing import Any

from loadtest.arrivals import recorded
from loadtest.client import Answer, Request, Run, Target
from loadtest.load import Load, drive
from loadtest.workloads import Conversation, Workload, single
from tests.loadtest.scripted_server import Script, answer, scripted


def talk(name: str, num_turns: int, think_s: float = 0.0) -> Conversation:
    """Says in every turn what was answered before."""

    def turns() -> Generator[Request, Answer, None]:
        said: list[dict[str, Any]] = [{"role": "user", "content": name}]
        while True:
            got = yield Request(messages=list(said), max_tokens=2)
            said += [{"role": "assistant", "content": got.text}, {"role": "user", "content": "go on"}]

    return Conversation(turns(), num_turns, think_s)


async def played(
    conversations: Iterator[Conversation], load: Load, script: Script = answer
) -> tuple[Run, list[dict[str, Any]]]:
    bodies: list[dict[str, Any]] = []
    async with scripted(script, bodies) as url:
        run = await drive(Target(url=url, model="m"), conversations, load)
    return run, bodies


async def test_a_conversation_grows_by_the_answers_that_it_got() -> None:
    run, bodies = await played(iter([talk("a", 3)]), Load(num_requests=3, concurrency=1))
    assert [record.error for record in run.records] == [None] * 3
    assert [len(body["messages"]) for body in bodies] == [1, 3, 5]
    assert bodies[2]["messages"][:3] == bodies[1]["messages"]
    assert bodies[1]["messages"][1] == {"role": "assistant", "content": "word word "}


async def test_the_requests_of_a_bounded_load_do_not_depend_on_who_is_first() -> None:
    sent = []
    for concurrency in (1, 3, 8):
        found = (talk(f"talk {i}", 2 + i % 3) for i in itertools.count())
        run, bodies = await played(found, Load(num_requests=8, concurrency=concurrency))
        assert len(run.records) == 8
        sent.append(sorted((body["messages"][0]["content"], len(body["messages"])) for body in bodies))
    assert sent[0] == sent[1] == sent[2]


async def test_no_more_are_in_flight_than_allowed() -> None:
    open_now = most = 0

    def script(body: dict[str, Any]) -> list[bytes | float | None]:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        return [0.02, *answer(body)]

    async with scripted(script) as url:

        def closed(record: object) -> None:
            nonlocal open_now
            open_now -= 1

        workload = Workload(num_requests=12, prompt_tokens=3, output_tokens=1)
        load = Load(num_requests=12, concurrency=3)
        run = await drive(Target(url=url, model="m"), workload.conversations(), load, progress=closed)
    assert len(run.records) == 12
    assert most == 3


async def test_latency_counts_from_when_a_request_was_due_though_it_was_sent_late() -> None:
    workload = Workload(num_requests=5, prompt_tokens=3, output_tokens=1)
    load = Load(num_requests=5, concurrency=1, arrivals=recorded([0.0] * 5))
    run, _ = await played(workload.conversations(), load, lambda body: [0.05, *answer(body)])
    late = sorted(record.late_s for record in run.records)
    assert late[0] < late[1] < late[2] < late[3] < late[4]
    assert late[4] >= 4 * 0.05  # sleeps of the scripted server, so a lower bound on any machine
    for record in run.records:
        assert record.latency_s >= record.ttft_s >= record.late_s


async def test_the_end_of_the_time_ends_the_load_and_tells_what_was_not_sent() -> None:
    found = (talk(f"talk {i}", 4) for i in itertools.count())
    load = Load(num_requests=10_000, concurrency=2, duration_s=0.5)
    run, bodies = await played(found, load, lambda body: [0.4, *answer(body)])
    assert 2 <= len(run.records) == len(bodies) < 20
    assert run.unsent > 0
    assert all(record.error is None for record in run.records)


async def test_an_open_loop_ends_at_its_time_and_with_its_trace() -> None:
    workload = Workload(num_requests=100, prompt_tokens=3, output_tokens=1)
    load = Load(num_requests=100, arrivals=recorded([0.0, 0.01, 0.02, 60.0]), duration_s=30.0)
    run, _ = await played(workload.conversations(), load)
    assert len(run.records) == 3
    load = Load(num_requests=100, arrivals=recorded([5.0, 5.01]))
    run, _ = await played(workload.conversations(), load)
    assert len(run.records) == 2


async def test_a_failed_turn_ends_its_conversation_and_the_rest_counts_as_unsent() -> None:
    def script(body: dict[str, Any]) -> list[bytes | float | None]:
        return [b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n"] if len(body["messages"]) == 3 else answer(body)

    run, _ = await played(iter([talk("a", 5)]), Load(num_requests=5, concurrency=1), script)
    assert [record.error_kind for record in run.records] == [None, "http 500"]
    assert run.unsent == 3


async def test_conversations_may_run_out_before_the_bound() -> None:
    request = Request(prompt=[1], max_tokens=1)
    run, _ = await played(iter([single(request)]), Load(num_requests=9, concurrency=4))
    assert len(run.records) == 1
