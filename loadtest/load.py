"""Load shapes: a closed loop keeps so many requests in flight, an open loop sends when they are due.

Both end at a number of requests or at a time, whichever comes first. Knows no figures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx

from loadtest.arrivals import Arrivals, poisson
from loadtest.client import Record, Run, Target, connect, send
from loadtest.workloads import Conversation, Workload

Progress = Callable[[Record], object]


@dataclass(frozen=True, kw_only=True)
class Load:
    """
    num_requests  requests to send, all turns counted
    concurrency   requests in flight at most; None: no bound
    arrivals      when conversations are due; None: a closed loop
    duration_s    nothing is sent after so long; what is in flight still counts
    """

    num_requests: int
    concurrency: int | None = None
    arrivals: Arrivals | None = None
    duration_s: float | None = None


async def drive(
    target: Target, conversations: Iterator[Conversation], load: Load, *, progress: Progress = lambda record: None
) -> Run:
    """Sends the turns of `conversations`, in order; a conversation's next turn follows its answer.

    The requests are the same whatever the server does, except that nothing follows a failed turn or the end of
    the time: those count as unsent.
    """
    async with connect(target) as http:
        driver = _Driver(http, target, conversations, load, progress)
        await (driver.closed_loop() if load.arrivals is None else driver.open_loop(load.arrivals))
        return Run(driver.records, time.perf_counter() - driver.started, driver.unsent)


class _Driver:
    def __init__(
        self,
        http: httpx.AsyncClient,
        target: Target,
        conversations: Iterator[Conversation],
        load: Load,
        progress: Progress,
    ) -> None:
        self._http, self._target, self._load, self._progress = http, target, load, progress
        self._conversations = conversations
        self._left = load.num_requests
        self._gate = asyncio.Semaphore(load.concurrency or load.num_requests)
        self.records: list[Record] = []
        self.unsent = 0
        self.started = time.perf_counter()

    async def closed_loop(self) -> None:
        async def worker() -> None:
            while (planned := self._take()) is not None:
                await self._play(*planned, due=None)

        width = min(self._load.concurrency or self._load.num_requests, self._load.num_requests)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(width):
                tasks.create_task(worker())

    async def open_loop(self, arrivals: Arrivals) -> None:
        async with asyncio.TaskGroup() as tasks:
            for due_s in arrivals:
                if self._load.duration_s is not None and due_s > self._load.duration_s:
                    break
                due = self.started + due_s
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                planned = self._take()
                if planned is None:
                    break
                tasks.create_task(self._play(*planned, due=due))

    def _take(self) -> tuple[Conversation, int] | None:
        """The next conversation and how many of its turns are within the bounds."""
        if self._left <= 0 or self._is_over():
            return None
        conversation = next(self._conversations, None)
        if conversation is None:
            return None
        num_turns = min(self._left, conversation.num_turns)
        self._left -= num_turns
        return conversation, num_turns

    async def _play(self, conversation: Conversation, num_turns: int, *, due: float | None) -> None:
        request = next(conversation.turns)
        for turn in range(num_turns):
            async with self._gate:
                if turn and self._is_over():
                    self.unsent += num_turns - turn
                    return
                record = await send(self._http, self._target, request, due=due)
            self.records.append(record)
            self._progress(record)
            if record.error is not None:
                self.unsent += num_turns - turn - 1
                return
            if turn + 1 < num_turns:
                request = conversation.turns.send(record.answer)
                await asyncio.sleep(conversation.think_s)
                due = None if due is None else (record.finished or record.sent) + conversation.think_s

    def _is_over(self) -> bool:
        duration_s = self._load.duration_s
        return duration_s is not None and time.perf_counter() - self.started >= duration_s


async def run_workload(
    target: Target, workload: Workload, *, concurrency: int | None = None, rate: float | None = None
) -> Run:
    """All requests of a workload: a closed loop, or an open loop with Poisson arrivals at `rate` a second."""
    arrivals = None if rate is None else poisson(rate, workload.seed)
    load = Load(num_requests=workload.num_requests, concurrency=concurrency, arrivals=arrivals)
    return await drive(target, workload.conversations(), load)
