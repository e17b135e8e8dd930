"""Stored responses: fetching, chaining, listing, cancelling, bounds, and that no key sees another's."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from engine import errors
from engine.config import Limits
from engine.types import ChatPrompt
from server.responses.store import ResponseStore, StoredResponse, Turn
from tests.fakes_engine import PIECES, FakeEngine
from tests.server.support import KEY, OTHER_KEY, App, app, error_of, eventually, make_config
from tests.server.test_responses import PATH, THINKING_AND_CALLS, TOOLS, create, read_events, types

TEXT = "".join(PIECES)


def entry(response_id: str, *, tenant: str = "", num_bytes: int = 100, running: Any = None) -> StoredResponse:
    response = {"id": response_id, "output": [], "text": "x" * num_bytes}
    turn = Turn([])
    return StoredResponse(tenant, response, turn, turn, running=running)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def limits(**values: Any) -> Limits:
    return Limits(**values)


def test_the_oldest_goes_when_there_are_too_many_and_other_keys_are_not_touched() -> None:
    store = ResponseStore(limits(max_stored_responses=2))
    store.put(entry("other", tenant="b"))
    for name in "abc":
        store.put(entry(name))
    assert [store.get("", name) is not None for name in "abc"] == [False, True, True]
    assert store.get("b", "other") is not None
    assert store.get("", "other") is None, "another key's id is no id"


def test_bytes_are_bounded_and_freed_again() -> None:
    store = ResponseStore(limits(max_stored_response_bytes=1000))
    for name in "abcd":
        store.put(entry(name, num_bytes=400))
    assert [store.get("", name) is not None for name in "abcd"] == [False, False, True, True]
    for name in "cd":
        found = store.get("", name)
        assert found is not None
        store.delete(found)
    store.put(entry("big", num_bytes=900))
    assert store.get("", "big") is not None
    store.put(entry("too big", num_bytes=2000))
    assert store.get("", "too big") is None
    assert store.get("", "big") is None, "it was the older one"


def test_an_entry_that_grows_is_counted_again() -> None:
    store = ResponseStore(limits(max_stored_response_bytes=1000))
    store.put(entry("old", num_bytes=100))
    growing = entry("new", num_bytes=100)
    store.put(growing)
    growing.log.append(b"x" * 800)
    store.put(growing)
    assert store.get("", "old") is None
    assert store.get("", "new") is growing


def test_time_ends_what_does_not_run() -> None:
    clock = Clock()
    store = ResponseStore(limits(stored_response_ttl_s=10.0), clock)

    class Work:
        def abort(self, reason: Exception) -> None:
            raise AssertionError

    store.put(entry("running", running=Work()))
    store.put(entry("done"))
    clock.now = 9.0
    assert store.get("", "done") is not None
    clock.now = 10.0
    assert store.get("", "done") is None
    assert store.get("", "running") is not None


def test_running_work_is_never_pushed_out() -> None:
    store = ResponseStore(limits(max_stored_responses=1))

    class Work:
        def abort(self, reason: Exception) -> None:
            raise AssertionError

    store.put(entry("running", running=Work()))
    store.put(entry("done"))
    assert store.get("", "running") is not None
    assert store.get("", "done") is None


def test_a_turn_outlives_the_response_it_was_made_for() -> None:
    first = Turn([{"id": "1"}, {"id": "2"}])
    second = Turn([{"id": "3"}], first)
    assert [item["id"] for item in second.all_items()] == ["1", "2", "3"]
    assert second.size > first.size


async def test_a_response_can_be_fetched_deleted_and_is_then_gone() -> None:
    async with app() as server:
        answer = (await create(server)).json()
        assert answer["store"] is True
        url = f"{PATH}/{answer['id']}"
        assert (await server.http.get(url)).json() == answer
        deleted = (await server.http.delete(url)).json()
        assert deleted == {"id": answer["id"], "object": "response", "deleted": True}
        for response in (
            await server.http.get(url),
            await server.http.delete(url),
            await server.post(f"{url}/cancel", {}),
        ):
            assert response.status_code == 404
            assert (error_of(response)["param"], error_of(response)["code"]) == ("response_id", "response_not_found")


async def test_a_stream_is_stored_as_its_last_event_said() -> None:
    async with app(FakeEngine(delay_s=0.001)) as server:
        last = read_events(await create(server, stream=True))[-1]["response"]
        assert (await server.http.get(f"{PATH}/{last['id']}")).json() == last


async def test_without_store_nothing_is_kept() -> None:
    async with app() as server:
        answer = (await create(server, store=False)).json()
        assert answer["store"] is False
        assert (await server.http.get(f"{PATH}/{answer['id']}")).status_code == 404


async def test_a_store_that_is_off_says_so() -> None:
    async with app(config=make_config(limits={"max_stored_responses": 0})) as server:
        answer = (await create(server, store=True)).json()
        assert answer["store"] is False
        for response, param in (
            (await create(server, previous_response_id=answer["id"]), "previous_response_id"),
            (await create(server, background=True), "background"),
            (await server.http.get(f"{PATH}/{answer['id']}"), "response_id"),
        ):
            assert response.status_code == 400
            error = error_of(response)
            assert (error["param"], error["code"]) == (param, "unsupported_parameter")
            assert "--max-stored-responses" in error["message"]


async def test_chained_responses_read_the_whole_conversation_but_no_old_instructions() -> None:
    async with app(FakeEngine(THINKING_AND_CALLS, max_model_len=4000)) as server:
        first = (await create(server, input="one", instructions="old", tools=TOOLS)).json()
        calls = [item for item in first["output"] if item["type"] == "function_call"]
        outputs = [{"type": "function_call_output", "call_id": call["call_id"], "output": "42"} for call in calls]
        second = (await create(server, input=outputs, previous_response_id=first["id"], instructions="new")).json()
        assert second["previous_response_id"] == first["id"]
        await server.http.delete(f"{PATH}/{first['id']}")
        third = await create(server, input="two", previous_response_id=second["id"])
        assert third.status_code == 200, "a deleted beginning does not break what was chained to it"
        prompt = server.engine.seen[1].prompt
        assert isinstance(prompt, ChatPrompt)
        system, user, assistant, *results = prompt.messages
        assert (system["content"], user["content"]) == ("new", "one")
        assert assistant["reasoning_content"] == "let me see"
        assert assistant["content"].strip() == "I'll look."
        assert [call["id"] for call in assistant["tool_calls"]] == [call["call_id"] for call in calls]
        assert [message["content"] for message in results] == ["42"] * len(calls)
        prompt = server.engine.seen[2].prompt
        assert isinstance(prompt, ChatPrompt)
        assert (prompt.messages[0]["content"], prompt.messages[-1]["content"]) == ("one", "two")


async def test_input_items_are_listed_in_pages_both_ways() -> None:
    async with app() as server:
        first = (await create(server, input="one")).json()
        items = [{"role": "user", "content": "two"}, {"role": "user", "content": [{"type": "input_text", "text": "3"}]}]
        second = (await create(server, input=items, previous_response_id=first["id"])).json()
        url = f"{PATH}/{second['id']}/input_items"
        page = (await server.http.get(url, params={"order": "asc"})).json()
        texts = [item["content"][0]["text"] for item in page["data"]]
        assert texts == ["one", TEXT, "two", "3"]
        assert page["object"] == "list"
        assert page["has_more"] is False
        newest = (await server.http.get(url, params={"limit": 3})).json()
        assert [item["content"][0]["text"] for item in newest["data"]] == ["3", "two", TEXT]
        assert newest["has_more"] is True
        rest = (await server.http.get(url, params={"after": newest["last_id"]})).json()
        assert [item["content"][0]["text"] for item in rest["data"]] == ["one"]
        for params in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "msg_x"}):
            response = await server.http.get(url, params=params)
            assert (response.status_code, error_of(response)["param"]) == (400, next(iter(params)))


async def test_items_can_be_referred_to() -> None:
    async with app() as server:
        first = (await create(server, input="one")).json()
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        answer = await create(
            server, input=[{"role": "user", "content": "x"}, reference, {"role": "user", "content": "y"}]
        )
        assert answer.status_code == 200
        prompt = server.engine.seen[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert [message["content"] for message in prompt.messages] == ["x", TEXT, "y"]


async def test_another_keys_responses_do_not_exist() -> None:
    config = make_config(api_keys=(KEY, OTHER_KEY))
    async with app(config=config, authorization=f"Bearer {KEY}") as server:
        answer = (await create(server)).json()
        other = {"authorization": f"Bearer {OTHER_KEY}"}
        url = f"{PATH}/{answer['id']}"
        background = (await create(server, background=True)).json()
        for method, path in (
            ("GET", url), ("DELETE", url), ("POST", f"{url}/cancel"), ("GET", f"{url}/input_items"),
            ("POST", f"{PATH}/{background['id']}/cancel"),
        ):  # fmt: skip
            response = await server.http.request(method, path, headers=other)
            assert (response.status_code, error_of(response)["code"]) == (404, "response_not_found"), path
        response = await server.post(PATH, {"input": "x", "previous_response_id": answer["id"]}, **other)
        assert error_of(response)["code"] == "previous_response_not_found"
        reference = [{"type": "item_reference", "id": answer["output"][0]["id"]}]
        assert error_of(await server.post(PATH, {"input": reference}, **other))["code"] == "item_not_found"
        assert (await server.http.get(url)).status_code == 200


async def fetched(server: App, response_id: str, status: str) -> dict[str, Any]:
    async with asyncio.timeout(30):
        while True:
            response: dict[str, Any] = (await server.http.get(f"{PATH}/{response_id}")).json()
            if response["status"] == status:
                return response
            await asyncio.sleep(0.01)


async def test_background_work_is_queued_then_runs_then_is_completed() -> None:
    engine = FakeEngine(delay_s=0.01)
    engine.hold = asyncio.Event()
    async with app(engine) as server:
        answer = (await create(server, background=True)).json()
        assert (answer["status"], answer["background"], answer["output"]) == ("queued", True, [])
        early = await create(server, previous_response_id=answer["id"])
        assert error_of(early)["param"] == "previous_response_id"
        assert server.context.gate.num_in_flight == 1
        engine.hold.set()
        done = await fetched(server, answer["id"], "completed")
        assert done["output"][0]["content"][0]["text"] == TEXT
        assert done["usage"]["output_tokens"] == len(PIECES)
        await eventually(lambda: server.context.gate.num_in_flight == 0)
        engine.hold = None
        assert (await create(server, previous_response_id=answer["id"])).status_code == 200


async def test_cancelling_ends_background_work_once_and_keeps_what_there_is() -> None:
    engine = FakeEngine(["x"] * 1000, delay_s=0.005, max_model_len=2000)
    async with app(engine) as server:
        answer = (await create(server, background=True)).json()
        await eventually(lambda: engine.num_yielded > 3)
        url = f"{PATH}/{answer['id']}/cancel"
        cancelled = (await server.post(url, {})).json()
        assert cancelled["status"] == "cancelled"
        assert cancelled["output"][0]["status"] == "incomplete"
        await eventually(lambda: engine.num_active == 0)
        assert len(engine.aborted) == 1
        assert (await server.post(url, {})).json() == cancelled, "again changes nothing"
        foreground = (await create(server, max_output_tokens=1)).json()
        refused = await server.post(f"{PATH}/{foreground['id']}/cancel", {})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "response_id")


async def test_deleting_ends_background_work() -> None:
    engine = FakeEngine(["x"] * 1000, delay_s=0.005, max_model_len=2000)
    async with app(engine) as server:
        answer = (await create(server, background=True)).json()
        await eventually(lambda: engine.num_active == 1)
        await server.http.delete(f"{PATH}/{answer['id']}")
        await eventually(lambda: engine.num_active == 0)
        assert (await server.http.get(f"{PATH}/{answer['id']}")).status_code == 404


async def test_a_background_stream_can_be_read_again_from_any_event() -> None:
    async with app(FakeEngine(delay_s=0.002)) as server:
        first = await create(server, background=True, stream=True)
        events = read_events(first)
        assert types(events)[:3] == ["created", "queued", "in_progress"]
        assert events[-1]["type"] == "response.completed"
        url = f"{PATH}/{events[0]['response']['id']}"
        again = await server.http.get(url, params={"stream": "true"})
        assert again.text == first.text
        rest = read_events(await server.http.get(url, params={"stream": "true", "starting_after": 5}))
        assert rest == events[6:]
        past = await server.http.get(url, params={"stream": "true", "starting_after": 10**6})
        assert past.text == ""
        for params in ({"stream": "maybe"}, {"stream": "true", "starting_after": "x"}):
            response = await server.http.get(url, params=params)
            assert (response.status_code, error_of(response)["param"]) == (400, list(params)[-1])


async def test_only_background_streams_can_be_read_again() -> None:
    async with app() as server:
        answer = (await create(server)).json()
        response = await server.http.get(f"{PATH}/{answer['id']}", params={"stream": "true"})
        assert (response.status_code, error_of(response)["param"]) == (400, "stream")


async def test_a_reader_that_joins_late_sees_the_events_that_are_still_to_come() -> None:
    engine = FakeEngine(delay_s=0.01)
    engine.hold = asyncio.Event()
    async with app(engine, make_config(sse_ping_s=0.1)) as server:
        answer = (await create(server, background=True, stream=False)).json()
        assert (await server.http.get(f"{PATH}/{answer['id']}", params={"stream": "true"})).status_code == 400
        starting = asyncio.create_task(create(server, background=True, stream=True))
        await eventually(lambda: engine.num_active == 2)
        await asyncio.sleep(0.15)
        engine.hold.set()
        response = await starting
        assert ": keep-alive" in response.text
        assert read_events(response)[-1]["type"] == "response.completed"


async def test_the_log_of_a_running_response_is_bounded_too() -> None:
    engine = FakeEngine(["x"] * 1000, delay_s=0.001, max_model_len=2000)
    async with app(engine, make_config(limits={"max_stored_response_bytes": 20_000})) as server:
        old = (await create(server, max_output_tokens=1)).json()
        response = await create(server, background=True, stream=True)
        failure, last = read_events(response)[-2:]
        assert (failure["type"], failure["code"]) == ("error", "server_overloaded")
        assert last["type"] == "response.failed"
        assert engine.num_yielded < 500
        assert (await server.http.get(f"{PATH}/{old['id']}")).status_code == 404, "finished ones made room first"
        await eventually(lambda: engine.num_active == 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_background_work_that_fails_says_so(stream: bool) -> None:
    async with app(FakeEngine(error=errors.EngineDead("gone"), error_after=2, delay_s=0.001)) as server:
        answer = await create(server, background=True, stream=stream)
        if stream:
            events = read_events(answer)
            assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
        response_id = json.loads(answer.text)["id"] if not stream else events[0]["response"]["id"]
        failed = await fetched(server, response_id, "failed")
        assert failed["error"] == {"code": "server_error", "message": "gone"}
        refused = await create(server, previous_response_id=response_id)
        assert error_of(refused)["param"] == "previous_response_id"


async def test_background_work_counts_for_its_key() -> None:
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    config = make_config(api_keys=(KEY,), limits={"max_in_flight_per_key": 2})
    async with app(engine, config, authorization=f"Bearer {KEY}") as server:
        for _ in range(2):
            assert (await create(server, background=True)).status_code == 200
        refused = await create(server, background=True)
        assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")
        engine.hold.set()
        await eventually(lambda: server.context.gate.num_in_flight == 0)
