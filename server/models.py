"""GET /v1/models and GET /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from engine.types import ModelInfo
from server.context import ServerContext
from server.http_responses import json_response


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> Response:
        info = context.require_ready()
        names = (*context.engine.model_names, *context.engine.adapters)
        return json_response({"object": "list", "data": [_card(name, context, info) for name in names]})

    @router.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str) -> Response:
        info = context.require_ready()
        return json_response(_card(context.resolve_model(model_id, with_adapters=True), context, info))

    return router


def _card(name: str, context: ServerContext, info: ModelInfo) -> dict[str, Any]:
    adapter = context.engine.adapters.get(name)
    base = context.engine.model_names[0]
    return {
        "id": name,
        "object": "model",
        "created": context.created if adapter is None else adapter.created_s,
        "owned_by": "kvasir",
        "root": base if adapter is None else name,
        "parent": None if adapter is None else base,
        "max_model_len": info.max_model_len,
        "permission": [],
    }
