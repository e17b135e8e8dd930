"""Reads a request body within its limits and parses it as strict JSON."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any, NoReturn

import msgspec
from starlette.requests import Request

from engine.config import Limits
from server.errors import ApiError, ClientDisconnected

ESCAPE = re.compile(rb"\\.", re.DOTALL)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
OPENING = bytes.maketrans(b"{}", b"[]")
NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object in the body. Raises ApiError, or ClientDisconnected when the sender leaves."""
    _check_headers(request, limits)
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            body = await _read(request, limits.max_body_bytes)
    except TimeoutError:
        message = f"the request body did not arrive within {limits.body_timeout_s:g} seconds"
        raise ApiError(408, message, code="request_timeout", close=True) from None
    return parse_object(body, limits)


def parse_object(body: bytes, limits: Limits) -> dict[str, Any]:
    """Strict JSON: UTF-8, an object at the top, no duplicate keys, finite numbers, bounded depth and size.

    Raises ApiError with code "invalid_json".
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"is not UTF-8 (byte {error.start})") from None
    _check_outline(body, limits)
    try:
        value = _DECODER.decode(text)
        if SURROGATE.search(body):
            msgspec.json.decode(body)  # refuses escapes of half a surrogate pair
    except json.JSONDecodeError as error:
        raise _invalid(f"is not valid JSON: {error.msg} at character {error.pos}") from None
    except msgspec.MsgspecError:
        raise _invalid("contains an unpaired surrogate escape or a number out of range") from None
    except RecursionError:
        raise _invalid(f"is nested deeper than {limits.max_json_depth}") from None
    except _Refused as error:
        raise _invalid(str(error)) from None
    except ValueError:
        raise _invalid("contains a number with too many digits") from None
    if not isinstance(value, dict):
        raise _invalid('must be a JSON object, for instance {"messages": [...]}')
    return value


def _check_headers(request: Request, limits: Limits) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        message = "compressed request bodies are not accepted; send the body without Content-Encoding"
        raise ApiError(415, message, code="unsupported_content_encoding", close=True)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = "the Content-Type header must be application/json"
        raise ApiError(400, message, code="invalid_content_type", close=True)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > limits.max_body_bytes):
        raise _too_large(limits.max_body_bytes)


async def _read(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _check_outline(body: bytes, limits: Limits) -> None:
    """Bounds what the parser can be made to build, before it builds it. Exact for valid JSON."""
    unescaped = ESCAPE.sub(b"", body) if b"\\" in body else body
    outline = b"".join(unescaped.split(b'"')[::2])  # what stands outside of strings
    num_items = outline.count(b"{") + outline.count(b"[") + outline.count(b":")
    if num_items > limits.max_json_items:
        raise _invalid(f"has more than {limits.max_json_items} objects, arrays and keys")
    brackets = outline.translate(OPENING, NO_BRACKET)
    for _ in range(limits.max_json_depth):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")  # takes away the innermost level everywhere
    if brackets:
        raise _invalid(f"is nested deeper than {limits.max_json_depth}, or its brackets do not match")


class _Refused(ValueError):
    """Valid for the parser, but not for us."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Refused("contains the same key twice in one object")
    return members


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Refused("contains a number out of range")
    return value


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"contains {name}, which is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_constant)


def _invalid(problem: str) -> ApiError:
    return ApiError(400, f"the request body {problem}", code="invalid_json")


def _too_large(max_bytes: int) -> ApiError:
    message = f"the request body is larger than {max_bytes} bytes"
    return ApiError(413, message, type="request_too_large", close=True)
