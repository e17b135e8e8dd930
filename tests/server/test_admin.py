"""Operators' routes: who may, and what drain, abort, sleep, log level and profiler do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from engine.config import RuntimeConfig
from tests.fakes_engine import FakeEngine
from tests.server.support import (
    CHAT,
    COMPLETIONS,
    HELLO,
    KEY,
    OTHER_KEY,
    App,
    app,
    error_of,
    events,
    eventually,
    make_config,
)

ADMIN = {"Authorization": f"Bearer {OTHER_KEY}"}
USER = {"Authorization": f"Bearer {KEY}"}
ROUTES = [
    ("POST", "/admin/drain"),
    ("DELETE", "/admin/drain"),
    ("POST", "/abort_requests"),
    ("POST", "/admin/log_level"),
    ("POST", "/start_profile"),
    ("POST", "/stop_profile"),
    ("POST", "/sleep"),
    ("POST", "/wake_up"),
    ("GET", "/is_sleeping"),
    ("GET", "/admin/cache"),
    ("POST", "/admin/cache/pin"),
    ("POST", "/admin/cache/unpin"),
    ("POST", "/admin/cache/clear"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_users_key_gets_403_and_none_401(method: str, path: str) -> None:
    config = make_config(api_keys=(KEY,), admin_api_keys=(OTHER_KEY,))
    async with app(config=config) as server:
        refused = await server.http.request(method, path, headers=USER, json={})
        assert refused.status_code == 403
        assert error_of(refused)["type"] == "permission_error"
        assert (await server.http.request(method, path, json={})).status_code == 401
        assert server.context.phase == "ready"


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_without_an_operators_key_the_routes_are_closed_where_users_have_keys(method: str, path: str) -> None:
    async with app(config=make_config(api_keys=(KEY,))) as server:
        assert (await server.http.request(method, path, headers=USER, json={})).status_code == 403


async def test_drain_refuses_new_work_waits_for_the_running_and_can_be_taken_back() -> None:
    engine = FakeEngine(delay_s=0.01)
    async with app(engine) as server:
        running = asyncio.create_task(server.chat())
        await eventually(lambda: server.context.gate.num_in_flight == 1)
        early = await server.post("/admin/drain", {"timeout_s": 0})
        assert early.json() == {"status": "draining", "in_flight": 1}
        refused = await server.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
        assert (await server.http.get("/readyz")).status_code == 503
        assert (await server.post("/admin/drain", {})).json() == {"status": "drained", "in_flight": 0}
        assert (await running).status_code == 200
        assert (await server.http.delete("/admin/drain")).json()["status"] == "ready"
        assert (await server.chat()).status_code == 200


async def _streamed(server: App, **headers: str) -> list[object]:
    return events(await server.http.post(CHAT, json={**HELLO, "stream": True, "max_tokens": 1000}, headers=headers))


async def test_a_request_is_aborted_by_the_id_of_its_answer_or_of_its_http_request() -> None:
    engine = FakeEngine(["x"] * 1000, delay_s=0.005, max_model_len=2000)
    async with app(engine) as server:
        streams = [asyncio.create_task(_streamed(server, **{"X-Request-Id": f"mine-{i}"})) for i in range(3)]
        await eventually(lambda: engine.num_yielded > 6)
        labels = [work.labels for work in server.context.gate._active]
        answer_id = next(label for own in labels if "mine-2" in own for label in own if label.startswith("chatcmpl-"))
        answer = await server.post("/abort_requests", {"request_ids": ["mine-0", answer_id, "unknown"]})
        assert answer.json() == {"status": "aborted", "aborted": 2}
        for index in (0, 2):
            last = (await streams[index])[-1]
            assert isinstance(last, dict)
            assert last["error"]["code"] == "aborted"
        assert not streams[1].done()
        assert (await server.post("/abort_requests", {})).json()["aborted"] == 1
        await streams[1]


async def test_sleep_refuses_requests_with_503_and_wake_up_takes_them_again() -> None:
    async with app() as server:
        assert (await server.http.get("/is_sleeping")).json() == {"is_sleeping": False}
        assert (await server.http.post("/sleep?level=2&mode=wait")).json() == {"is_sleeping": True}
        assert (await server.http.post("/sleep")).status_code == 200, "again is no error"
        refused = await server.chat()
        assert (refused.status_code, error_of(refused)["code"]) == (503, "sleeping")
        assert int(refused.headers["retry-after"]) > 0
        assert (await server.http.get("/readyz")).json()["phase"] == "sleeping"
        assert (await server.http.get("/health")).status_code == 200
        metrics = await server.metrics()
        assert 'kvasir_state{model="fake",state="sleeping"} 1.0' in metrics
        assert 'kvasir_http_rejections_total{reason="sleeping"} 1.0' in metrics
        assert (await server.http.post("/wake_up")).json() == {"is_sleeping": False}
        assert (await server.chat()).status_code == 200


@pytest.mark.parametrize("query", ["level=0", "level=3", "mode=keep"])
async def test_sleep_refuses_levels_and_modes_it_does_not_have(query: str) -> None:
    async with app() as server:
        refused = await server.http.post(f"/sleep?{query}")
        assert refused.status_code == 400
        assert error_of(refused)["param"] == query.partition("=")[0]
        assert server.context.phase == "ready"


async def test_the_log_level_changes_in_both_processes() -> None:
    engine = FakeEngine()
    engine.controls.add("log_level", lambda payload: {})
    async with app(engine) as server:
        assert (await server.post("/admin/log_level", {"level": "error"})).json() == {"level": "error"}
        assert logging.getLogger().level == logging.ERROR
        assert engine.controlled == [("log_level", {"level": "error"})]
        refused = await server.post("/admin/log_level", {"level": "loud"})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "level")


async def test_profiles_go_to_the_engine_and_other_bodies_are_refused() -> None:
    engine = FakeEngine()
    engine.controls.add("profile_start", lambda payload: {"trace": "t.json", **payload})
    engine.controls.add("profile_stop", lambda payload: {"trace": "t.json"})
    async with app(engine) as server:
        assert (await server.http.post("/start_profile")).json() == {"trace": "t.json", "steps": 10}
        assert (await server.post("/start_profile", {"steps": 3})).json()["steps"] == 3
        assert (await server.http.post("/stop_profile")).json() == {"trace": "t.json"}
        refused: httpx.Response = await server.post("/start_profile", {"steps": 0})
        assert (refused.status_code, error_of(refused)["param"]) == (400, "steps")


def test_profiling_is_off_by_default() -> None:
    assert RuntimeConfig().profile_folder is None


async def test_a_beginning_of_token_ids_can_be_pinned() -> None:
    engine = FakeEngine()
    engine.controls.add("cache_pin", lambda payload: {"pin_id": "pin-1", "pinned_blocks": 1, "prefix_blocks": 1})
    async with app(engine) as server:
        answer = await server.post("/admin/cache/pin", {"token_ids": [1, 2.0], "ttl_s": 5})
        assert answer.json()["pin_id"] == "pin-1"
        assert engine.controlled[-1][1]["token_ids"] == [1, 2]
        assert error_of(await server.post("/admin/cache/pin", {"token_ids": [-1]}))["param"] == "token_ids"


@pytest.mark.parametrize(
    ("path", "fields", "prefix"),
    [
        ("/v1/responses", {"input": "hi", "stream": True}, "resp_"),
        ("/v1/responses", {"input": "hi", "background": True}, "resp_"),
        ("/v1/messages", {"model": "fake", "max_tokens": 1000, "stream": True, **HELLO}, "msg_"),
        (COMPLETIONS, {"prompt": "hi", "max_tokens": 1000, "stream": True}, "cmpl-"),
    ],
)
async def test_an_answer_of_every_api_is_aborted_by_its_id(path: str, fields: dict[str, Any], prefix: str) -> None:
    engine = FakeEngine(["x"] * 1000, delay_s=0.005, max_model_len=2000)
    async with app(engine) as server:
        answering = asyncio.create_task(server.post(path, fields))
        await eventually(lambda: engine.num_yielded > 3)
        (work,) = server.context.gate._active
        (answer_id,) = (label for label in work.labels if label.startswith(prefix))
        assert (await server.post("/abort_requests", {"request_ids": [answer_id]})).json()["aborted"] == 1
        await eventually(lambda: server.context.gate.num_in_flight == 0)
        answer = await answering
        if fields.get("background"):
            assert answer.json()["id"] == answer_id
            ended = (await server.http.get(f"/v1/responses/{answer_id}")).json()
            assert ended["status"] == "failed"
        else:
            assert answer_id in answer.text
            assert "aborted" in answer.text or "ended by an operator" in answer.text
        assert engine.num_active == 0
