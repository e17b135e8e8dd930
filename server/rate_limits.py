"""Requests and tokens per minute of each API key: token buckets, and what the client is told about them.

Tokens are charged when a request ends, so a key can overdraw once and then waits until it is out of debt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.errors import ConfigError, RateLimited

WINDOW_S = 60.0


@dataclass(frozen=True)
class KeyLimits:
    """Of one API key; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and output
    max_in_flight: int | None = None


def parse_key_line(line: str, defaults: KeyLimits) -> tuple[str, KeyLimits]:
    """A line of the key file: the key, then settings such as `requests_per_minute=60`. Raises ConfigError."""
    key, *settings = line.split()
    values = dict(vars(defaults))
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in values or not value.isdecimal():
            raise ConfigError(
                f"the key file has the setting {name!r} with the value {value!r}; known settings are "
                f"{', '.join(values)}, each with a whole number"
            )
        values[name] = int(value)
    return key, KeyLimits(**values)


class _Bucket:
    """Holds at most one minute's worth and fills steadily."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self._level + (now - self._at) * self.per_minute / WINDOW_S, self.per_minute)
        self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until so much is there."""
        missing = amount - self.level(now)
        return max(missing, 0.0) * WINDOW_S / max(self.per_minute, 1)


class RateLimits:
    """All keys' buckets. `limits` are by tenant; others have none."""

    def __init__(self, limits: Mapping[str, KeyLimits], clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = dict(limits)
        self._clock = clock
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        for tenant, own in limits.items():
            if own.requests_per_minute is not None:
                self._requests[tenant] = _Bucket(own.requests_per_minute, clock())
            if own.tokens_per_minute is not None:
                self._tokens[tenant] = _Bucket(own.tokens_per_minute, clock())

    def max_in_flight(self, tenant: str, default: int) -> int:
        own = self._limits.get(tenant)
        return default if own is None or own.max_in_flight is None else own.max_in_flight

    def admit(self, tenant: str) -> None:
        """Counts a request. Raises RateLimited, with nothing counted, when the key has used up its minute."""
        now = self._clock()
        tokens, requests = self._tokens.get(tenant), self._requests.get(tenant)
        if tokens is not None and tokens.level(now) < 1:
            self._refuse("tokens", tokens, now)
        if requests is not None:
            if requests.level(now) < 1:
                self._refuse("requests", requests, now)
            requests.take(1, now)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """So many prompt and output tokens were spent."""
        bucket = self._tokens.get(tenant)
        if bucket is not None:
            bucket.take(num_tokens, self._clock())

    def headers(self, tenant: str) -> list[tuple[bytes, bytes]]:
        """What OpenAI's clients read: limit, what is left of it, and when all of it is there again."""
        now = self._clock()
        headers = []
        for unit, buckets in (("requests", self._requests), ("tokens", self._tokens)):
            bucket = buckets.get(tenant)
            if bucket is not None:
                for name, value in (
                    ("limit", str(bucket.per_minute)),
                    ("remaining", str(max(math.floor(bucket.level(now)), 0))),
                    ("reset", f"{bucket.wait_s(bucket.per_minute, now):.3f}s"),
                ):
                    headers.append((f"x-ratelimit-{name}-{unit}".encode(), value.encode()))
        return headers

    def _refuse(self, unit: str, bucket: _Bucket, now: float) -> None:
        wait_s = math.ceil(bucket.wait_s(1, now)) or 1
        raise RateLimited(
            f"this API key may use {bucket.per_minute} {unit} per minute, and has; retry in {wait_s} seconds",
            retry_after_s=wait_s,
        )
