"""What all routes share: the engine, the settings, the metrics, and who is being served right now."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from engine.config import Config
from engine.errors import EngineDead, NotReady, RateLimited, RequestError
from engine.metrics import Metrics
from engine.types import ModelInfo
from engine.version import __version__
from server.auth import Keyring
from server.engine_api import Engine

LOADING_PHASES = frozenset({"starting", "loading", "warming"})
LOADING_RETRY_S = 2


class Abortable(Protocol):
    def abort(self, reason: Exception) -> None:
        """Ends the work; whoever waits for it gets `reason`."""


class Gate:
    """Counts what is in flight, per key and in all, and closes when the server drains."""

    def __init__(self, max_per_tenant: int) -> None:
        self._max_per_tenant = max_per_tenant
        self._num_by_tenant: Counter[str] = Counter()
        self._active: set[Abortable] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    @property
    def num_in_flight(self) -> int:
        return len(self._active)

    @contextlib.contextmanager
    def admit(self, work: Abortable, tenant: str) -> Iterator[None]:
        """Counts `work` while the block runs. Raises NotReady while draining, RateLimited above the key's limit."""
        if self.is_draining:
            raise NotReady("the server is shutting down; send this to another one", retry_after_s=1, code="draining")
        # without keys everybody is tenant "": a limit per key would be a limit for all
        if tenant and self._num_by_tenant[tenant] >= self._max_per_tenant:
            raise RateLimited(
                f"this API key has {self._max_per_tenant} requests in flight, which is the limit; wait for one to end"
            )
        self._num_by_tenant[tenant] += 1
        self._active.add(work)
        self._idle.clear()
        try:
            yield
        finally:
            self._active.discard(work)
            self._num_by_tenant[tenant] -= 1
            if not self._num_by_tenant[tenant]:
                del self._num_by_tenant[tenant]
            if not self._active:
                self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Admits nothing more and waits for what runs. False when something still runs after the time."""
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def abort_all(self, reason: Exception, timeout_s: float) -> None:
        """Ends what runs and gives the answers a moment to be sent."""
        for work in list(self._active):
            work.abort(reason)
        await self.drain(timeout_s)


class ServerContext:
    """One per server process."""

    def __init__(self, engine: Engine, config: Config, metrics: Metrics, keyring: Keyring) -> None:
        self.engine = engine
        self.config = config
        self.metrics = metrics
        self.keyring = keyring
        self.gate = Gate(config.limits.max_in_flight_per_key)
        self.created = int(time.time())
        self.url = ""  # where the server listens, once it does
        self._fingerprint: str | None = None

    @property
    def phase(self) -> str:
        return "draining" if self.gate.is_draining else self.engine.state.phase

    @property
    def is_ready(self) -> bool:
        return not self.gate.is_draining and self.engine.state.is_ready

    def require_ready(self) -> ModelInfo:
        """Raises NotReady or EngineDead with the reason."""
        info = self.engine.info
        if self.is_ready and info is not None:
            return info
        state = self.engine.state
        if self.phase == "draining":
            raise NotReady("the server is shutting down; send this to another one", retry_after_s=1, code="draining")
        if state.phase == "dead":
            raise EngineDead("the engine has stopped and will not be restarted")
        detail = f" ({state.phase}: {state.detail})" if state.detail else f" ({state.phase})"
        if state.phase in LOADING_PHASES:
            raise NotReady(f"the model is not loaded yet{detail}", retry_after_s=LOADING_RETRY_S)
        raise NotReady(f"the engine does not answer{detail}", retry_after_s=LOADING_RETRY_S, code="unavailable")

    def resolve_model(self, name: str | None) -> str:
        """The name that the answer carries. Raises RequestError (404) that lists the served names."""
        names = self.engine.model_names
        if not name:
            return names[0]
        if name in names:
            return name
        served = ", ".join(repr(served) for served in names)
        raise RequestError(f"that model is not served here; served: {served}", param="model", code="model_not_found")

    @property
    def fingerprint(self) -> str:
        """Changes whenever the numbers a request sees could change."""
        if self._fingerprint is None:
            info, config = self.require_ready(), self.config
            parts = (
                *(__version__, config.model.model, config.model.dtype, config.model.load_adapter, info.architecture),
                *(info.dtype, info.device, config.cache.kv_cache_dtype, config.runtime.deterministic),
                *(config.runtime.load_format, config.runtime.seed, sorted(info.kernels.items())),
            )
            digest = hashlib.sha256(repr(parts).encode()).hexdigest()
            self._fingerprint = f"kvasir-{__version__}-{digest[:8]}"
        return self._fingerprint
