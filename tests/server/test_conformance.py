"""Promises about every route at once, whichever there are: nulls, keys, clients that leave, the page's own table."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from server.fields import Body
from server.openapi import BODIES
from tests.fakes_engine import FakeEngine, FakeState
from tests.server.support import (
    CHAT,
    COMPLETIONS,
    HELLO,
    KEY,
    OTHER_KEY,
    TIMEOUT_S,
    app,
    call,
    connection,
    eventually,
    make_config,
    running,
)
from tests.server.test_pooling import EMBEDDER

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text("utf-8")
PUBLIC = {"/livez", "/readyz", "/health"}
OPERATORS = ("/admin/", "/abort_requests", "/sleep", "/wake_up", "/is_sleeping", "/start_profile", "/stop_profile")
OPERATORS_TOO = ("/reset_prefix_cache", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
NUM_LINES = 23


def with_nulls(value: Any, model: type[BaseModel]) -> dict[str, Any]:
    """The same body with null for every field of the model that it does not have, at every depth."""
    full = {**dict.fromkeys(model.model_fields), **value}
    for name, field in model.model_fields.items():
        inner = next((kind for kind in _parts(field.annotation) if issubclass(kind, BaseModel)), None)
        if inner is None:
            continue
        if isinstance(full[name], dict):
            full[name] = with_nulls(full[name], inner)
        elif isinstance(full[name], list):
            full[name] = [with_nulls(item, inner) if isinstance(item, dict) else item for item in full[name]]
    return full


def _parts(annotation: Any) -> list[type]:
    if isinstance(annotation, type):
        return [annotation, *(part for item in get_args(annotation) for part in _parts(item))]
    return [part for item in get_args(annotation) for part in _parts(item)]


def fitting(path: str) -> list[type[Body]]:
    """The models of a route that its example is one of."""
    example = BODIES[path].example
    return [model for model in BODIES[path].models if set(example) <= set(model.model_fields)]


VOLATILE = re.compile(r'"(id|created|created_at|completed_at|call_id|item_id)": ?("[^"]*"|[0-9.]+)')


def test_bodies_are_filled_with_nulls_at_every_depth() -> None:
    filled = with_nulls({"messages": [{"role": "user", "content": "x"}]}, BODIES[CHAT].models[0])
    assert len(filled) > 40
    assert filled["messages"][0]["tool_calls"] is None


@pytest.mark.parametrize("path", sorted(BODIES))
async def test_null_for_every_optional_field_equals_absence(path: str) -> None:
    models = fitting(path)
    assert models, "the example has no field that no model knows"
    for model in models:
        example = BODIES[path].example
        answers = []
        async with app(FakeEngine(pooling=EMBEDDER)) as server:
            for body in (example, example, with_nulls(example, model)):  # the first one fills the prefix cache
                answer = await server.post(path, body)
                answers.append((answer.status_code, VOLATILE.sub("", answer.text)))
        assert answers[1] == answers[2]


async def _operations() -> list[tuple[str, str]]:
    """Every route of the real application, with a value for each part of its path."""
    async with app(config=make_config(enable_docs=True)) as server:
        paths = (await server.http.get("/openapi.json")).json()["paths"]
    return [(method.upper(), re.sub(r"{\w+}", "x", path)) for path, methods in paths.items() for method in methods]


def is_operators(path: str) -> bool:
    return path.startswith(OPERATORS) or path in OPERATORS_TOO


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({}, "none"),
        (bearer("x" * 32), "wrong"),
        ({"X-Api-Key": "x" * 32}, "wrong"),
        (bearer(KEY), "user"),
        ({"X-Api-Key": KEY}, "user"),
        (bearer(OTHER_KEY), "admin"),
        ({"X-Api-Key": OTHER_KEY}, "admin"),
    ],
)
async def test_every_route_lets_in_exactly_the_keys_that_it_is_for(headers: dict[str, str], kind: str) -> None:
    operations = await _operations()
    assert len(operations) >= 46
    assert any(is_operators(path) for _, path in operations)
    config = make_config(api_keys=(KEY,), admin_api_keys=(OTHER_KEY,), enable_docs=True)
    async with app(FakeEngine(pooling=EMBEDDER), config) as server:
        for method, path in operations:
            status, _, body = await call(server.asgi, method, path, headers)
            server.engine.state = FakeState("ready")  # an operator may have sent it to sleep, or drained the server
            server.context.gate.reopen()
            if path in PUBLIC:
                assert status == 200, (method, path)
            elif kind in ("none", "wrong"):
                assert status == 401, (method, path)
            elif kind == "user" and is_operators(path):
                assert status == 403, (method, path, body)
            else:
                assert status not in (401, 403), (method, path, body)


LEAVING: dict[str, tuple[str, dict[str, Any], int]] = {  # path, body, outputs of the engine before the client leaves
    "queued": (CHAT, {}, -1),
    "queued, streamed": (CHAT, {"stream": True}, -1),
    "first token": (COMPLETIONS, {"stream": True}, 1),
    "decode": (CHAT, {"stream": True}, 4),
    "decode, not streamed": (CHAT, {}, 4),
    "n = 8": (CHAT, {"n": 8, "stream": True}, 9),
    "n = 8, not streamed": (COMPLETIONS, {"n": 8}, 9),
    "batch prompt": (COMPLETIONS, {"prompt": ["a", "b", "c", "d"], "n": 2, "stream": True}, 9),
    "batch prompt, queued": (COMPLETIONS, {"prompt": ["a", "b", "c", "d"]}, -1),
    "constrained": (CHAT, {"regex": "[0-9]+", "stream": True}, 2),
    "with tools": (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "stream": True}, 2),
    "responses": ("/v1/responses", {"input": "x", "stream": True}, 2),
    "messages": ("/v1/messages", {"stream": True}, 2),
    "embeddings": ("/v1/embeddings", {"input": ["a", "b"]}, -1),
}


@pytest.mark.parametrize("point", LEAVING)
async def test_a_client_that_leaves_at_any_point_ends_all_its_work(point: str) -> None:
    path, fields, num_outputs = LEAVING[point]
    base = HELLO if path in (CHAT, "/v1/messages") else {} if "input" in fields else {"prompt": "x"}
    engine = FakeEngine(["a"] * 2000, delay_s=0.002, pooling=EMBEDDER, max_model_len=4096)
    if num_outputs < 0:
        engine.hold = asyncio.Event()
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {**base, limit: 2000, **fields}
    async with running(engine, make_config(drain_timeout_s=0.1)) as server:
        async with connection(server) as client:
            client.post(path, json.dumps(body).encode())
            await eventually(lambda: engine.num_active > 0 and engine.num_yielded >= num_outputs)
        await eventually(lambda: engine.num_active == 0 and server.context.gate.num_in_flight == 0)
        num_left = engine.num_yielded
        await asyncio.sleep(0.02)
        assert engine.num_yielded == num_left
        engine.hold, engine.pieces = None, ["done"]
        async with connection(server) as client, asyncio.timeout(TIMEOUT_S):
            client.post(CHAT, json.dumps(HELLO).encode())
            assert await client.status() == 200


def _lines() -> list[tuple[int, str, list[str]]]:
    """Number, promise and tests of each row of the page's table."""
    section = PAGE.split("\n## Conformance\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \|$", section, re.MULTILINE)
    return [(int(number), promise, re.findall(r"`(tests/[^`]+)`", tests)) for number, promise, tests in rows]


def test_the_page_has_every_line_and_each_names_a_test() -> None:
    assert [number for number, _, _ in _lines()] == list(range(1, NUM_LINES + 1))
    assert not [number for number, _, tests in _lines() if not tests], "a promise that no test holds"


@pytest.mark.parametrize("test_id", sorted({test for _, _, tests in _lines() for test in tests}))
def test_a_test_that_the_page_names_exists(test_id: str) -> None:
    file, name = test_id.split("::")
    source = (ROOT / file).read_text("utf-8")
    assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), test_id
