"""Limits per minute and API key: what is counted, what the client is told, and when it may come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import ServerConfig
from engine.errors import ConfigError, RateLimited
from server.auth import load_keys
from server.rate_limits import KeyLimits, RateLimits, parse_key_line
from tests.server.support import CHAT, COMPLETIONS, HELLO, KEY, OTHER_KEY, app, error_of, make_config

USER = {"Authorization": f"Bearer {KEY}"}
OTHER = {"Authorization": f"Bearer {OTHER_KEY}"}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


async def test_requests_above_the_limit_get_429_and_other_keys_do_not() -> None:
    config = make_config(api_keys=(KEY, OTHER_KEY), key_requests_per_minute=2)
    async with app(config=config) as server:
        first = await server.http.post(CHAT, json=HELLO, headers=USER)
        assert first.status_code == 200
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert float(first.headers["x-ratelimit-reset-requests"].removesuffix("s")) > 0
        await server.http.post(COMPLETIONS, json={"prompt": "a"}, headers=USER)
        refused = await server.http.post(COMPLETIONS, json={"prompt": "a"}, headers=USER)
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        allowed = await server.http.post(COMPLETIONS, json={"prompt": "a"}, headers=OTHER)
        assert allowed.status_code == 200
        models = await server.http.get("/v1/models", headers=USER)
        assert models.status_code == 200, "only generation is counted"


async def test_tokens_are_charged_when_a_request_ends() -> None:
    config = make_config(api_keys=(KEY,), key_tokens_per_minute=20)
    async with app(config=config) as server:
        body = {"prompt": "a" * 30, "max_tokens": 4}
        answer = await server.http.post(COMPLETIONS, json=body, headers=USER)
        assert answer.json()["usage"]["total_tokens"] == 35
        assert answer.headers["x-ratelimit-limit-tokens"] == "20"
        refused = await server.http.post(COMPLETIONS, json=body, headers=USER)
        assert refused.status_code == 429
        assert "tokens per minute" in error_of(refused)["message"]


def test_a_bucket_fills_steadily_and_says_when_there_is_room() -> None:
    clock = Clock()
    limits = RateLimits({"t": KeyLimits(requests_per_minute=60, tokens_per_minute=600)}, clock)
    for _ in range(60):
        limits.admit("t")
    with pytest.raises(RateLimited) as refusal:
        limits.admit("t")
    assert refusal.value.retry_after_s == 1
    clock.now += 1.0
    limits.admit("t")
    limits.charge("t", 700)
    clock.now += 5.0
    with pytest.raises(RateLimited, match="tokens") as refusal:
        limits.admit("t")
    assert refusal.value.retry_after_s == 6, "50 tokens of debt and one to spend, at 10 a second"
    clock.now += refusal.value.retry_after_s
    limits.admit("t")


def test_a_key_of_the_file_may_have_limits_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY} requests_per_minute=1 max_in_flight=3\n{OTHER_KEY}\n")
    keyring = load_keys(ServerConfig(api_key_file=str(file), key_requests_per_minute=5))
    own, other = keyring.tenant_of(KEY), keyring.tenant_of(OTHER_KEY)
    assert own is not None
    assert other is not None
    limits = keyring.rate_limits
    assert (limits.max_in_flight(own, 64), limits.max_in_flight(other, 64)) == (3, 64)
    assert dict(limits.headers(own))[b"x-ratelimit-limit-requests"] == b"1"
    assert dict(limits.headers(other))[b"x-ratelimit-limit-requests"] == b"5"


@pytest.mark.parametrize("setting", ["requests=1", "requests_per_minute=many", "requests_per_minute"])
def test_a_setting_that_nobody_knows_is_an_error(setting: str) -> None:
    with pytest.raises(ConfigError, match="known settings are requests_per_minute"):
        parse_key_line(f"{KEY} {setting}", KeyLimits())
