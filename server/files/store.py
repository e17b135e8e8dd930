"""Uploaded and written files: contents in the data folder, everything else in its database. Knows no HTTP.

A tenant sees its own files only; those of others are as if they did not exist.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Limits
from engine.errors import Conflict, RateLimited, RequestError
from server.files.database import Database, new_id

UPLOADED = "batch"
WRITTEN = "batch_output"


@dataclass(frozen=True)
class StoredFile:
    id: str
    filename: str
    purpose: str
    size: int
    created_at: int
    expires_at: int | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """All tenants' files."""

    def __init__(self, database: Database, limits: Limits) -> None:
        self._database = database
        self._limits = limits

    def new_path(self) -> Path:
        """Where a file is written before `add` takes it over; what is left there is deleted at the next start."""
        return self._database.incoming / new_id("")

    def path_of(self, file_id: str) -> Path:
        return self._database.files / file_id

    async def add(
        self, tenant: str, path: Path, *, filename: str, purpose: str = UPLOADED, ttl_s: float | None = None
    ) -> StoredFile:
        """Takes over the complete file at `path`. Raises RateLimited when the tenant has too much already."""
        return await self._database.run(
            lambda connection: self.insert(connection, tenant, path, filename=filename, purpose=purpose, ttl_s=ttl_s)
        )

    def insert(
        self,
        connection: sqlite3.Connection,
        tenant: str,
        path: Path,
        *,
        filename: str,
        purpose: str,
        ttl_s: float | None,
    ) -> StoredFile:
        """`add` as part of a transaction."""
        size = path.stat().st_size
        if purpose == UPLOADED:
            self._check_quota(connection, tenant, size)
        now = time.time()
        expires_at = int(now + (self._limits.stored_file_ttl_s if ttl_s is None else ttl_s))
        file = StoredFile(new_id("file-"), filename, purpose, size, int(now), expires_at)
        connection.execute(
            "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, expires_at) VALUES (?,?,?,?,?,?,?)",
            (file.id, tenant, filename, purpose, size, file.created_at, expires_at),
        )
        path.replace(self.path_of(file.id))
        return file

    async def get(self, tenant: str, file_id: str, *, param: str = "file_id") -> StoredFile:
        """Raises RequestError (404), also for a file of another tenant."""
        found = await self._database.run(
            lambda connection: connection.execute(
                "SELECT * FROM files WHERE id = ? AND tenant = ? AND (expires_at IS NULL OR expires_at > ?)",
                (file_id, tenant, time.time()),
            ).fetchone()
        )
        if found is None:
            raise RequestError("there is no such file", param=param, code="file_not_found")
        return _file(found)

    async def page(
        self, tenant: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[StoredFile], bool]:
        """One page, and whether there are more. Raises RequestError (404) for an unknown `after`."""

        def read(connection: sqlite3.Connection) -> tuple[list[StoredFile], bool]:
            query = "SELECT * FROM files WHERE tenant = ? AND (expires_at IS NULL OR expires_at > ?)"
            values: list[Any] = [tenant, time.time()]
            if purpose is not None:
                query += " AND purpose = ?"
                values.append(purpose)
            rows, has_more = page_of(connection, "files", query, values, tenant, after, limit, newest_first)
            return [_file(row) for row in rows], has_more

        return await self._database.run(read)

    async def delete(self, tenant: str, file_id: str) -> None:
        """Raises RequestError (404), and Conflict while a batch reads the file."""
        await self.get(tenant, file_id)

        def remove(connection: sqlite3.Connection) -> None:
            if _is_read(connection, file_id):
                raise Conflict("a batch that has not ended reads this file; cancel it first", param="file_id")
            self._remove(connection, file_id)

        await self._database.run(remove)

    async def sweep(self) -> None:
        """Deletes what has expired and is not read by a batch, and contents that no entry belongs to."""

        def remove(connection: sqlite3.Connection) -> None:
            for row in connection.execute("SELECT id FROM files WHERE expires_at <= ?", (time.time(),)).fetchall():
                if not _is_read(connection, row["id"]):
                    self._remove(connection, row["id"])
            known = {row["id"] for row in connection.execute("SELECT id FROM files")}
            for path in self._database.files.iterdir():
                if path.name not in known:
                    path.unlink()

        await self._database.run(remove)

    def _remove(self, connection: sqlite3.Connection, file_id: str) -> None:
        connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path_of(file_id).unlink(missing_ok=True)

    def _check_quota(self, connection: sqlite3.Connection, tenant: str, size: int) -> None:
        count, total = connection.execute(
            "SELECT count(*) FILTER (WHERE purpose = ?), coalesce(sum(bytes), 0) FROM files WHERE tenant = ?",
            (UPLOADED, tenant),
        ).fetchone()
        if count >= self._limits.max_files:
            raise RateLimited(f"{count} files are stored, the limit is {self._limits.max_files}; delete some")
        if total + size > self._limits.max_stored_file_bytes:
            raise RateLimited(
                f"{total} bytes are stored and this file has {size}; the limit is "
                f"{self._limits.max_stored_file_bytes}; delete some files"
            )


def page_of(
    connection: sqlite3.Connection,
    table: str,
    query: str,
    values: list[Any],
    tenant: str,
    after: str | None,
    limit: int,
    newest_first: bool,
) -> tuple[list[sqlite3.Row], bool]:
    """Rows of a query on `table` that come after the one with that id, by creation, and whether more follow."""
    if after is not None:
        place = connection.execute(
            f"SELECT serial FROM {table} WHERE id = ? AND tenant = ?", (after, tenant)
        ).fetchone()
        if place is None:
            raise RequestError("there is nothing with the id in after", param="after", code=f"{table}_not_found")
        query += f" AND serial {'<' if newest_first else '>'} ?"
        values = [*values, place["serial"]]
    query += f" ORDER BY serial {'DESC' if newest_first else 'ASC'} LIMIT ?"
    rows = connection.execute(query, [*values, limit + 1]).fetchall()
    return rows[:limit], len(rows) > limit


def _is_read(connection: sqlite3.Connection, file_id: str) -> bool:
    query = "SELECT 1 FROM batches WHERE input_file_id = ? AND NOT is_finished"
    return connection.execute(query, (file_id,)).fetchone() is not None


def _file(row: sqlite3.Row) -> StoredFile:
    return StoredFile(row["id"], row["filename"], row["purpose"], row["bytes"], row["created_at"], row["expires_at"])
