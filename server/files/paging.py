"""Query parameters of lists, and the list object, for files and batches."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from engine.errors import InvalidParameter

MAX_TEXT = 128


def page_number(request: Request, high: int, *, default: int) -> int:
    """`limit`. Raises InvalidParameter unless it is 1 to `high`."""
    value = request.query_params.get("limit")
    if value is None:
        return default
    if not (value.isascii() and value.isdecimal() and len(value) <= 9 and 1 <= int(value) <= high):
        raise InvalidParameter(f"limit must be an integer of 1 to {high}", param="limit")
    return int(value)


def text_of(request: Request, name: str) -> str | None:
    value = request.query_params.get(name)
    if value is not None and not (1 <= len(value) <= MAX_TEXT and value.isprintable()):
        raise InvalidParameter(f"{name} must have 1 to {MAX_TEXT} printable characters", param=name)
    return value


def listed(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
