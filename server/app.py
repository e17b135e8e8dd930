"""`create_app`: routes, error handlers, the lifespan, and the layers around them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from engine.config import Config
from engine.metrics import Metrics
from engine.version import __version__
from server import (
    adapters,
    admin,
    cache_admin,
    chat,
    completions,
    health,
    models,
    openapi,
    tokenize,
)
from server.auth import AuthGuard, load_keys, route_path
from server.batches import routes as batches
from server.batches.worker import working
from server.context import ServerContext
from server.dispatch import DirectRoutes, direct_endpoints
from server.engine_api import Engine
from server.errors import EXPECTED, ApiError, ClientDisconnected, to_api_error
from server.files import routes as files
from server.files.storage import Storage
from server.messages import routes as messages
from server.middleware import CLIENT_CLOSED_REQUEST, Observe, RouteLabels
from server.monitor import monitor
from server.pooling import embeddings, scoring
from server.responses import routes as responses


def make_context(engine: Engine, config: Config) -> ServerContext:
    """What all routes share. Raises ConfigError for API keys or a data folder that cannot be used."""
    metrics = Metrics(engine.model_names[0], compat=config.server.metrics_compat)
    folder = config.server.data_folder
    storage = Storage(Path(folder), config) if folder is not None else None
    keyring = load_keys(config.server, storage.database.secret if storage is not None else None)
    return ServerContext(engine, config, metrics, keyring, storage)


def create_app(engine: Engine, config: Config, context: ServerContext | None = None) -> ASGIApp:
    """The whole ASGI application. From outside in: observation, CORS when configured, the guard, the routes."""
    context = context or make_context(engine, config)
    api = FastAPI(
        title="Kvasir",
        version=__version__,
        lifespan=_lifespan(context),
        docs_url="/docs" if config.server.enable_docs else None,
        openapi_url="/openapi.json" if config.server.enable_docs else None,
        redoc_url=None,
        redirect_slashes=False,
    )
    modules = (
        *(chat, completions, responses, messages, embeddings, scoring, models, adapters, tokenize, health),
        *(files, batches, admin, cache_admin),
    )
    routers = [module.routes(context) for module in modules]
    if config.server.metrics_port is None:
        routers.append(health.metrics_routes(context))
    for router in routers:
        api.include_router(router)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    templates = _declare_routes(routes, context.metrics)
    openapi.install(api)
    answer = _error_answers(context, templates)
    _handle_errors(api, answer)
    context.api = DirectRoutes(api, direct_endpoints(routes), answer)
    app: ASGIApp = AuthGuard(context.api, context.keyring, context.metrics)
    if config.server.cors_origins:
        # outside of the guard: a browser's preflight carries no key
        app = CORSMiddleware(
            app,
            allow_origins=config.server.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key", "X-Request-Id", "Anthropic-Version"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return Observe(app, context.metrics, RouteLabels(templates), config.limits)


def metrics_app(context: ServerContext) -> ASGIApp:
    """/metrics alone, for a port of its own."""
    app = FastAPI(docs_url=None, openapi_url=None, redoc_url=None)
    app.include_router(health.metrics_routes(context))
    return app


def _lifespan(context: ServerContext) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = context.engine
        engine.on_stats = context.metrics.engine.update
        engine.on_timing = context.metrics.http.observe_text
        engine.on_constraint = context.metrics.grammar.observe
        await engine.start()
        watcher = asyncio.create_task(monitor(context))
        try:
            async with working(context):
                yield
        finally:
            watcher.cancel()
            await engine.stop(0.0)

    return lifespan


def _declare_routes(routes: Sequence[APIRoute], metrics: Metrics) -> list[str]:
    """Route templates; their metrics exist from now on."""
    metrics.http.declare((route.path, method) for route in routes for method in route.methods or ())
    return [route.path for route in routes]


def _error_answers(context: ServerContext, templates: list[str]) -> Callable[[Request, Exception], Response]:
    """What every exception of a route, or of finding one, becomes."""
    known = set(templates)

    def answer(request: Request, error: Exception) -> Response:
        path = route_path(request.scope)
        if isinstance(error, ClientDisconnected):
            request.state.is_disconnected = True
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        if isinstance(error, HTTPException):
            return _routing_error(request, error, known).response(path)
        api_error = to_api_error(error, request.state.request_id)
        if api_error.reason is not None:
            context.metrics.http.rejected(api_error.reason)
        return api_error.response(path)

    return answer


def _handle_errors(api: FastAPI, answer: Callable[[Request, Exception], Response]) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        return answer(request, error)

    for kind in (*EXPECTED, Exception):  # the last is answered here, then logged by Observe
        api.add_exception_handler(kind, handle)


def _routing_error(request: Request, error: HTTPException, known: set[str]) -> ApiError:
    if error.status_code == 405:
        allowed = dict(error.headers or {}).get("Allow", "")
        message = f"this route does not take that method; it takes {allowed}"
        return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    if error.status_code == 404:
        better = "/v1" + route_path(request.scope)
        hint = f"; did you mean {better}?" if better in known else ""
        return ApiError(404, f"there is no such route{hint}", code="unknown_url")
    return ApiError(error.status_code, "the request cannot be handled", headers=dict(error.headers or {}))
