"""/v1/batches: create, get, list, cancel. The worker does the rest."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator

from engine.errors import InvalidParameter
from server.batches.lines import ENDPOINTS
from server.batches.store import Batch
from server.body import read_object
from server.context import ServerContext
from server.fields import INT32_MAX, Body, Integer, Metadata, Text, between, one_of, wrong_value
from server.files.paging import listed, page_number, text_of
from server.files.routes import MAX_TTL_S, MIN_TTL_S, disk_errors
from server.files.storage import storage_of
from server.files.store import UPLOADED
from server.http_responses import json_response
from server.validation import validated

MAX_PAGE, DEFAULT_PAGE = 100, 20
WINDOW = re.compile(r"([1-9][0-9]{0,4})([smh])")
SECONDS = {"s": 1, "m": 60, "h": 3600}
MAX_WINDOW_S = 24 * 3600


def _window_s(value: str) -> int:
    """Seconds of "24h", "30m" or "45s"; 0 for anything else."""
    match = WINDOW.fullmatch(value)
    return int(match[1]) * SECONDS[match[2]] if match else 0


def _window(value: Any) -> Any:
    if not isinstance(value, str) or not 0 < _window_s(value) <= MAX_WINDOW_S:
        raise wrong_value('must be "24h", or a shorter time such as "30m" or "45s"')
    return value


class ExpiresAfter(Body):
    anchor: Annotated[str, one_of("created_at")]
    seconds: Annotated[Integer, between(MIN_TTL_S, min(MAX_TTL_S, INT32_MAX))]


class BatchRequest(Body):
    input_file_id: Text
    endpoint: Annotated[str, one_of(*ENDPOINTS)]
    completion_window: Annotated[str, BeforeValidator(_window)]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/batches")
    async def create_batch(request: Request) -> Response:
        storage = storage_of(context)
        limits = context.config.limits
        fields = validated(BatchRequest, await read_object(request, limits), limits)
        tenant = request.state.tenant
        file = await storage.files.get(tenant, fields.input_file_id, param="input_file_id")
        if file.purpose != UPLOADED:
            raise InvalidParameter(f"the file's purpose must be {UPLOADED}", param="input_file_id")
        expires = fields.output_expires_after
        with disk_errors():
            batch = await storage.batches.create(
                tenant,
                endpoint=fields.endpoint,
                input_file_id=file.id,
                window=fields.completion_window,
                window_s=_window_s(fields.completion_window),
                metadata=fields.metadata,
                output_ttl_s=None if expires is None else expires.seconds,
            )
        storage.on_change(batch.id)
        return json_response(_shown(batch))

    @router.get("/v1/batches")
    async def list_batches(request: Request) -> Response:
        limit = page_number(request, MAX_PAGE, default=DEFAULT_PAGE)
        batches, has_more = await storage_of(context).batches.page(
            request.state.tenant, after=text_of(request, "after"), limit=limit
        )
        return json_response(listed([_shown(batch) for batch in batches], has_more))

    @router.get("/v1/batches/{batch_id}")
    async def get_batch(request: Request, batch_id: str) -> Response:
        return json_response(_shown(await storage_of(context).batches.get(request.state.tenant, batch_id)))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(request: Request, batch_id: str) -> Response:
        storage = storage_of(context)
        batch = await storage.batches.cancel(request.state.tenant, batch_id)
        storage.on_change(batch.id)
        return json_response(_shown(batch))

    return router


def _shown(batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in batch.object.items() if name != "output_ttl_s"}
