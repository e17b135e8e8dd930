"""What lies in the data folder, for the routes and the worker: files and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from engine.config import Config
from engine.errors import UnsupportedParameter
from server.batches.store import BatchStore
from server.files.database import Database
from server.files.store import FileStore


class Storage:
    """One per server that has a data folder.

    on_change   called with the id of a batch that was created, or is to be cancelled
    """

    def __init__(self, folder: Path, config: Config) -> None:
        """Raises ConfigError when the folder cannot be used, or is in use by another server."""
        self.database = Database(folder)
        self.files = FileStore(self.database, config.limits)
        self.batches = BatchStore(self.database, self.files, config.limits)
        self.on_change: Callable[[str], None] = lambda batch_id: None

    def close(self) -> None:
        self.database.close()


class HasStorage(Protocol):
    @property
    def storage(self) -> Storage | None: ...


def storage_of(context: HasStorage) -> Storage:
    """Raises UnsupportedParameter when the server keeps nothing."""
    if context.storage is None:
        raise UnsupportedParameter("files and batches are off on this server; start it with --data-folder DIR")
    return context.storage
