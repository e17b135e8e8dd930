"""Strict JSON and body limits."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from engine.config import Limits
from server.body import parse_object
from server.errors import ApiError
from tests.server.support import CHAT, HELLO, app, error_of, make_config

LIMITS = Limits()


def nested(depth: int) -> bytes:
    """An object whose value is arrays in arrays: `depth` levels in all."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"1",
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":1,"a":2}',
        b'{"x":{"a":1,"a":1}}',
        b'{"a":"\\ud800"}',
        b'{"a":"\\udc00x"}',
        b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":1}x',
        b"{'a':1}",
        b'{"a":01}',
        b'{"a":"\n"}',
        b'{"a":1,}',
        b'{"a":[}]',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"]" * 1000,
    ],
)
def test_anything_but_one_strict_object_is_invalid_json(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_object(body, LIMITS)
    assert caught.value.status == 400
    assert caught.value.error["code"] == "invalid_json"


def test_valid_objects_are_parsed_as_they_are() -> None:
    value: dict[str, Any] = {
        "text": 'brackets ]]}} "quoted" \\ \u00e9 \U0001f600',
        "n": [1, -2.5, True, None, {"x": {}}],
        "": "empty key",
    }
    for ascii_only in (True, False):
        assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode(), LIMITS) == value


def test_depth_is_bounded_exactly() -> None:
    for depth in (LIMITS.max_json_depth - 1, LIMITS.max_json_depth):
        assert parse_object(nested(depth), LIMITS)
    with pytest.raises(ApiError, match="deeper than 64"):
        parse_object(nested(LIMITS.max_json_depth + 1), LIMITS)


def test_brackets_in_strings_do_not_count_as_nesting() -> None:
    assert parse_object(json.dumps({"a": "[{" * 1000, "b": '\\"[['}).encode(), LIMITS)


def test_number_of_items_is_bounded_exactly() -> None:
    limits = Limits(max_json_items=10)
    body = b'{"a":[' + b",".join([b"[]"] * 7) + b"]}"  # object, key, array and seven arrays
    assert parse_object(body, limits)
    with pytest.raises(ApiError, match="more than 10"):
        parse_object(body.replace(b"[]]", b"[],[]]"), limits)


@pytest.mark.parametrize("unit", [b"{},", b"[],", b'{"a":1},', b'"",', b'"\\\\",'])
def test_a_huge_hostile_body_is_answered_quickly(unit: bytes) -> None:
    body = b'{"a":[' + unit * (8_000_000 // len(unit)) + b"1]}"
    began_at = time.process_time()
    with contextlib.suppress(ApiError):
        parse_object(body, LIMITS)
    assert time.process_time() - began_at < 2.0


async def test_body_size_is_bounded_exactly() -> None:
    body = json.dumps(HELLO).encode()
    for spare, status in ((1, 200), (0, 200), (-1, 413)):
        async with app(config=make_config(limits={"max_body_bytes": len(body) + spare})) as server:
            response = await server.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
            assert response.status_code == status
            if status == 413:
                assert error_of(response)["type"] == "request_too_large"
                assert 'http_rejections_total{reason="body_too_large"} 1.0' in await server.metrics()


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
async def test_another_content_type_is_refused_with_400(content_type: str) -> None:
    async with app() as server:
        headers = {"Content-Type": content_type} if content_type else {}
        response = await server.http.post(CHAT, content=json.dumps(HELLO).encode(), headers=headers)
        assert response.status_code == 400
        assert "Content-Type" in error_of(response)["message"]


async def test_a_charset_in_the_content_type_is_fine() -> None:
    async with app() as server:
        headers = {"Content-Type": "application/json; charset=utf-8"}
        assert (await server.http.post(CHAT, content=json.dumps(HELLO).encode(), headers=headers)).status_code == 200


async def test_compressed_bodies_are_refused_with_415() -> None:
    async with app() as server:
        response = await server.post(CHAT, HELLO, **{"Content-Encoding": "gzip"})
        assert response.status_code == 415
        error_of(response)
