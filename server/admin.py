"""Operators' routes: drain, abort, sleep, log level, profiler. Each needs an operator's key; see `server.auth`."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import Field, StringConstraints

from engine import logs
from engine.errors import Aborted, InvalidParameter
from server.auth import require_admin
from server.body import read_object
from server.context import ServerContext
from server.fields import Body, Integer, Number, Text
from server.http_responses import json_response
from server.validation import validated

MAX_ABORTED_IDS = 1000
MAX_WAIT_S = 3600.0
SLEEP_LEVELS = ("1", "2")
SLEEP_MODES = ("abort", "wait")

Fields = TypeVar("Fields", bound=Body)
AbortLabel = Annotated[Text, StringConstraints(min_length=1, max_length=160)]
Seconds = Annotated[Number, Field(ge=0, le=MAX_WAIT_S)]


class DrainRequest(Body):
    timeout_s: Seconds = 30.0


class AbortRequest(Body):
    """vLLM's form. No ids: all requests."""

    request_ids: Annotated[tuple[AbortLabel, ...], Field(max_length=MAX_ABORTED_IDS)] = ()


class LogLevelRequest(Body):
    level: Literal["debug", "info", "warning", "error"]


class ProfileRequest(Body):
    steps: Annotated[Integer, Field(ge=1, le=1000)] = 10


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.post("/admin/drain")
    async def drain(request: Request) -> Response:
        """Refuses new work and waits for what runs. The process stays; DELETE takes it back."""
        fields = await read_body(request, context, DrainRequest)
        is_empty = await context.gate.drain(fields.timeout_s)
        return json_response({"status": "drained" if is_empty else "draining", "in_flight": context.gate.num_in_flight})

    @router.delete("/admin/drain")
    async def undrain(request: Request) -> Response:
        require_admin(request, context.keyring, context.config.server)
        context.gate.reopen()
        return json_response({"status": context.phase, "in_flight": context.gate.num_in_flight})

    @router.post("/abort_requests")
    async def abort_requests(request: Request) -> Response:
        fields = await read_body(request, context, AbortRequest)
        reason = Aborted("the request was ended by an operator")
        labels = None if not fields.request_ids else frozenset(fields.request_ids)
        return json_response({"status": "aborted", "aborted": context.gate.abort(labels, reason)})

    @router.post("/admin/log_level")
    async def log_level(request: Request) -> Response:
        """Of both processes, until the next start."""
        fields = await read_body(request, context, LogLevelRequest)
        if context.engine.state.is_ready:
            await context.engine.control("log_level", {"level": fields.level})
        logs.set_level(fields.level)
        return json_response({"level": fields.level})

    @router.post("/start_profile")
    async def start_profile(request: Request) -> Response:
        """Records the next steps of the engine. The answer names the trace that will be in the configured folder."""
        fields = await read_body(request, context, ProfileRequest)
        return json_response(await context.engine.control("profile_start", {"steps": fields.steps}))

    @router.post("/stop_profile")
    async def stop_profile(request: Request) -> Response:
        require_admin(request, context.keyring, context.config.server)
        return json_response(await context.engine.control("profile_stop"))

    _add_sleep(router, context)
    return router


def _add_sleep(router: APIRouter, context: ServerContext) -> None:
    @router.post("/sleep")
    async def sleep(request: Request, level: str = "1", mode: str = "abort") -> Response:
        """Gives back the memory of weights and cache, at either level; vLLM's parameters."""
        require_admin(request, context.keyring, context.config.server)
        _check_choice("level", level, SLEEP_LEVELS)
        _check_choice("mode", mode, SLEEP_MODES)
        if context.engine.state.phase != "sleeping":
            context.require_ready()
            wait_s = context.config.server.drain_timeout_s
            await context.engine.sleep(is_patient=mode == "wait", timeout_s=wait_s)
        return json_response({"is_sleeping": True})

    @router.post("/wake_up")
    async def wake_up(request: Request) -> Response:
        """Answers when the engine is ready again."""
        require_admin(request, context.keyring, context.config.server)
        await context.engine.wake_up()
        return json_response({"is_sleeping": False})

    @router.get("/is_sleeping")
    async def is_sleeping(request: Request) -> Response:
        require_admin(request, context.keyring, context.config.server)
        return json_response({"is_sleeping": context.engine.state.phase == "sleeping"})


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidParameter(f"{name} must be one of {', '.join(choices)}", param=name)


async def read_body(request: Request, context: ServerContext, model: type[Fields]) -> Fields:
    """The checked body of an operator's request; none at all is {}. Raises ApiError (403) for other people's."""
    require_admin(request, context.keyring, context.config.server)
    limits = context.config.limits
    has_body = "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"
    return validated(model, await read_object(request, limits) if has_body else {}, limits)
