"""The short way to a route: paths without parameters are looked up in a table and their functions called directly.

FastAPI keeps the document, the 404s and 405s and every route that it has to take apart; its stack would be a third of
what the front end spends on a request. Knows no route by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth import route_path
from server.errors import EXPECTED

Endpoint = Callable[[Request], Awaitable[Response]]
Table = Mapping[tuple[str, str], Endpoint]


def direct_endpoints(routes: Iterable[APIRoute]) -> Table:
    """(method, path) -> function, of the routes whose function takes the request and nothing else."""
    return {
        (method, route.path): route.endpoint
        for route in routes
        if "{" not in route.path and list(inspect.signature(route.endpoint).parameters) == ["request"]
        for method in route.methods or ()
    }


class DirectRoutes:
    """An ASGI application in front of another, which gets what is not in the table."""

    def __init__(self, app: ASGIApp, endpoints: Table, answer: Callable[[Request, Exception], Response]) -> None:
        """answer   what an exception of a route becomes; one that nobody expects is raised again behind its answer"""
        self._app = app
        self._endpoints = endpoints
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get((scope["method"], route_path(scope))) if scope["type"] == "http" else None
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except Exception as error:
            await self._answer(request, error)(scope, receive, send)
            if isinstance(error, EXPECTED):
                return
            raise
        await response(scope, receive, send)
