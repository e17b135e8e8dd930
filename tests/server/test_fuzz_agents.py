"""No body of the Responses and Messages APIs gives a 5xx, and every refusal has the form of its API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from server.messages.schema import REFUSED as MESSAGES_REFUSED
from server.messages.schema import MessagesRequest
from server.responses.schema import REFUSED as RESPONSES_REFUSED
from server.responses.schema import ResponsesRequest
from tests.fakes_engine import FakeEngine
from tests.server import test_messages, test_responses
from tests.server.support import TIMEOUT_S, App, app, error_of, eventually
from tests.server.test_fuzz import scalars, values

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"

words = st.sampled_from([
    "message", "reasoning", "function_call", "function_call_output", "item_reference", "input_text", "output_text",
    "text", "thinking", "tool_use", "tool_result", "document", "image", "user", "assistant", "system", "tool",
    "auto", "none", "required", "any", "enabled", "function", "allowed_tools", "json_schema",
])  # fmt: skip
names = st.sampled_from([
    "type", "role", "content", "text", "id", "call_id", "name", "arguments", "output", "summary", "input", "source",
    "tool_use_id", "thinking", "signature", "is_error", "data", "title", "format", "schema", "effort", "tools", "mode",
    "budget_tokens", "parameters", "input_schema", "description", "strict",
])  # fmt: skip
leaves = st.one_of(words, scalars)
things = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=5)),
    max_leaves=10,
)
responses_fields = st.sampled_from(sorted({*ResponsesRequest.model_fields, *RESPONSES_REFUSED, "top_k", "stop"}))
messages_fields = st.sampled_from(sorted({*MessagesRequest.model_fields, *MESSAGES_REFUSED, "top_k", "top_p"}))


class Target:
    """One application for all examples, in an event loop that outlives them."""

    def __init__(self, runner: asyncio.Runner, server: App) -> None:
        self._runner = runner
        self._server = server

    def send(self, path: str, body: Any) -> None:
        """Fails on a 5xx, on an answer that hangs, and on an error that is not in its API's form."""
        self._runner.run(self._send(path, json.dumps(body).encode()))

    async def _send(self, path: str, content: bytes) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            headers = {"Content-Type": "application/json"}
            response = await self._server.http.post(path, content=content, headers=headers)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            (error_of if path == RESPONSES else test_messages.error_of)(response)
        await eventually(lambda: self._server.context.gate.num_in_flight == 0)
        assert self._server.engine.num_active == 0


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with asyncio.Runner() as runner:
        server = app(FakeEngine())
        yield Target(runner, runner.run(server.__aenter__()))
        runner.run(server.__aexit__(None, None, None))


@SETTINGS
@given(body=st.dictionaries(responses_fields, st.one_of(things, values), max_size=5), base=st.booleans())
@example(body={"background": True, "stream": True}, base=True)
@example(body={"tools": test_responses.TOOLS, "tool_choice": {"type": "allowed_tools"}}, base=True)
def test_random_responses(target: Target, body: dict[str, Any], base: bool) -> None:
    target.send(RESPONSES, {"input": "x", **body} if base else body)


@SETTINGS
@given(items=st.lists(st.dictionaries(names, things, max_size=5), max_size=4))
def test_random_items(target: Target, items: list[Any]) -> None:
    target.send(RESPONSES, {"input": items})


@SETTINGS
@given(
    path=st.sampled_from([MESSAGES, COUNT]),
    body=st.dictionaries(messages_fields, st.one_of(things, values), max_size=5),
    base=st.booleans(),
)
def test_random_messages_bodies(target: Target, path: str, body: dict[str, Any], base: bool) -> None:
    target.send(path, {**test_messages.HELLO, **body} if base else body)


@SETTINGS
@given(
    messages=st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system"]),
                "content": st.one_of(
                    st.text(max_size=5), st.lists(st.dictionaries(names, things, max_size=5), max_size=3)
                ),
            }
        ),
        max_size=3,
    )
)
def test_random_blocks(target: Target, messages: list[Any]) -> None:
    target.send(MESSAGES, {**test_messages.HELLO, "messages": messages})
