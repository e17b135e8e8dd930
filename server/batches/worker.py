"""Takes every batch from one state to the next, in the background, and goes on after a restart where it stopped.

A tenant's batches run one after the other, those of different tenants side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from engine.errors import EngineDead, KvasirError
from server.batches.executor import Executor
from server.batches.lines import Line, Problem, Scan, read_line, scan
from server.batches.store import FINAL, Batch, Result
from server.context import ServerContext
from server.files.storage import Storage

logger = logging.getLogger(__name__)

MAX_BATCHES_AT_A_TIME = 4
RETRY_S = 5.0
SWEEP_S = 60.0


@dataclass
class _Job:
    """A batch that has not ended."""

    batch: Batch
    is_cancelled: asyncio.Event = field(default_factory=asyncio.Event)


class BatchWorker:
    """One per server that has a data folder."""

    def __init__(self, context: ServerContext, storage: Storage) -> None:
        assert context.api is not None, "the worker calls the application's routes"
        self._context = context
        self._storage = storage
        server = context.config.server
        self._executor = Executor(context, context.api, rows=server.batch_rows, memory=server.batch_memory)
        self._jobs: dict[str, _Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by tenant
        self._places = asyncio.Semaphore(MAX_BATCHES_AT_A_TIME)
        self._scanning = asyncio.Lock()

    async def start(self) -> None:
        """Takes up what an earlier process left."""
        await self._storage.files.sweep()
        for batch in await self._storage.batches.unfinished():
            self._take_up(batch)
        self._storage.on_change = lambda batch_id: self._spawn(self._look_at(batch_id))
        self._spawn(self._sweep())

    async def stop(self) -> None:
        """Ends all work where it is. What has an outcome has been kept."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_at(self, batch_id: str) -> None:
        """A batch is new, or is to be cancelled."""
        job = self._jobs.get(batch_id)
        if job is not None:
            job.is_cancelled.set()
            return
        batch = await self._storage.batches.read(batch_id)
        if batch.status not in FINAL and batch_id not in self._jobs:
            self._take_up(batch)

    def _take_up(self, batch: Batch) -> None:
        job = self._jobs[batch.id] = _Job(batch)
        if batch.status == "cancelling":
            job.is_cancelled.set()
        self._spawn(self._see_to(job))

    async def _see_to(self, job: _Job) -> None:
        """Until the batch has ended. Troubles with the disk or the engine are waited out."""
        try:
            while True:
                try:
                    await self._process(job)
                    return
                except FileNotFoundError:
                    logger.error("the input of batch %s is gone from the data folder", job.batch.id)
                    await self._fail(job.batch, "input_file_lost", "the input file is no longer there")
                    return
                except EngineDead:
                    logger.warning("batch %s waits for the next start of the server", job.batch.id)
                    return
                except (OSError, sqlite3.Error, KvasirError):
                    logger.exception("batch %s is interrupted; going on in %g s", job.batch.id, RETRY_S)
                    await asyncio.sleep(RETRY_S)
                except Exception:
                    logger.exception("batch %s has failed", job.batch.id)
                    await self._fail(job.batch, "internal_error", "internal error; the server's log has the details")
                    return
        finally:
            self._jobs.pop(job.batch.id, None)

    async def _fail(self, batch: Batch, code: str, message: str) -> None:
        """Our fault, or the operator's: the same would happen again."""
        errors = {"object": "list", "data": [Problem(code, message).as_dict()]}
        await self._storage.batches.advance(batch.id, "failed", is_forced=True, errors=errors)

    async def _process(self, job: _Job) -> None:
        batches = self._storage.batches
        found = await self._scan(job.batch)
        work = asyncio.create_task(self._run(job, found))
        cancelling = asyncio.create_task(job.is_cancelled.wait())
        try:
            left_s = job.batch.object["expires_at"] - time.time()
            await asyncio.wait({work, cancelling}, timeout=max(left_s, 0), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                status = work.result()
            else:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                status = "cancelled" if cancelling.done() else "expired"
        finally:
            for task in (work, cancelling):
                task.cancel()
            await asyncio.gather(work, cancelling, return_exceptions=True)
        if status == "failed":
            return
        if status == "completed" and (await batches.advance(job.batch.id, "finalizing")).status == "cancelling":
            status = "cancelled"  # asked for after the last line
        now = await batches.finish(await batches.read(job.batch.id), status, found.lines)
        logger.info("batch %s is %s: %s", now.id, now.status, now.object["request_counts"])

    async def _scan(self, batch: Batch) -> Scan:
        """One file at a time: it takes processor time."""
        path = self._storage.files.path_of(batch.object["input_file_id"])
        async with self._scanning:
            found = await asyncio.to_thread(scan, path, self._context.config.limits, batch.object["endpoint"])
        if not found.problems:
            try:
                self._context.resolve_model(found.model, with_adapters=True)
            except KvasirError as error:
                found.problems.append(Problem("model_not_found", str(error), None, "body.model"))
        return found

    async def _run(self, job: _Job, found: Scan) -> str:
        """Returns the status that the batch has then."""
        batch, batches = job.batch, self._storage.batches
        if batch.status == "validating":
            if found.problems:
                errors = {"object": "list", "data": [problem.as_dict() for problem in found.problems]}
                now = await batches.advance(batch.id, "failed", errors=errors)
                return "failed" if now.status == "failed" else "cancelled"
            counts = {"total": len(found.lines), "completed": 0, "failed": 0}
            job.batch = batch = await batches.advance(
                batch.id,
                "in_progress",
                request_counts=counts,
                model=self._context.resolve_model(found.model, with_adapters=True),
            )
        if batch.status == "in_progress":
            async with self._turns[batch.tenant], self._places:
                done = await batches.finished_lines(batch.id)
                await self._execute(batch, [line for line in found.lines if line.number not in done])
        return "cancelled" if batch.status == "cancelling" else "completed"

    async def _execute(self, batch: Batch, lines: list[Line]) -> None:
        path = self._storage.files.path_of(batch.object["input_file_id"])

        async def read(line: Line) -> dict[str, Any]:
            return await asyncio.to_thread(read_line, path, line, self._context.config.limits)

        async def keep(result: Result) -> None:
            await self._storage.batches.add_result(batch.id, result)

        await self._executor.run(lines, read, keep, tenant=batch.tenant)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._storage.files.sweep()
            except (OSError, sqlite3.Error):
                logger.exception("expired files could not be deleted; trying again in %g s", SWEEP_S)


@contextlib.asynccontextmanager
async def working(context: ServerContext) -> AsyncIterator[None]:
    """Batches run inside; nothing happens without a data folder."""
    if context.storage is None:
        yield
        return
    worker = BatchWorker(context, context.storage)
    await worker.start()
    try:
        yield
    finally:
        await worker.stop()
        context.storage.close()
