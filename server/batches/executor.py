"""Runs the lines of batches in the order that shares most, with as many at a time as memory is expected to hold.

Serves the worker of /v1/batches and `kvasir batch`. Knows neither states nor where results are kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message

from engine.batching.memory import MemoryBudget, OutputEstimate
from engine.batching.ordering import Group, Item, plan
from engine.errors import EngineDead, KvasirError
from server.batches.call import Answer, call, record
from server.batches.lines import Line
from server.batches.plan import LOWEST_PRIORITY, LinePrompt, line_prompt
from server.batches.store import Result
from server.context import ServerContext
from server.files.database import new_id
from server.generation import Generation

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # of the server on one line, before that is its result
RETRY_S = 1.0
NO_PROMPT_TOKENS = 512  # assumed of a line whose prompt could not be read

Read = Callable[[Line], Awaitable[dict[str, Any]]]
Keep = Callable[[Result], Awaitable[None]]


class Executor:
    """One per engine: all batches share its budget of memory and rows."""

    def __init__(self, context: ServerContext, api: ASGIApp, *, rows: float, memory: float) -> None:
        """rows, memory   shares of a step's rows and of the KV cache that batches may take"""
        self._context = context
        self._api = api
        self._rows = max(int(context.config.scheduler.max_num_seqs * rows), 1)
        self._memory = memory
        self._budget: MemoryBudget | None = None
        self._freed = asyncio.Event()

    async def run(self, lines: Sequence[Line], read: Read, keep: Keep, *, tenant: str) -> None:
        """Runs every line once and gives each outcome to `keep`. Cancelling it ends what runs, without outcomes.

        read   gives a line's request
        Raises what they raise, and EngineDead when the engine will not come back.
        """
        await self._wait_ready()
        run = _Run(self, self._context, self._api, lines, read, keep, tenant)
        try:
            await run.all()
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    @property
    def budget(self) -> MemoryBudget:
        """Known once the engine is ready for the first time."""
        if self._budget is None:
            capacity = int(self._context.require_ready().kv_cache_tokens * self._memory)
            self._budget = MemoryBudget(capacity, self._rows)
        return self._budget

    async def wait_for_room(self, own: int, prefix: object, prefix_tokens: int) -> None:
        """Returns when a request is expected to fit; nobody else comes in between."""
        while not self.budget.fits(own, prefix, prefix_tokens):
            self._freed.clear()
            await self._freed.wait()

    def has_freed(self) -> None:
        """Something was taken out of the budget."""
        self._freed.set()

    async def _wait_ready(self) -> None:
        while not self._context.is_ready:
            if self._context.engine.state.phase == "dead":
                raise EngineDead("the engine has stopped and will not be restarted")
            await asyncio.sleep(RETRY_S)


