"""Operators' actions: from AsyncEngine through the socket to the engine's table of handlers, and back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engine import supervisor
from engine.client import AsyncEngine
from engine.config import Config, RuntimeConfig
from engine.control import Controls
from engine.errors import EngineDead, EngineError, NotReady, RequestError, UnsupportedParameter

COMMAND = (sys.executable, "-m", "tests.fake_engine_process")


@pytest_asyncio.fixture
async def engine(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AsyncEngine]:
    monkeypatch.setattr(supervisor, "MIN_BACK_OFF_S", 0.05)
    engine = AsyncEngine(Config(runtime=RuntimeConfig(heartbeat_s=0.05)), command=COMMAND)
    await engine.start()
    async with asyncio.timeout(20):
        await engine.wait_ready()
    yield engine
    await engine.stop(0)


async def test_each_call_gets_its_own_answer(engine: AsyncEngine) -> None:
    payloads = [{"number": number, "data": b"\x00", "list": [1, None, {"a": 2.5}]} for number in range(20)]
    assert await asyncio.gather(*(engine.control("echo", payload) for payload in payloads)) == payloads
    assert await engine.control("echo") == {}


async def test_what_an_action_raises_reaches_the_caller_and_harms_nothing(engine: AsyncEngine) -> None:
    with pytest.raises(RequestError, match="no such thing") as refused:
        await engine.control("refuse")
    assert refused.value.param == "thing"
    with pytest.raises(EngineError, match="the action fail failed"):
        await engine.control("fail")
    with pytest.raises(UnsupportedParameter, match="no action 'unknown'"):
        await engine.control("unknown")
    assert await engine.control("echo", {"a": 1}) == {"a": 1}


async def test_an_engine_that_ends_meanwhile_fails_the_call(engine: AsyncEngine) -> None:
    with pytest.raises(EngineDead):
        await asyncio.wait_for(engine.control("die"), 20)
    with pytest.raises(NotReady):
        await engine.control("echo")
    async with asyncio.timeout(20):
        await engine.wait_ready()
    assert await engine.control("echo", {"again": True}) == {"again": True}


async def test_a_name_is_taken_once() -> None:
    controls = Controls()
    controls.add("a", lambda payload: payload)
    with pytest.raises(ValueError, match="'a' already"):
        controls.add("a", lambda payload: payload)
    assert controls.names() == ["a"]
