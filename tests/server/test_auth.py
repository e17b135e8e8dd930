"""API keys: who gets in, and what the answer says to the others."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError
from server.anthropic_errors import is_anthropic
from server.auth import Keyring, load_keys
from tests.server.support import CHAT, HELLO, KEY, OTHER_KEY, app, call, make_config, running

PUBLIC = {"/livez", "/readyz", "/health"}
ROUTES = [
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/ping"),
    ("GET", "/health_generate"),
    ("GET", "/version"),
    ("GET", "/load"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/responses/input_tokens"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/v1/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/detokenize"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/route"),
]
BODIES = {"/v1/chat/completions": HELLO, "/v1/completions": {"prompt": "x"}}


def spellings(path: str) -> list[str]:
    return [path, path + "/", "/" + path, path.upper(), path.replace("/", "/./", 1), "/livez/.." + path, path + "%00"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {'x' * 32}"}, {"X-Api-Key": "x" * 32}])
async def test_without_a_valid_key_nothing_but_the_public_paths_answers(headers: dict[str, str]) -> None:
    async with app(config=make_config(api_keys=(KEY,), enable_docs=True)) as server:
        for _, path in ROUTES:
            for method in ("GET", "HEAD", "POST", "OPTIONS", "DELETE"):
                for spelling in spellings(path):
                    status, answer_headers, body = await call(server.asgi, method, spelling, headers)
                    if spelling in PUBLIC:
                        assert status == (200 if method in ("GET", "HEAD") else 405)
                        continue
                    assert status == 401, (method, spelling)
                    assert answer_headers["www-authenticate"] == "Bearer"
                    error = json.loads(body)["error"]
                    assert error["type"] == "authentication_error"
                    assert error.get("code") == (None if is_anthropic(spelling) else "invalid_api_key")
        assert (
            'http_rejections_total{reason="auth"}'
            in (await server.http.get("/metrics", headers={"X-Api-Key": KEY})).text
        )


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer {KEY}"},
        {"X-Api-Key": KEY},
        {"Authorization": f"Bearer {OTHER_KEY}"},
    ],
)
async def test_every_route_takes_every_kind_of_valid_key(headers: dict[str, str]) -> None:
    config = make_config(api_keys=(KEY, OTHER_KEY), enable_docs=True)
    async with app(config=config) as server:
        for method, path in ROUTES[:-1]:
            body = BODIES.get(path)
            response = await server.http.request(method, path, headers=headers, json=body)
            assert response.status_code not in (401, 403, 404), path
        assert (await server.http.get("/no/such/route", headers=headers)).status_code == 404


async def test_without_configured_keys_everybody_is_let_in() -> None:
    async with app() as server:
        assert (await server.chat()).status_code == 200
        assert (await server.post(CHAT, HELLO, Authorization="Bearer whatever")).status_code == 200


async def test_the_guard_knows_the_proxy_prefix() -> None:
    """uvicorn puts the prefix in front of the path: a public path under it stays public, others stay closed."""
    config = make_config(api_keys=(KEY,), root_path="/llm", drain_timeout_s=0.1)
    async with running(config=config) as server, httpx.AsyncClient(base_url=server.context.url) as http:
        assert (await http.get("/livez")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/llm/livez")).status_code == 401
        assert (await http.get("/v1/models", headers={"X-Api-Key": KEY})).status_code == 200


async def test_tenants_are_told_apart_without_showing_the_key() -> None:
    async with app(config=make_config(api_keys=(KEY, OTHER_KEY))) as server:
        for key in (KEY, OTHER_KEY, KEY):
            await server.post(CHAT, HELLO, Authorization=f"Bearer {key}")
        first, second, third = (request.tenant for request in server.engine.seen)
        assert first == third != second
        assert KEY not in first
        # the prefix cache sees the tenant: only the third call found the first one's prompt
        other = make_config(api_keys=(KEY,))
        async with app(server.engine, other) as restarted:
            await restarted.post(CHAT, HELLO, Authorization=f"Bearer {KEY}")
        assert server.engine.seen[-1].tenant != first, "the digest is keyed with a secret of the process"


def test_no_key_is_kept_in_clear() -> None:
    keyring = Keyring([KEY])
    assert KEY not in repr(vars(keyring))
    assert keyring.tenant_of(KEY)
    assert keyring.tenant_of(KEY + "x") is None


def test_keys_are_read_from_a_file_and_short_ones_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n  {OTHER_KEY}  \n")
    keyring = load_keys(ServerConfig(api_key_file=str(file)))
    assert keyring.tenant_of(OTHER_KEY)
    with pytest.raises(ConfigError, match="31 characters"):
        load_keys(ServerConfig(api_keys=("x" * 31,)))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="no key"):
        load_keys(ServerConfig(api_key_file=str(file)))
    with pytest.raises(ConfigError, match=r"missing': No such file or directory; .*--api-key-file"):
        load_keys(ServerConfig(api_key_file=str(tmp_path / "missing")))
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_keys(ServerConfig(api_key_file=str(file)))


async def test_cors_is_absent_unless_configured() -> None:
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    async with app(config=make_config(api_keys=(KEY,))) as server:
        response = await server.http.options(CHAT, headers=preflight)
        assert response.status_code == 401
        assert "access-control-allow-origin" not in response.headers
    config = make_config(api_keys=(KEY,), cors_origins=("https://app.example",))
    async with app(config=config) as server:
        response = await server.http.options(CHAT, headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        refused = await server.http.post(CHAT, json=HELLO, headers={"Origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-origin" not in (await server.http.get("/livez")).headers