class _Run:
    """One batch on its way."""

    def __init__(
        self,
        executor: Executor,
        context: ServerContext,
        api: ASGIApp,
        lines: Sequence[Line],
        read: Read,
        keep: Keep,
        tenant: str,
    ) -> None:
        self._executor = executor
        self._context = context
        self._api = api
        self._lines = lines
        self._read = read
        self._keep = keep
        self._tenant = tenant
        self._estimate = OutputEstimate()
        self._bounds: list[int] = []  # by line: output tokens that all choices may have, 0: no bound but the context
        # one key's interactive requests keep half of what it may have in flight
        limit = context.gate.rate_limits.max_in_flight(tenant, context.config.limits.max_in_flight_per_key)
        self._own = asyncio.Semaphore(max(limit // 2, 1) if tenant else len(lines) + 1)

    async def all(self) -> None:
        items = [await self._item(line) for line in self._lines]
        groups = plan(items, self._context.require_ready().block_size)
        shared = sum(group.prefix_tokens * (len(group.members) - 1) for group in groups)
        logger.info(
            "batch of %d requests: %d groups, %d of %d prompt tokens are shared",
            len(items),
            len(groups),
            shared,
            sum(item.num_prompt_tokens for item in items),
        )
        async with asyncio.TaskGroup() as tasks:
            for group in groups:
                await self._start_group(group, items, tasks)

    async def _item(self, line: Line) -> Item:
        prompt = await self._prompt(line)
        if prompt is None:
            self._bounds.append(0)
            return Item((), NO_PROMPT_TOKENS, self._estimate.expected(0))
        bound = prompt.request.sampling.max_tokens * prompt.request.num_choices
        self._bounds.append(bound)
        return prompt.item(self._context.require_ready().block_size, self._estimate.expected(bound))

    async def _prompt(self, line: Line) -> LinePrompt | None:
        request = await self._read(line)
        return await line_prompt(
            self._context, request["url"], request["body"], tenant=self._tenant, label=f"batch-line-{line.number}"
        )

    async def _start_group(self, group: Group, items: Sequence[Item], tasks: asyncio.TaskGroup) -> None:
        """Computes the group's prefix, then starts its members, each as soon as there is room."""
        if not group.prefix_tokens:
            for member in group.members:
                await self._start(member, items[member].num_prompt_tokens, None, 0, tasks)
            return
        prefix = object()  # its name in the budget
        await self._executor.wait_for_room(1, prefix, group.prefix_tokens)
        self._executor.budget.hold(prefix, group.prefix_tokens)
        try:
            await self._compute_prefix(group)
            for member in group.members:
                tail = items[member].num_prompt_tokens - group.prefix_tokens
                await self._start(member, tail, prefix, group.prefix_tokens, tasks)
        finally:
            self._executor.budget.let_go(prefix, group.prefix_tokens)
            self._executor.has_freed()

    async def _start(
        self, place: int, prompt_tokens: int, prefix: object, prefix_tokens: int, tasks: asyncio.TaskGroup
    ) -> None:
        own = prompt_tokens + self._estimate.expected(self._bounds[place])
        line = self._lines[place]
        request = await self._read(line)
        await self._own.acquire()
        try:
            await self._executor.wait_for_room(own, prefix, prefix_tokens)
        except BaseException:
            self._own.release()
            raise
        self._executor.budget.add(own, prefix, prefix_tokens)

        def ended(task: asyncio.Task[None]) -> None:
            self._executor.budget.remove(own, prefix, prefix_tokens)
            self._executor.has_freed()
            self._own.release()

        tasks.create_task(self._run_line(line, request)).add_done_callback(ended)

    async def _compute_prefix(self, group: Group) -> None:
        """As one request whose output nobody reads. When that fails, the members compute the prefix themselves."""
        prompt = await self._prompt(self._lines[group.members[0]])
        if prompt is None:
            return
        try:
            async with Generation(
                self._context, [prompt.prefix_request(group.prefix_tokens)], _never_leaves
            ) as generation:
                await generation.collect()
        except KvasirError as error:
            logger.warning("a shared prefix of %d tokens was not computed first: %s", group.prefix_tokens, error)

    async def _run_line(self, line: Line, request: dict[str, Any]) -> None:
        body = {**request["body"], "priority": LOWEST_PRIORITY}
        request_id = new_id("batch_req_")
        answer = await self._answer(request["url"], body, request_id)
        usage = answer.usage
        if not answer.is_error:
            self._estimate.observe(usage.output_tokens)
        await self._keep(Result(line.number, answer.is_error, record(answer, request["custom_id"], request_id), usage))

    async def _answer(self, url: str, body: dict[str, Any], request_id: str) -> Answer:
        """Asks again while the server is only busy, loading or asleep, and a few times when it failed."""
        num_failures = 0
        while True:
            answer = await call(self._api, url, body, tenant=self._tenant, request_id=request_id)
            if answer.status < 500 and answer.status != 429:
                return answer
            if self._context.engine.state.phase == "dead":
                raise EngineDead("the engine has stopped and will not be restarted")
            if answer.status not in (429, 503) or answer.error_code == "engine_dead":
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    return answer
            await asyncio.sleep(answer.retry_after_s)


async def _never_leaves() -> Message:
    await asyncio.Event().wait()
    raise AssertionError("nobody sets that event")
