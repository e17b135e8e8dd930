"""Liveness, readiness, version, load and metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from engine.errors import EngineError
from engine.types import GenerationRequest, PoolingRequest, SamplingParams
from engine.version import __version__
from server.context import LOADING_PHASES, LOADING_RETRY_S, ServerContext
from server.generation import Generation
from server.http_responses import json_response
from server.pooling.run import PoolingRun

PROBE_TIMEOUT_S = 10.0
PROBE_PRIORITY = -(2**31) + 1  # a deep check must not wait behind a long queue


def routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.get("/livez")
    @router.head("/livez", include_in_schema=False)
    async def livez() -> Response:
        """The front end answers, whatever the engine does."""
        return json_response({"status": "alive"})

    @router.get("/readyz")
    @router.head("/readyz", include_in_schema=False)
    @router.get("/ready", include_in_schema=False)
    async def readyz() -> Response:
        """Requests are accepted right now, and the engine shows life."""
        return _status(context, is_good=context.is_responsive)

    @router.get("/health")
    @router.head("/health", include_in_schema=False)
    @router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
    async def health() -> Response:
        """The engine is loaded and alive; also while it drains or sleeps, so that the server is not killed then."""
        state = context.engine.state
        return _status(context, is_good=state.is_ready or state.phase == "sleeping")

    @router.get("/health_generate")
    async def health_generate(request: Request) -> Response:
        """Deep check: one token through the engine, or one input when the model generates none."""
        info = context.require_ready()
        prompt = [info.eos_token_ids[0] if info.eos_token_ids else 0]
        label = request.state.request_id
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                if info.pooling is not None and not info.can_generate:
                    task = info.pooling.tasks[0]
                    pooled = PoolingRequest(prompt=prompt, task=task, priority=PROBE_PRIORITY, client_request_id=label)
                    await PoolingRun(context, [pooled], request.receive).collect()
                else:
                    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
                    probe = GenerationRequest(
                        prompt=prompt, sampling=sampling, priority=PROBE_PRIORITY, client_request_id=label
                    )
                    async with Generation(context, [probe], request.receive) as generation:
                        await generation.collect()
        except TimeoutError:
            raise EngineError(f"the engine did not generate a token within {PROBE_TIMEOUT_S:g} seconds") from None
        return json_response({"status": "ok"})

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @router.get("/load")
    async def load() -> Response:
        return json_response({"server_load": context.gate.num_in_flight})

    return router


def metrics_routes(context: ServerContext) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        context.metrics.engine.set_state(
            context.phase,
            is_ready=context.is_ready,
            num_restarts=context.engine.num_restarts,
            heartbeat_age_s=context.engine.heartbeat_age_s,
        )
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(context.metrics.registry), headers={"Content-Type": content_type})

    return router


def _status(context: ServerContext, *, is_good: bool) -> Response:
    if is_good:
        return json_response({"status": "ready" if context.is_ready else context.phase})
    phase = context.phase
    status = "unresponsive" if phase == "ready" else phase
    body = {"status": status, "phase": phase, "detail": context.engine.state.detail}
    retry_s = LOADING_RETRY_S if phase in LOADING_PHASES else 5
    return json_response(body, status=503, headers={"Retry-After": str(retry_s)})
