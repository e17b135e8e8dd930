"""What all routes share: the engine, the settings, the metrics, and who is being served right now."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Set
from typing import Protocol

from starlette.types import ASGIApp

from engine.config import Config
from engine.errors import EngineDead, ModelNotFound, NotReady, RateLimited
from engine.metrics import Metrics
from engine.types import ModelInfo
from engine.version import __version__
from server.auth import Keyring
from server.engine_api import Engine
from server.files.storage import Storage
from server.rate_limits import RateLimits

LOADING_PHASES = frozenset({"starting", "loading", "warming"})
LOADING_RETRY_S = 2
SLEEPING_RETRY_S = 30


class Abortable(Protocol):
    @property
    def labels(self) -> Set[str]:
        """Ids under which the client knows it: of its HTTP request, of its answer."""

    def abort(self, reason: Exception) -> None:
        """Ends the work; whoever waits for it gets `reason`."""


class Gate:
    """Counts what is in flight, per key and in all, and closes when the server drains."""

    def __init__(self, max_per_tenant: int, rate_limits: RateLimits | None = None) -> None:
        self._max_per_tenant = max_per_tenant
        self.rate_limits = rate_limits or RateLimits({})
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
        limit = self.rate_limits.max_in_flight(tenant, self._max_per_tenant)
        if tenant and self._num_by_tenant[tenant] >= limit:
            raise RateLimited(f"this API key has {limit} requests in flight, which is the limit; wait for one to end")
        self.rate_limits.admit(tenant)
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

    def reopen(self) -> None:
        """Takes back a `drain`."""
        self.is_draining = False

    def abort(self, labels: Collection[str] | None, reason: Exception) -> int:
        """Ends the work that carries one of these labels, or all. Returns how many pieces of work that were."""
        meant = [work for work in self._active if labels is None or not work.labels.isdisjoint(labels)]
        for work in meant:
            work.abort(reason)
        return len(meant)

    async def abort_all(self, reason: Exception, timeout_s: float) -> None:
        """Ends what runs and gives the answers a moment to be sent."""
        for work in list(self._active):
            work.abort(reason)
        await self.drain(timeout_s)


class ServerContext:
    """One per server process."""

    def __init__(
        self, engine: Engine, config: Config, metrics: Metrics, keyring: Keyring, storage: Storage | None = None
    ) -> None:
        """storage   files and batches; None: they are off"""
        self.engine = engine
        self.config = config
        self.metrics = metrics
        self.keyring = keyring
        self.gate = Gate(config.limits.max_in_flight_per_key, keyring.rate_limits)
        self.created = int(time.time())
        self.storage = storage
        self.api: ASGIApp | None = None  # the routes without the layers around them, once there are some
        self.url = ""  # where the server listens, once it does
        self._fingerprint: str | None = None

    @property
    def phase(self) -> str:
        return "draining" if self.gate.is_draining else self.engine.state.phase

    @property
    def is_ready(self) -> bool:
        """Requests are accepted."""
        return not self.gate.is_draining and self.engine.state.is_ready

    @property
    def is_responsive(self) -> bool:
        """Ready, and the engine process has been heard of recently: what /readyz tells."""
        return self.is_ready and self.engine.heartbeat_age_s <= self.config.server.ready_heartbeat_s

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
        if state.phase == "sleeping":
            raise NotReady("the engine sleeps; POST /wake_up wakes it", retry_after_s=SLEEPING_RETRY_S, code="sleeping")
        detail = f" ({state.phase}: {state.detail})" if state.detail else f" ({state.phase})"
        if state.phase in LOADING_PHASES:
            raise NotReady(f"the model is not loaded yet{detail}", retry_after_s=LOADING_RETRY_S)
        raise NotReady(f"the engine does not answer{detail}", retry_after_s=LOADING_RETRY_S, code="unavailable")

    def resolve_model(self, name: str | None, *, with_adapters: bool = False) -> str:
        """The name that the answer carries. Raises ModelNotFound that lists the served names.

        with_adapters   the route serves low-rank adapters too, and passes on `adapter_of` that name
        """
        adapters: Iterable[str] = self.engine.adapters if with_adapters else ()
        names = (*self.engine.model_names, *adapters)
        if not name:
            return names[0]
        if name in names:
            return name
        served = ", ".join(repr(served) for served in names)
        raise ModelNotFound(f"that model is not served here; served: {served}", param="model")

    def adapter_of(self, model: str) -> str:
        """For `GenerationRequest.adapter`: the resolved name when it is an adapter's, else ""."""
        return model if model in self.engine.adapters else ""

    def fingerprint_of(self, model: str) -> str:
        """`fingerprint` of answers that carry that name: an adapter has one of its own."""
        adapter = self.engine.adapters.get(model)
        return self.fingerprint if adapter is None else f"{self.fingerprint}-{adapter.key.rpartition('@')[2][:8]}"

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
