"""Loads and unloads low-rank adapters in the engine process: names, folders and versions on one side, indices on the
other. Torch-free; the weights are the store's business.

Everything here happens between two steps, in the thread that steps.
"""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any, Protocol

import msgspec

from engine.config import LoraConfig
from engine.control import Controls, Payload
from engine.errors import ConfigError, InvalidParameter
from engine.scheduling.adapters import AdapterTable
from engine.types import AdapterInfo

logger = logging.getLogger(__name__)

LOAD_ACTION, UNLOAD_ACTION = "load_adapter", "unload_adapter"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


class Weights(Protocol):
    """An adapter as it was read."""

    @property
    def digest(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...


class Store(Protocol):
    """Holds weights by index; see engine.execution.adapters."""

    def read(self, folder: Path) -> Any: ...

    def put(self, index: int, weights: Any) -> None: ...


class Adapters:
    """The loaded adapters of one engine."""

    def __init__(self, config: LoraConfig, table: AdapterTable, store: Store) -> None:
        self._config = config
        self._table = table
        self._store = store

    def load_at_start(self) -> list[AdapterInfo]:
        """Those of the configuration. Raises ConfigError that names the adapter."""
        loaded: list[AdapterInfo] = []
        for entry in self._config.lora_adapters:
            name, separator, path = entry.partition("=")
            if not separator or not path:
                raise ConfigError(f"--lora-adapters has {entry!r}; write name=folder")
            if name in {info.name for info in loaded}:
                raise ConfigError(f"--lora-adapters names {name!r} twice")
            try:
                loaded.append(self._load(name, path, Path(self._config.lora_root or "", path)))
            except (ConfigError, InvalidParameter) as error:
                raise ConfigError(f"adapter {name!r} cannot be loaded: {error}") from None
        return loaded

    def load(self, name: str, path: str, replaces: str = "") -> AdapterInfo:
        """Loads what a client asks for. Raises InvalidParameter for a name, path, file or number that cannot be.

        path       below the configured root
        replaces   key of the version that will be unloaded then
        """
        try:
            return self._load(name, path, self._folder(path), replaces)
        except ConfigError as error:
            raise InvalidParameter(str(error), param="lora_path") from None

    def unload(self, key: str) -> None:
        """No new requests; the memory follows when the last request that uses the adapter has ended."""
        self._table.remove(key)

    def offer(self, controls: Controls) -> None:
        """Lets operators do the same while the engine runs."""

        def load(payload: Payload) -> Payload:
            info = self.load(payload["name"], payload["path"], payload.get("replaces", ""))
            return {"adapter": msgspec.to_builtins(info)}

        def unload(payload: Payload) -> Payload:
            self.unload(payload["key"])
            return {}

        controls.add(LOAD_ACTION, load)
        controls.add(UNLOAD_ACTION, unload)

    def _load(self, name: str, path: str, folder: Path, replaces: str = "") -> AdapterInfo:
        check_name(name)
        started = time.perf_counter()
        self._table.check_room("", replaces)  # before the work
        weights: Weights = self._store.read(folder)
        info = AdapterInfo(
            name=name,
            key=f"{name}@{weights.digest}",
            path=path,
            rank=weights.rank,
            num_bytes=weights.num_bytes,
            created_s=int(time.time()),
        )
        index = self._table.add(info.key, replaces)
        if index is not None:
            self._store.put(index, weights)
        logger.info(
            "adapter %s is loaded: rank %d, %.1f MiB, %.0f ms",
            *(info.key, info.rank, info.num_bytes / 2**20, 1000 * (time.perf_counter() - started)),
        )
        return info

    def _folder(self, path: str) -> Path:
        """The folder meant, with its links followed, below the root. What lies outside is not told from what is not."""
        if self._config.lora_root is None:
            raise ConfigError("adapters cannot be loaded while the server runs: it has no --lora-root")
        try:
            root = Path(self._config.lora_root).resolve()
            folder = (root / path).resolve()
            inside = [folder, *(entry.resolve() for entry in folder.iterdir())]
        except (OSError, ValueError, RuntimeError):  # absent, no folder, a null character, a loop of links
            inside = []
        if not inside or not all(entry.is_relative_to(root) for entry in inside):
            raise ConfigError("lora_path is no folder below the one that the operator has set for adapters")
        return folder


def check_name(name: str) -> None:
    """Raises InvalidParameter for a name that no adapter may have."""
    if not NAME.fullmatch(name):
        raise InvalidParameter(
            "the name of an adapter has 1 to 128 of A-Z a-z 0-9 . _ : / - and begins with a letter or digit",
            param="lora_name",
        )
