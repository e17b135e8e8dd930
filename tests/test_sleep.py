"""Sleep and wake-up around a real child process: the process and its memory are gone, and come back as they were."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio

from engine.client import AsyncEngine
from engine.config import Config, RuntimeConfig
from engine.errors import EngineError, NotReady
from engine.types import GenerationRequest, SamplingParams

COMMAND = (sys.executable, "-m", "tests.fake_engine_process")
TIMEOUT_S = 20.0


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(Config(runtime=RuntimeConfig(heartbeat_s=0.05)), command=COMMAND)
    await engine.start()
    async with asyncio.timeout(TIMEOUT_S):
        await engine.wait_ready()
    yield engine
    await engine.stop(0)


async def tokens(engine: AsyncEngine, max_tokens: int = 12) -> list[int]:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=7)
    request = GenerationRequest(prompt="hello", sampling=params, seed_given=True)
    async with asyncio.timeout(TIMEOUT_S):
        return [token_id async for output in engine.generate(request) for token_id in output.token_ids]


async def test_the_process_is_gone_and_a_new_one_gives_the_same_tokens(engine: AsyncEngine) -> None:
    before, pid = await tokens(engine), engine._supervisor.pid
    await engine.sleep(is_patient=True, timeout_s=1.0)
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert engine.state.phase == "sleeping"
    with pytest.raises(NotReady, match="sleeps") as refusal:
        await tokens(engine)
    assert refusal.value.code == "sleeping"
    await asyncio.sleep(0.3)
    assert engine.state.phase == "sleeping", "nothing wakes it by itself"
    async with asyncio.timeout(TIMEOUT_S):
        await engine.wake_up()
    assert await tokens(engine) == before
    assert engine.num_restarts == 0, "a wake-up is no restart"


async def test_running_requests_finish_first_or_end_with_an_error(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVASIR_FAKE_STEP_S", "0.02")
    await engine.sleep(is_patient=False, timeout_s=0.0)
    await engine.wake_up()
    running = asyncio.create_task(tokens(engine, 20))
    while not engine._num_open:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    await engine.sleep(is_patient=True, timeout_s=TIMEOUT_S)
    assert len(await running) == 20
    await engine.wake_up()
    running = asyncio.create_task(tokens(engine, 400))
    await asyncio.sleep(0.2)
    await engine.sleep(is_patient=False, timeout_s=0.0)
    with pytest.raises(EngineError, match="sent to sleep"):
        await running


async def test_an_engine_that_sleeps_can_be_stopped(engine: AsyncEngine) -> None:
    await engine.sleep(is_patient=True, timeout_s=0.0)
    async with asyncio.timeout(5):
        await engine.stop(0)
