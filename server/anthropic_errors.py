"""Errors in Anthropic's form, on the routes of the Messages API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREFIX = "/v1/messages"
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def is_anthropic(path: str) -> bool:
    """Whether clients of this path (below the proxy's prefix) read Anthropic's form."""
    return path == PREFIX or path.startswith(PREFIX + "/")


def envelope(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """error   as in the OpenAI form"""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}
