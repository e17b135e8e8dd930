"""Our OpenAPI document: every route is in it, every body has its real model, and the examples are right and work."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from server.openapi import BODIES, UPLOADS, WITHOUT_BODY
from tests.server.support import app, make_config

NEEDS_MORE = {  # an engine that pools, adapters, a file, or something to unpin
    "/v1/batches",
    *("/v1/embeddings", "/pooling", "/classify", "/v1/classify", "/score", "/v1/score", "/rerank", "/v1/rerank"),
    *("/v2/rerank", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/start_profile", "/admin/log_level"),
    *("/admin/cache/pin", "/admin/cache/unpin", "/admin/cache/clear", "/admin/drain"),
}


async def _document() -> dict[str, Any]:
    async with app(config=make_config(enable_docs=True)) as server:
        document: dict[str, Any] = (await server.http.get("/openapi.json")).json()
        return document


async def test_every_post_route_tells_its_body_and_no_line_is_left_over() -> None:
    paths = (await _document())["paths"]
    posts = {path for path, operations in paths.items() if "post" in operations}
    assert posts == set(BODIES) | WITHOUT_BODY | set(UPLOADS)
    for path in (*BODIES, *UPLOADS):
        assert "requestBody" in paths[path]["post"], path


async def test_all_references_resolve_and_the_examples_fit_their_schemas() -> None:
    document = await _document()
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


def _references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(_references(value) for value in node.values()))
    return set().union(*(_references(value) for value in node)) if isinstance(node, list) else set()
