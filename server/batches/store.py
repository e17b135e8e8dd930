"""Batches and the results of their lines, in the database. Every change is one transaction. Knows no engine.

A batch is kept as the object that the API shows; its counts and token sums grow with each result.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import Limits
from engine.errors import Conflict, RateLimited, RequestError
from server.batches.lines import Line
from server.files.database import Database, new_id
from server.files.store import WRITTEN, FileStore, page_of

TIMED = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
USAGE = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
NOT_RUN = {
    "expired": ("batch_expired", "the completion window ended before this request was run"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was run"),
}


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """The outcome of one line, as it is written: one JSON object without a line end."""

    line: int
    is_error: bool
    record: bytes
    usage: Usage = Usage()


@dataclass(frozen=True)
class Batch:
    tenant: str
    object: dict[str, Any]  # as the API shows it

    @property
    def id(self) -> str:
        return str(self.object["id"])

    @property
    def status(self) -> str:
        return str(self.object["status"])


class BatchStore:
    """All tenants' batches."""

    def __init__(self, database: Database, files: FileStore, limits: Limits) -> None:
        self._database = database
        self._files = files
        self._limits = limits

    async def create(
        self,
        tenant: str,
        *,
        endpoint: str,
        input_file_id: str,
        window: str,
        window_s: int,
        metadata: dict[str, Any] | None,
        output_ttl_s: int | None,
    ) -> Batch:
        """A batch to be validated. Raises RateLimited when the tenant has too many that have not ended."""
        now = int(time.time())
        shown: dict[str, Any] = {
            "id": new_id("batch_"),
            "object": "batch",
            "endpoint": endpoint,
            "model": None,
            "errors": None,
            "input_file_id": input_file_id,
            "completion_window": window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + window_s,
            **{f"{status}_at": None for status in TIMED},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            "output_ttl_s": output_ttl_s,
        }

        def insert(connection: sqlite3.Connection) -> Batch:
            query = "SELECT count(*) FROM batches WHERE tenant = ? AND NOT is_finished"
            count = connection.execute(query, (tenant,)).fetchone()[0]
            if count >= self._limits.max_batches:
                raise RateLimited(f"{count} batches have not ended, the limit is {self._limits.max_batches}; wait")
            connection.execute(
                "INSERT INTO batches (id, tenant, input_file_id, object) VALUES (?,?,?,?)",
                (shown["id"], tenant, input_file_id, json.dumps(shown)),
            )
            return _load(connection, shown["id"])

        return await self._database.run(insert)

    async def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises RequestError (404), also for a batch of another tenant."""
        return await self._database.run(lambda connection: _own(connection, tenant, batch_id))

    async def read(self, batch_id: str) -> Batch:
        """One that exists."""
        return await self._database.run(lambda connection: _load(connection, batch_id))

    async def page(self, tenant: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Newest first, and whether there are more."""

        def read(connection: sqlite3.Connection) -> tuple[list[Batch], bool]:
            query = "SELECT * FROM batches WHERE tenant = ?"
            rows, has_more = page_of(connection, "batches", query, [tenant], tenant, after, limit, True)
            return [_batch(row) for row in rows], has_more

        return await self._database.run(read)

    async def unfinished(self) -> list[Batch]:
        """Oldest first."""

        def read(connection: sqlite3.Connection) -> list[Batch]:
            rows = connection.execute("SELECT * FROM batches WHERE NOT is_finished ORDER BY serial").fetchall()
            return [_batch(row) for row in rows]

        return await self._database.run(read)

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Asks for the end of a batch. Raises RequestError (404), and Conflict when it is past that."""

        def change(connection: sqlite3.Connection) -> Batch:
            batch = _own(connection, tenant, batch_id)
            if batch.status == "cancelling":
                return batch
            if batch.status not in ("validating", "in_progress"):
                raise Conflict(f"the batch is {batch.status} and cannot be cancelled any more", param="batch_id")
            return _change(connection, batch, "cancelling", {})

        return await self._database.run(change)

    async def advance(self, batch_id: str, status: str, *, is_forced: bool = False, **fields: Any) -> Batch:
        """The next status, unless the batch is to be cancelled meanwhile (or is forced). Returns what it is now."""

        def change(connection: sqlite3.Connection) -> Batch:
            batch = _load(connection, batch_id)
            is_held = batch.status == "cancelling" and not is_forced
            return batch if is_held else _change(connection, batch, status, fields)

        return await self._database.run(change)

    async def add_result(self, batch_id: str, result: Result) -> None:
        """Keeps the outcome of a line; the first one counts."""

        def insert(connection: sqlite3.Connection) -> None:
            cursor = connection.execute(
                "INSERT OR IGNORE INTO results (batch_id, line, is_error, record) VALUES (?,?,?,?)",
                (batch_id, result.line, result.is_error, result.record),
            )
            if cursor.rowcount:
                count = "num_failed" if result.is_error else "num_completed"
                sums = ", ".join(f"{name} = {name} + :{name}" for name in USAGE)
                connection.execute(
                    f"UPDATE batches SET {count} = {count} + 1, {sums} WHERE id = :id",
                    {"id": batch_id, **{name: getattr(result.usage, name) for name in USAGE}},
                )

        await self._database.run(insert)

    async def finished_lines(self, batch_id: str) -> set[int]:
        """Numbers of the lines whose outcome is kept."""

        def read(connection: sqlite3.Connection) -> set[int]:
            query = "SELECT line FROM results WHERE batch_id = ?"
            return {row["line"] for row in connection.execute(query, (batch_id,))}

        return await self._database.run(read)

    async def finish(self, batch: Batch, status: str, lines: Sequence[Line]) -> Batch:
        """Writes the output and error files in the order of the lines, and ends the batch; all of it or nothing.

        lines   those of the input: what has no outcome becomes an error that says why
        """
        ttl_s = batch.object["output_ttl_s"]

        def write(connection: sqlite3.Connection) -> Batch:
            fields: dict[str, Any] = {}
            for name, is_error in (("output", False), ("error", True)):
                path = self._files.new_path()
                records = _records(connection, batch.id, is_error, NOT_RUN.get(status), lines)
                if _write(path, records):
                    file = self._files.insert(
                        connection,
                        batch.tenant,
                        path,
                        filename=f"{batch.id}_{name}.jsonl",
                        purpose=WRITTEN,
                        ttl_s=ttl_s,
                    )
                    fields[f"{name}_file_id"] = file.id
                else:
                    path.unlink()
            connection.execute("DELETE FROM results WHERE batch_id = ?", (batch.id,))
            return _change(connection, _load(connection, batch.id), status, fields)

        return await self._database.run(write)


def _records(
    connection: sqlite3.Connection,
    batch_id: str,
    is_error: bool,
    not_run: tuple[str, str] | None,
    lines: Sequence[Line],
) -> Iterator[bytes]:
    query = "SELECT line, is_error, record FROM results WHERE batch_id = ? ORDER BY line"
    rows = iter(connection.execute(query, (batch_id,)))
    row = next(rows, None)
    for line in lines:
        if row is not None and row["line"] == line.number:
            if bool(row["is_error"]) == is_error:
                yield row["record"]
            row = next(rows, None)
        elif is_error and not_run is not None:
            error = {"code": not_run[0], "message": not_run[1]}
            record = {"id": new_id("batch_req_"), "custom_id": line.custom_id, "response": None, "error": error}
            yield json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")


def _write(path: Path, records: Iterator[bytes]) -> int:
    """Returns the number of lines."""
    count = 0
    path.touch(0o600)
    with path.open("wb") as file:
        for record in records:
            file.write(record + b"\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def _own(connection: sqlite3.Connection, tenant: str, batch_id: str) -> Batch:
    row = connection.execute("SELECT * FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)).fetchone()
    if row is None:
        raise RequestError("there is no such batch", param="batch_id", code="batch_not_found")
    return _batch(row)


def _load(connection: sqlite3.Connection, batch_id: str) -> Batch:
    return _batch(connection.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone())


def _batch(row: sqlite3.Row) -> Batch:
    shown = json.loads(row["object"])
    counts = {**shown["request_counts"], "completed": row["num_completed"], "failed": row["num_failed"]}
    usage = {
        "input_tokens": row["input_tokens"],
        "input_tokens_details": {"cached_tokens": row["cached_tokens"]},
        "output_tokens": row["output_tokens"],
        "output_tokens_details": {"reasoning_tokens": row["reasoning_tokens"]},
        "total_tokens": row["input_tokens"] + row["output_tokens"],
    }
    return Batch(row["tenant"], {**shown, "request_counts": counts, "usage": usage})


def _change(connection: sqlite3.Connection, batch: Batch, status: str, fields: dict[str, Any]) -> Batch:
    shown = {**batch.object, **fields, "status": status}
    if shown.get(f"{status}_at") is None:
        shown[f"{status}_at"] = int(time.time())
    connection.execute(
        "UPDATE batches SET object = ?, is_finished = ? WHERE id = ?",
        (json.dumps(shown), status in FINAL, batch.id),
    )
    return _load(connection, batch.id)
