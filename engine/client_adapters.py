"""The client's side of low-rank adapters: which names are served, and what a new engine process must load again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType

import msgspec

from engine.adapters import LOAD_ACTION, UNLOAD_ACTION, check_name
from engine.control import Payload
from engine.errors import Conflict, EngineDead, KvasirError, ModelNotFound
from engine.types import AdapterInfo

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 300.0
Call = Callable[[str, Payload, float], Awaitable[Payload]]  # action, payload, seconds


class ClientAdapters:
    """Names in the order in which they were loaded. One change at a time."""

    def __init__(self, call: Call, base_names: Iterable[str]) -> None:
        """call: has the engine process do an action. base_names: the model's own, which no adapter may have."""
        self._call = call
        self._base_names = frozenset(base_names)
        self._loaded: dict[str, AdapterInfo] = {}
        self._is_started = False  # an engine process has been ready before
        self._lock = asyncio.Lock()

    @property
    def loaded(self) -> Mapping[str, AdapterInfo]:
        return MappingProxyType(self._loaded)

    def key_of(self, name: str) -> str:
        """What the core knows a loaded adapter by; "" for none. Raises ModelNotFound."""
        if not name:
            return ""
        adapter = self.loaded.get(name)
        if adapter is None:
            raise ModelNotFound("no adapter of that name is loaded", param="model")
        return adapter.key

    async def load(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        """Loads an adapter below the configured root; with in_place, another version of one that is loaded.

        Requests that run keep the version they began with. Raises Conflict for a name in use, and what the engine
        raises for the files.
        """
        check_name(name)
        async with self._lock:
            if name in self._base_names:
                raise Conflict("the model itself has that name; choose another", param="lora_name")
            old = self.loaded.get(name)
            if old is not None and not in_place:
                raise Conflict(
                    f"an adapter {name!r} is loaded; unload it first, or set load_inplace", param="lora_name"
                )
            info = await self._load(name, path, "" if old is None else old.key)
            self._loaded[name] = info
            if old is not None and old.key != info.key:
                await self._unload(old.key)
            return info

    async def unload(self, name: str) -> None:
        """New requests no longer find it; those that run finish. Raises ModelNotFound."""
        async with self._lock:
            key = self.key_of(name)
            del self._loaded[name]
            await self._unload(key)

    async def engine_started(self, present: Iterable[AdapterInfo]) -> None:
        """A new engine process has what the configuration names: bring it to what was loaded last.

        An adapter whose files are gone or cannot be used any more is dropped, and told in the log. Raises EngineDead.
        """
        async with self._lock:
            if not self._is_started:
                self._is_started = True
                self._loaded.update((info.name, info) for info in present)
                return
            wanted = {adapter.key for adapter in self._loaded.values()}
            there = {info.key for info in present}
            for key in sorted(there - wanted):
                await self._unload(key)
            for adapter in list(self._loaded.values()):
                if adapter.key not in there:
                    await self._reload(adapter)

    async def _reload(self, known: AdapterInfo) -> None:
        name = known.name
        try:
            info = await self._load(name, known.path, "")
        except EngineDead:
            raise
        except KvasirError as error:
            logger.error("adapter %s could not be loaded again and is no longer served: %s", name, error)
            del self._loaded[name]
            return
        if info.key != known.key:
            logger.warning("the files of adapter %s have changed: its running requests end with an error", name)
        self._loaded[name] = msgspec.structs.replace(info, created_s=known.created_s)

    async def _load(self, name: str, path: str, replaces: str) -> AdapterInfo:
        payload = {"name": name, "path": path, "replaces": replaces}
        answer = await self._call(LOAD_ACTION, payload, LOAD_TIMEOUT_S)
        return msgspec.convert(answer["adapter"], AdapterInfo)

    async def _unload(self, key: str) -> None:
        await self._call(UNLOAD_ACTION, {"key": key}, LOAD_TIMEOUT_S)
