"""What operators do with the prefix cache: pin, unpin, clear, look. Knows no HTTP and no text.

A pin keeps the cached beginning of a token sequence from being reclaimed until it is taken off, expires, or what it
holds is cleared. All of it happens between two steps.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.control import Controls, Payload
from engine.errors import InvalidParameter, UnsupportedParameter
from engine.scheduling.block_pool import OutOfBlocks
from engine.scheduling.cache_manager import CacheManager
from engine.scheduling.prefix_cache import Namespace, PrefixCache


class PrefixRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which beginning of a sequence, and whose."""

    token_ids: list[int] | None = None
    tenant: str = ""
    cache_salt: str | None = None
    adapter: str = ""
    ttl_s: float | None = None
    pin_id: str = ""


@dataclass(frozen=True, slots=True)
class _Pin:
    block_ids: tuple[int, ...]
    namespace: Namespace
    expires_at: float | None  # on the scheduler's clock


class CacheControl:
    """Offers the actions `cache_pin`, `cache_unpin`, `cache_clear`, `cache_reset` and `cache_stats`."""

    def __init__(self, cache: CacheManager, clock: Callable[[], float]) -> None:
        self._cache = cache
        self._clock = clock
        self._pins: dict[str, _Pin] = {}
        self._next_expiry: float | None = None

    def offer(self, controls: Controls) -> None:
        controls.add("cache_pin", self._pin)
        controls.add("cache_unpin", self._unpin)
        controls.add("cache_clear", self._clear)
        controls.add("cache_reset", self._reset)
        controls.add("cache_stats", self._stats)

    def expire(self, now: float) -> None:
        """Takes off the pins whose time is over. Once per step: usually one comparison."""
        if self._next_expiry is None or now < self._next_expiry:
            return
        for pin_id, pin in list(self._pins.items()):
            if pin.expires_at is not None and pin.expires_at <= now:
                self._drop(pin_id)
        self._schedule_expiry()

    def _pin(self, payload: Payload) -> Payload:
        """Pins what is cached of a prefix. Returns the pin's id, its blocks, and how many blocks the prefix has."""
        given, prefix_cache = _decode(payload), self._prefix_cache()
        self.expire(self._clock())
        token_ids = given.token_ids or []
        chain = prefix_cache.chain(given.tenant, given.cache_salt or "", adapter=given.adapter)
        try:
            block_ids = prefix_cache.pin(chain, token_ids)
        except OutOfBlocks:
            limit = self._cache.pool.max_pinned
            raise InvalidParameter(
                f"the prefix has {len(chain.digests)} blocks, and pins may hold {limit} in all; unpin something, or "
                "raise --max-pinned-blocks",
                param="prompt",
                code="pins_full",
            ) from None
        num_blocks = len(token_ids) // self._cache.block_size
        if not block_ids:
            return {"pin_id": None, "pinned_blocks": 0, "prefix_blocks": num_blocks}
        pin_id = "pin-" + secrets.token_hex(12)
        expires_at = None if given.ttl_s is None else self._clock() + given.ttl_s
        self._pins[pin_id] = _Pin(tuple(block_ids), chain.namespace, expires_at)
        self._schedule_expiry()
        return {"pin_id": pin_id, "pinned_blocks": len(block_ids), "prefix_blocks": num_blocks}

    def _unpin(self, payload: Payload) -> Payload:
        pin_id = _decode(payload).pin_id
        self.expire(self._clock())
        if pin_id not in self._pins:
            raise InvalidParameter("there is no such pin; it may have expired", param="pin_id", code="pin_not_found")
        num_blocks = len(self._pins[pin_id].block_ids)
        self._drop(pin_id)
        return {"unpinned_blocks": num_blocks}

    def _clear(self, payload: Payload) -> Payload:
        """Forgets a tenant's blocks, of one salt if given, or those that begin with a prefix; and their pins."""
        given, prefix_cache = _decode(payload), self._prefix_cache()
        if given.token_ids is None:
            self._drop_where(
                lambda pin: (
                    pin.namespace.tenant == given.tenant and given.cache_salt in (None, pin.namespace.cache_salt)
                )
            )
            return {"cleared_blocks": prefix_cache.clear(given.tenant, given.cache_salt)}
        chain = prefix_cache.chain(given.tenant, given.cache_salt or "", adapter=given.adapter)
        block_ids = frozenset(prefix_cache.below(chain, given.token_ids))
        self._drop_where(lambda pin: not block_ids.isdisjoint(pin.block_ids))
        return {"cleared_blocks": prefix_cache.forget(block_ids)}

    def _reset(self, payload: Payload) -> Payload:
        self._drop_where(lambda pin: True)
        return {"cleared_blocks": self._prefix_cache().reset()}

    def _stats(self, payload: Payload) -> Payload:
        prefix_cache, now = self._prefix_cache(), self._clock()
        self.expire(now)
        counts, stats = self._cache.pool.counts, prefix_cache.stats
        return {
            "block_size": self._cache.block_size,
            "blocks": counts._asdict(),
            "max_pinned_blocks": self._cache.pool.max_pinned,
            "queries": stats.queries,
            "hits": stats.hits,
            "queried_tokens": stats.queried_tokens,
            "hit_tokens": stats.hit_tokens,
            "resets": stats.resets,
            "evicted_blocks": dict(stats.evicted_blocks),
            "misses": dict(stats.misses),
            "tenants": dict(Counter(namespace.tenant for namespace in prefix_cache.namespaces())),
            "pins": [self._describe(pin_id, pin, now) for pin_id, pin in self._pins.items()],
        }

    def _describe(self, pin_id: str, pin: _Pin, now: float) -> dict[str, Any]:
        return {
            "pin_id": pin_id,
            "tenant": pin.namespace.tenant,
            "cache_salt": pin.namespace.cache_salt,
            "blocks": len(pin.block_ids),
            "expires_in_s": None if pin.expires_at is None else max(pin.expires_at - now, 0.0),
        }

    def _prefix_cache(self) -> PrefixCache:
        if self._cache.prefix_cache is None:
            raise UnsupportedParameter("the prefix cache is off (--no-enable-prefix-cache)")
        return self._cache.prefix_cache

    def _drop_where(self, is_meant: Callable[[_Pin], bool]) -> None:
        for pin_id in [pin_id for pin_id, pin in self._pins.items() if is_meant(pin)]:
            self._drop(pin_id)
        self._schedule_expiry()

    def _drop(self, pin_id: str) -> None:
        self._cache.pool.unpin(self._pins.pop(pin_id).block_ids)

    def _schedule_expiry(self) -> None:
        self._next_expiry = min(
            (pin.expires_at for pin in self._pins.values() if pin.expires_at is not None), default=None
        )


def _decode(payload: Payload) -> PrefixRequest:
    return msgspec.convert(payload, PrefixRequest)
