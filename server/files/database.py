"""The data folder: one SQLite database and the files beside it, private to one server. Knows no HTTP and no batches.

All statements run in one thread, each job as one transaction: what a job has returned survives a kill of the process.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from engine.errors import ConfigError

SECRET_BYTES = 32
SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER
);
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, serial);
CREATE TABLE IF NOT EXISTS batches (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    is_finished INTEGER NOT NULL DEFAULT 0,
    object TEXT NOT NULL,
    num_completed INTEGER NOT NULL DEFAULT 0,
    num_failed INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant, serial);
CREATE TABLE IF NOT EXISTS results (
    batch_id TEXT NOT NULL,
    line INTEGER NOT NULL,
    is_error INTEGER NOT NULL,
    record BLOB NOT NULL,
    PRIMARY KEY (batch_id, line)
);
"""

T = TypeVar("T")


class Database:
    """Owns the folder: a second server on the same one is refused."""

    def __init__(self, folder: Path) -> None:
        """Creates what is missing (0700, 0600). Raises ConfigError."""
        self.files = folder / "files"
        self.incoming = folder / "incoming"
        try:
            for path in (folder, self.files, self.incoming):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _locked(folder / "lock")
            for leftover in self.incoming.iterdir():
                leftover.unlink()
            self.secret = _secret(folder / "secret")
            self._connection = _connected(folder / "kvasir.sqlite3")
        except BlockingIOError:
            raise ConfigError("the data folder is in use by another server; give each its own --data-folder") from None
        except (OSError, sqlite3.Error) as error:
            reason = (error.strerror or "") if isinstance(error, OSError) else str(error)
            raise ConfigError(f"the data folder cannot be used ({reason}); name another with --data-folder") from None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")

    async def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Runs `job` as one transaction, to its end even when the caller is cancelled. Raises what it raises."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._transact, job))

    def close(self) -> None:
        """Waits for the jobs that run."""
        self._thread.shutdown(wait=True)
        self._connection.close()
        os.close(self._lock)

    def _transact(self, job: Callable[[sqlite3.Connection], T]) -> T:
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            return job(self._connection)


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(16)}"


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _secret(path: Path) -> bytes:
    """Random bytes that stay the same: owners of files must be known again after a restart."""
    if path.is_file() and len(found := path.read_bytes()) == SECRET_BYTES:
        return found
    made = secrets.token_bytes(SECRET_BYTES)
    fresh = path.with_suffix(".new")
    fresh.touch(0o600)
    fresh.write_bytes(made)
    fresh.replace(path)
    return made


def _connected(path: Path) -> sqlite3.Connection:
    path.touch(0o600)
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(SCHEMA)
    return connection
