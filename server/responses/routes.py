"""The Responses API: create, stream, fetch, cancel and delete; chained answers and work in the background."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Request, Response

from engine.errors import InvalidParameter
from server.body import read_object
from server.chat_bridge import count_prompt_tokens, refuse, renamed
from server.chat_pipeline import ChatJob, collect
from server.context import ServerContext
from server.http_responses import json_response
from server.responses.background import LogStream, run_in_background
from server.responses.items import listed
from server.responses.schema import REFUSED, ResponsesRequest
from server.responses.store import ResponseStore, StoredResponse, Turn
from server.responses.translate import NAMES, WHOLE, chat_job, conversation, find, require_store
from server.responses.writer import ResponseWriter
from server.sse import stream_answer
from server.validation import validated

MAX_PAGE, DEFAULT_PAGE = 100, 20
MAX_SEQUENCE_NUMBER = 2**31


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()
    config = context.config
    store = ResponseStore(config.limits)
    background: set[asyncio.Task[None]] = set()

    @router.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        call = await _read(context, store, request)
        info, fields, job = context.require_ready(), call.fields, call.job
        is_stored = store.is_on and fields.store is not False

        def keep(response: dict[str, Any]) -> None:
            if is_stored and not fields.background:
                store.put(_entry(request.state.tenant, response, call.turn))

        writer = ResponseWriter(fields, job, info, is_stored=is_stored, on_end=keep)
        if fields.background:
            require_store(store, "background")
            entry = _entry(request.state.tenant, writer.response, call.turn)
            entry.has_log = fields.stream
            background.add(task := await run_in_background(context, store, entry, writer, job))
            task.add_done_callback(background.discard)
            return LogStream(entry, 0, config.server.sse_ping_s) if fields.stream else json_response(entry.response)
        if fields.stream:
            with renamed(NAMES, whole=WHOLE):
                return await stream_answer(
                    context, [job.request], request, writer, writer, answer_id=writer.response["id"]
                )
        with renamed(NAMES, whole=WHOLE):
            events = await collect(context, job, request.receive)
        for event in events:
            writer.add(event)
        writer.end(None)
        return json_response(writer.response)

    @router.post("/v1/responses/input_tokens")
    async def count_input_tokens(request: Request) -> Response:
        call = await _read(context, store, request)
        with renamed(NAMES, whole=WHOLE):
            num_tokens = await count_prompt_tokens(context, call.job)
        return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})

    @router.get("/v1/responses/{response_id}")
    async def get_response(request: Request, response_id: str) -> Response:
        entry = find(store, request.state.tenant, response_id, "response_id")
        if not _flag(request, "stream"):
            return json_response(entry.response)
        if not entry.has_log:
            raise InvalidParameter(
                "only a response that was created with background: true and stream: true can be streamed again",
                param="stream",
            )
        after = _number(request, "starting_after", low=0, high=MAX_SEQUENCE_NUMBER, default=-1)
        return LogStream(entry, after + 1, config.server.sse_ping_s)

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        entry = find(store, request.state.tenant, response_id, "response_id")
        if entry.running is not None:
            entry.cancel()
        store.delete(entry)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        entry = find(store, request.state.tenant, response_id, "response_id")
        if not entry.response["background"]:
            raise InvalidParameter(
                "only a response that was created with background: true can be cancelled; others end when their "
                "connection is closed",
                param="response_id",
            )
        entry.cancel()
        while entry.running is not None:
            await entry.changed.wait()
        return json_response(entry.response)

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(request: Request, response_id: str) -> Response:
        entry = find(store, request.state.tenant, response_id, "response_id")
        return json_response(_page(request, [listed(item) for item in entry.input.all_items()]))

    return router


class _Call:
    """A request to create a response, checked."""

    def __init__(self, fields: ResponsesRequest, turn: Turn, job: ChatJob) -> None:
        self.fields = fields
        self.turn = turn
        self.job = job


async def _read(context: ServerContext, store: ResponseStore, request: Request) -> _Call:
    """Raises what a request can get wrong before it runs."""
    context.require_ready()
    body = await read_object(request, context.config.limits)
    refuse(body, REFUSED)
    fields = validated(ResponsesRequest, body, context.config.limits)
    fields.check()
    state = request.state
    turn = conversation(fields, store, state.tenant)
    job = await chat_job(context, body, fields, turn, tenant=state.tenant, request_id=state.request_id)
    return _Call(fields, turn, job)


def _entry(tenant: str, response: dict[str, Any], turn: Turn) -> StoredResponse:
    return StoredResponse(tenant, response, turn, Turn(response["output"], turn))


def _page(request: Request, items: list[dict[str, Any]]) -> dict[str, Any]:
    """One page of a list, newest first unless asked otherwise."""
    order: Literal["asc", "desc"] | str = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidParameter("order must be one of asc, desc", param="order")
    if order == "desc":
        items.reverse()
    after = request.query_params.get("after")
    if after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidParameter("after must be the id of an item of this response", param="after")
        items = items[places[0] + 1 :]
    limit = _number(request, "limit", low=1, high=MAX_PAGE, default=DEFAULT_PAGE)
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false").lower()
    if value not in ("true", "false", "1", "0"):
        raise InvalidParameter(f"{name} must be true or false", param=name)
    return value in ("true", "1")


def _number(request: Request, name: str, *, low: int, high: int, default: int) -> int:
    value = request.query_params.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) <= 10 and low <= int(value) <= high):
        raise InvalidParameter(f"{name} must be an integer of {low} to {high}", param=name)
    return int(value)
