"""schemathesis against our own OpenAPI document: whatever it allows or forbids, no case gives a server error."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode

from engine.config import CacheConfig, LoraConfig
from server.anthropic_errors import is_anthropic
from tests.fakes_engine import FakeEngine, FakeState
from tests.server.support import TIMEOUT_S, App, app, error_of, eventually, make_config
from tests.server.test_messages import error_of as anthropic_error_of
from tests.server.test_pooling import EMBEDDER

NUM_CASES = 260  # per mode
NUM_CASES_SLOW = 10_500
# a failure shows its whole case: looking for a smaller one takes minutes
SETTINGS = settings(
    deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.explicit, Phase.generate]
)
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
CONTROLS = (
    *("log_level", "profile_start", "profile_stop", "cache_stats"),
    *("cache_pin", "cache_unpin", "cache_clear", "cache_reset"),
)
PINNED = {"pin_id": None, "pinned_blocks": 0, "prefix_blocks": 1}  # what /admin/cache/pin looks at


class Target:
    """One application for all cases, in an event loop that outlives them."""

    def __init__(self, runner: asyncio.Runner, server: App) -> None:
        self._runner = runner
        self._server = server
        document: dict[str, Any] = runner.run(self._document())
        self.operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
        self.num_cases = 0

    def send(self, case: Case) -> None:
        """Fails on a 5xx, on an answer that hangs, on an error without its API's form, and on work that goes on."""
        self.num_cases += 1
        self._runner.run(self._send(case))

    async def _document(self) -> Any:
        return (await self._server.http.get("/openapi.json")).json()

    async def _send(self, case: Case) -> None:
        prepared = requests.Request(**case.as_transport_kwargs(base_url="http://test")).prepare()
        headers = {
            name: value.encode("latin-1") if isinstance(value, str) else value
            for name, value in prepared.headers.items()
        }
        async with asyncio.timeout(TIMEOUT_S):
            response = await self._server.http.request(
                str(prepared.method), str(prepared.url), content=prepared.body, headers=headers
            )
        shown = f"{prepared.method} {prepared.url} {prepared.body!r}: {response.status_code} {response.text}"
        assert response.status_code < 500, shown
        if response.status_code >= 400 and prepared.method != "HEAD":
            (anthropic_error_of if is_anthropic(response.url.path) else error_of)(response)
        if response.headers.get("content-type") == "application/json":
            json.loads(response.content)
        server = self._server
        server.engine.state = FakeState("ready")
        server.context.gate.reopen()
        await eventually(lambda: server.context.gate.num_in_flight == 0)
        assert server.engine.num_active == 0, shown


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    config = dataclasses.replace(
        make_config(enable_docs=True, data_folder=str(tmp_path_factory.mktemp("data") / "files")),
        lora=LoraConfig(enable_lora=True, lora_root="adapters"),
        cache=CacheConfig(max_pinned_blocks=8),
    )
    engine = FakeEngine(pooling=EMBEDDER, can_infill=True)
    for name in CONTROLS:
        engine.controls.add(name, lambda payload: PINNED)
    level = logging.getLogger().level
    logging.disable(logging.INFO)  # a line per request would be kept for each of them
    with asyncio.Runner() as runner:
        server = app(engine, config)
        yield Target(runner, runner.run(server.__aenter__()))
        runner.run(server.__aexit__(None, None, None))
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(level)


def explore(target: Target, mode: GenerationMode, num_cases: int) -> int:
    """Sends so many cases, the same number to each operation; returns how many.

    An operation that takes next to nothing has fewer different cases than that: then there are more rounds.
    """
    target.num_cases = 0
    strategies = [
        operation.as_strategy(generation_mode=mode)
        for operation in target.operations
        if mode is GenerationMode.POSITIVE or operation.body or operation.query  # any word fits into a path
    ]

    def send(case: Case) -> None:
        target.send(case)

    while (missing := num_cases - target.num_cases) > 0:
        share = -(-missing // len(strategies))
        for strategy in strategies:
            settings(SETTINGS, max_examples=share)(given(strategy)(send))()
    return target.num_cases


@pytest.mark.parametrize("mode", MODES, ids=[mode.value for mode in MODES])
def test_no_case_gives_a_server_error(target: Target, mode: GenerationMode) -> None:
    assert explore(target, mode, NUM_CASES) >= NUM_CASES


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=[mode.value for mode in MODES])
def test_no_case_of_thousands_gives_a_server_error(target: Target, mode: GenerationMode) -> None:
    assert explore(target, mode, NUM_CASES_SLOW) >= NUM_CASES_SLOW
