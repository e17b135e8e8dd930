"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: operators' routes, with vLLM's names and fields."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import StringConstraints

from engine.errors import UnsupportedParameter
from server.auth import require_admin
from server.body import read_object
from server.context import ServerContext
from server.fields import Body, Flag, Text
from server.validation import parse

MAX_PATH_CHARS = 4096

Name = Annotated[Text, StringConstraints(min_length=1, max_length=128)]


class LoadRequest(Body):
    lora_name: Name
    lora_path: Annotated[Text, StringConstraints(min_length=1, max_length=MAX_PATH_CHARS)]
    load_inplace: Flag = False


class UnloadRequest(Body):
    lora_name: Name


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> Response:
        _check_allowed(request, context)
        body = await read_object(request, context.config.limits)
        fields = parse(LoadRequest, body, context.config.limits, context.metrics)
        context.require_ready()
        await context.engine.load_adapter(fields.lora_name, fields.lora_path, in_place=fields.load_inplace)
        return Response(f"adapter '{fields.lora_name}' is loaded", media_type="text/plain")

    @router.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> Response:
        _check_allowed(request, context)
        body = await read_object(request, context.config.limits)
        fields = parse(UnloadRequest, body, context.config.limits, context.metrics)
        context.require_ready()
        await context.engine.unload_adapter(fields.lora_name)
        return Response(f"adapter '{fields.lora_name}' is unloaded", media_type="text/plain")

    return router


def _check_allowed(request: Request, context: ServerContext) -> None:
    require_admin(request, context.keyring, context.config.server)
    if not context.config.lora.enable_lora:
        raise UnsupportedParameter("adapters are off on this server; start it with --enable-lora", param="lora_name")
