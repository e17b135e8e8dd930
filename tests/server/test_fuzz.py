"""No body gives a 5xx: random JSON, random values in known fields, random bytes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server.schemas import ChatRequest, CompletionRequest
from server.validation import UNSUPPORTED
from tests.fakes_engine import FakeEngine
from tests.server.support import CHAT, COMPLETIONS, HELLO, TIMEOUT_S, App, app, error_of

SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PATHS = (CHAT, COMPLETIONS, "/tokenize", "/detokenize")

numbers = st.one_of(
    st.integers(-5, 5),
    st.sampled_from([2**31 - 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, 16.0, 1e308, -1e-320]),
    st.floats(allow_nan=False, allow_infinity=False),
)
scalars = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=20), st.sampled_from(["", "\0", "\ud7ff", "é" * 9])
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
fields = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *UNSUPPORTED, "tokens", "content"})
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "reasoning"]),
        st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), values),
        max_size=4,
    ),
    max_size=3,
)
known_fields = st.dictionaries(st.sampled_from(fields), st.one_of(scalars, values), max_size=6)


class Target:
    """One application for all examples, in an event loop that outlives them."""

    def __init__(self, runner: asyncio.Runner, server: App) -> None:
        self._runner = runner
        self._server = server

    def send(self, path: str, content: bytes) -> None:
        """Fails on a 5xx, on an answer that hangs, and on an error that is not in the error shape."""
        self._runner.run(self._send(path, content))

    async def _send(self, path: str, content: bytes) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            headers = {"Content-Type": "application/json"}
            response = await self._server.http.post(path, content=content, headers=headers)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error_of(response)
        assert self._server.engine.num_active == 0
        assert self._server.context.gate.num_in_flight == 0


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with asyncio.Runner() as runner:
        server = app(FakeEngine())
        yield Target(runner, runner.run(server.__aenter__()))
        runner.run(server.__aexit__(None, None, None))


@SETTINGS
@given(path=st.sampled_from(PATHS), body=values)
def test_random_json(target: Target, path: str, body: Any) -> None:
    target.send(path, json.dumps(body).encode())


@SETTINGS
@given(path=st.sampled_from(PATHS), body=known_fields, base=st.booleans())
@example(path=CHAT, body={"n": 16, "stream": True, "logprobs": True, "top_logprobs": 20}, base=True)
@example(path=COMPLETIONS, body={"echo": True, "logprobs": 0, "max_tokens": 0, "stream": True}, base=True)
def test_random_values_in_known_fields(target: Target, path: str, body: dict[str, Any], base: bool) -> None:
    valid = {CHAT: HELLO, COMPLETIONS: {"prompt": "x"}}.get(path, {})
    target.send(path, json.dumps({**valid, **body} if base else body).encode())


@SETTINGS
@given(body=messages)
def test_random_messages(target: Target, body: list[Any]) -> None:
    target.send(CHAT, json.dumps({"messages": body}).encode())


@SETTINGS
@given(path=st.sampled_from(PATHS), content=st.binary(max_size=200))
def test_random_bytes(target: Target, path: str, content: bytes) -> None:
    target.send(path, content)
