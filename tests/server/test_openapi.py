"""Our OpenAPI document: every route is in it with its body, query and answer, and examples and real answers fit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from engine.types import PoolingInfo
from server.answers import ANSWERS
from server.openapi import BODIES, QUERIES, UPLOADS, WITHOUT_BODY
from tests.fakes_engine import FakeEngine
from tests.server.support import CHAT, COMPLETIONS, App, app, error_of, eventually, make_config
from tests.server.test_chat_tools import CALL, TOOL, pieces
from tests.server.test_messages import TOOLS as MESSAGE_TOOLS
from tests.server.test_pooling import CROSS_ENCODER, EMBEDDER, THREE_CLASSES
from tests.server.test_responses import THINKING_AND_CALLS
from tests.server.test_responses import TOOLS as RESPONSE_TOOLS

NEEDS_MORE = {  # an engine that pools, adapters, a file, or something to unpin
    "/v1/batches",
    *("/v1/embeddings", "/pooling", "/classify", "/v1/classify", "/score", "/v1/score", "/rerank", "/v1/rerank"),
    *("/v2/rerank", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/admin/log_level"),
    *("/admin/cache/pin", "/admin/cache/unpin", "/admin/cache/clear", "/admin/drain"),
}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    async def read() -> dict[str, Any]:
        async with app(config=make_config(enable_docs=True)) as server:
            return dict((await server.http.get("/openapi.json")).json())

    return asyncio.run(read())


def test_every_post_route_tells_its_body_and_no_line_is_left_over(document: dict[str, Any]) -> None:
    paths = document["paths"]
    posts = {path for path, operations in paths.items() if "post" in operations}
    assert posts == set(BODIES) | WITHOUT_BODY | set(UPLOADS)
    for path in (*BODIES, *UPLOADS):
        assert "requestBody" in paths[path]["post"], path


def test_all_references_resolve_and_the_examples_fit_their_schemas(document: dict[str, Any]) -> None:
    names = set(document["components"]["schemas"])
    assert _references(document) <= {f"#/components/schemas/{name}" for name in names}
    for path in BODIES:
        media = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = {**media["schema"], "components": document["components"]}
        validator = jsonschema.Draft202012Validator(schema)
        assert not [f"{path}: {error.message[:200]}" for error in validator.iter_errors(media["example"])]


@pytest.mark.parametrize("path", sorted(set(BODIES) - NEEDS_MORE))
async def test_an_example_is_answered(path: str) -> None:
    async with app() as server:
        answer = await server.post(path, BODIES[path].example)
        assert answer.status_code == 200, answer.text


class Checked:
    """Sends requests and holds each answer against what the document says of it."""

    def __init__(self, server: App, document: dict[str, Any]) -> None:
        self.http = server.http
        self._paths = document["paths"]
        self._components = {"schemas": {name: _closed(it) for name, it in document["components"]["schemas"].items()}}

    async def __call__(self, method: str, path: str, body: Any = None, **ids: str) -> Any:
        url = path.format(**ids)
        answer = await self.http.request(method, url, **({} if body is None else {"json": body}))
        return self.check(answer, method, path)

    def check(self, answer: httpx.Response, method: str, path: str) -> Any:
        path = path.partition("?")[0]
        assert answer.status_code == 200, answer.text
        told = self._paths[path][method.lower()]["responses"]["200"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator({**told, "components": self._components})
        assert not [
            f"{path}: {error.json_path} {error.message[:300]}" for error in validator.iter_errors(answer.json())
        ]
        return answer.json()


@asynccontextmanager
async def checked(document: dict[str, Any], engine: FakeEngine, **options: Any) -> AsyncIterator[Checked]:
    async with app(engine, make_config(**options)) as server:
        yield Checked(server, document)


def _closed(schema: Any) -> Any:
    """The schema of an answer, with no members but those it tells."""
    if isinstance(schema, dict):
        closed = {name: _closed(value) for name, value in schema.items()}
        if "properties" in schema:
            closed.setdefault("additionalProperties", False)
        return closed
    return [_closed(value) for value in schema] if isinstance(schema, list) else schema


async def test_answers_of_generation_are_what_the_document_says(document: dict[str, Any]) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    every = {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True, "n": 2}
    async with checked(document, FakeEngine()) as send:
        await send("POST", CHAT, chat)
        await send("POST", CHAT, {**chat, **every, "service_tier": "auto", "max_tokens": 2})
        await send("POST", COMPLETIONS, {"prompt": "ab"})
        scored = {"prompt": ["ab", "c"], "echo": True, "logprobs": 2, "prompt_logprobs": 1, "return_token_ids": True}
        await send("POST", COMPLETIONS, {**scored, "stop": ["wor"]})
        for path in ("/v1/models", "/livez", "/readyz", "/health", "/health_generate", "/version", "/load"):
            await send("GET", path)
        await send("GET", "/v1/models/{model_id}", model_id="org/alias")
        await send("POST", "/tokenize", {"content": "ab", "with_pieces": True})
        await send("POST", "/detokenize", {"tokens": [97]})
        await send("POST", "/abort_requests", {})
        await send("POST", "/admin/drain", {"timeout_s": 0})
        await send("DELETE", "/admin/drain")
        await send("GET", "/is_sleeping")
    async with checked(document, FakeEngine(pieces("<think>hm</think>" + CALL), reasoning_parser="qwen3")) as send:
        message = (await send("POST", CHAT, {**chat, "tools": [TOOL]}))["choices"][0]["message"]
        assert {"reasoning", "tool_calls"} <= message.keys()


async def test_answers_of_responses_and_messages_are_what_the_document_says(document: dict[str, Any]) -> None:
    engine = FakeEngine(THINKING_AND_CALLS, reasoning_parser="qwen3")
    async with checked(document, engine) as send:
        response = await send("POST", "/v1/responses", {"input": "hi", "tools": RESPONSE_TOOLS, "user": "me"})
        assert {item["type"] for item in response["output"]} == {"reasoning", "message", "function_call"}
        await send("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 2, "tool_choice": "none"})
        await send("GET", "/v1/responses/{response_id}", response_id=response["id"])
        await send("GET", "/v1/responses/{response_id}/input_items?limit=1&order=asc", response_id=response["id"])
        await send("POST", "/v1/responses/input_tokens", {"input": "hi"})
        background = await send("POST", "/v1/responses", {"input": "hi", "background": True})
        await send("POST", "/v1/responses/{response_id}/cancel", response_id=background["id"])
        await send("DELETE", "/v1/responses/{response_id}", response_id=response["id"])
        asked = {"model": "fake", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
        message = await send("POST", "/v1/messages", {**asked, "tools": MESSAGE_TOOLS})
        assert {block["type"] for block in message["content"]} == {"thinking", "text", "tool_use"}
        await send("POST", "/v1/messages/count_tokens", {"model": "fake", "messages": asked["messages"]})


@pytest.mark.parametrize("pooling", [EMBEDDER, CROSS_ENCODER, THREE_CLASSES], ids=["embed", "score", "classify"])
async def test_answers_of_pooling_are_what_the_document_says(pooling: PoolingInfo, document: dict[str, Any]) -> None:
    async with checked(document, FakeEngine(pooling=pooling)) as send:
        if "embed" in pooling.tasks:
            for fields in ({}, {"encoding_format": "base64"}):
                await send("POST", "/v1/embeddings", {"input": ["ab", "c"], **fields})
                await send("POST", "/pooling", {"input": "ab", "task": "token_embed", **fields})
        else:
            await send("POST", "/classify", {"input": ["ab", "c"]})
        if len(pooling.labels) < 2:
            for documents in (True, False):
                body = {"query": "a", "documents": ["b", "c"], "return_documents": documents}
                await send("POST", "/v2/rerank", body)
            await send("POST", "/v1/score", {"queries": "a", "documents": ["b", "c"]})


async def test_answers_about_files_and_batches_are_what_the_document_says(
    tmp_path: Path, document: dict[str, Any]
) -> None:
    async with checked(document, FakeEngine(), data_folder=str(tmp_path)) as send:
        form = {"files": {"file": ("in.jsonl", b"{}")}, "data": {"purpose": "batch"}}
        file = send.check(await send.http.post("/v1/files", **form), "POST", "/v1/files")
        await send("GET", "/v1/files")
        await send("GET", "/v1/files/{file_id}", file_id=file["id"])
        batch = await send("POST", "/v1/batches", {**BODIES["/v1/batches"].example, "input_file_id": file["id"]})
        await send("GET", "/v1/batches/{batch_id}", batch_id=batch["id"])
        await send("GET", "/v1/batches?limit=1")
        await send("POST", "/v1/batches/{batch_id}/cancel", batch_id=batch["id"])
        other = send.check(await send.http.post("/v1/files", **form), "POST", "/v1/files")
        await send("DELETE", "/v1/files/{file_id}", file_id=other["id"])


def test_every_told_answer_belongs_to_a_route(document: dict[str, Any]) -> None:
    paths = document["paths"]
    assert not [key for key in ANSWERS if key[1] not in paths.get(key[0], {})]
    told = {(path, method) for path, methods in QUERIES.items() for method in methods}
    assert not [key for key in told if key[1] not in paths.get(key[0], {})]


@pytest.mark.parametrize(
    ("path", "method", "name"),
    [(path, method, name) for path, methods in QUERIES.items() for method, names in methods.items() for name in names],
)
async def test_a_query_parameter_is_in_the_document_and_is_looked_at(
    path: str, method: str, name: str, tmp_path: Path, document: dict[str, Any]
) -> None:
    parameters = document["paths"][path][method]["parameters"]
    assert [given["schema"] for given in parameters if given["name"] == name] == [QUERIES[path][method][name]]
    async with app(config=make_config(data_folder=str(tmp_path))) as server:
        created = (await server.post("/v1/responses", {"input": "hi", "background": True, "stream": True})).text
        response_id = created.partition('"id":"')[2].partition('"')[0]
        await eventually(lambda: server.context.gate.num_in_flight == 0)
        wrong = {name: "\n", **({"stream": "true"} if name == "starting_after" else {})}
        refused = await server.http.request(method, path.format(response_id=response_id), params=wrong)
        assert refused.status_code == 400, refused.text
        assert error_of(refused)["param"] == name


def _references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(_references(value) for value in node.values()))
    return set().union(*(_references(value) for value in node)) if isinstance(node, list) else set()
