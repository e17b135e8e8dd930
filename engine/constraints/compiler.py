"""Constraints to grammars in a child process that is killed when one takes too long; with a cache in front.

One at a time: compiling is the only work that a client can make expensive with a small request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from engine import ipc
from engine.children import Worker
from engine.config import Limits
from engine.constraints.cache import LRUCache
from engine.constraints.limits import ConstraintLimits, check_size
from engine.constraints.worker import Compile, Compiled, Failed, Setup
from engine.errors import ConfigError, InvalidParameter, QueueFull, RequestError, SchemaTooComplex, UnsupportedParameter
from engine.types import Constraint

MODULE = "engine.constraints.worker"
START_DELAY_S = 1.0
MAX_CACHED = 256
MAX_CACHED_BYTES = 128 * 1024 * 1024
ERRORS: dict[str, type[RequestError]] = {kind.code: kind for kind in (InvalidParameter, SchemaTooComplex)}

_Worker = Worker[Compiled | Failed]


class ConstraintCompiler:
    """The compiler of one vocabulary.

    on_done   called with kind, outcome and seconds for every constraint. Outcomes: cached, compiled, or the code of the
              error. The seconds are those of compiling
    """

    def __init__(self, definition: dict[str, Any], eos_token_ids: Sequence[int], limits: Limits) -> None:
        """definition: parsed tokenizer.json."""
        self._limits = limits
        self._bounds = ConstraintLimits.of(limits)
        self._setup = Setup(
            definition,
            list(eos_token_ids),
            self._bounds,
            max_memory_bytes=limits.constraint_memory_mib * 1024 * 1024,
            max_cpu_s=limits.constraint_cpu_s,
        )
        self._cache: LRUCache[str] = LRUCache(MAX_CACHED, MAX_CACHED_BYTES)
        self._turn = asyncio.Lock()
        self._worker: asyncio.Task[_Worker] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._running: dict[Hashable, asyncio.Task[str]] = {}
        self.on_done: Callable[[str, str, float], None] = lambda kind, outcome, seconds: None

    def start_soon(self) -> None:
        """Starts the child a little later: early enough for most first constraints, and out of the way of loading."""
        self._timer = asyncio.get_running_loop().call_later(START_DELAY_S, self._start)

    def _start(self) -> None:
        if self._worker is None:
            self._worker = asyncio.create_task(_start(self._setup))

    async def compile(self, constraint: Constraint) -> str:
        """The grammar of a constraint.

        Raises InvalidParameter, SchemaTooComplex, QueueFull, and UnsupportedParameter when the vocabulary does not
        allow constraints. All but QueueFull name `constraint.param`.
        """
        key = (constraint.kind, constraint.value, constraint.whitespace)
        if (grammar := self._cache.get(key)) is not None:
            self.on_done(constraint.kind, "cached", 0.0)
            return grammar
        try:
            return await self._compile_new(constraint, key)
        except (RequestError, QueueFull) as error:
            self.on_done(constraint.kind, error.code, 0.0)
            raise

    async def close(self) -> None:
        """Ends the child; compilations in progress fail."""
        if self._timer is not None:
            self._timer.cancel()
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._worker is not None:
            await self._discard()

    async def _compile_new(self, constraint: Constraint, key: Hashable) -> str:
        check_size(constraint, self._bounds)
        if (task := self._running.get(key)) is not None:
            return await asyncio.shield(task)
        if len(self._running) >= self._limits.max_queued_constraints:
            raise QueueFull(f"{len(self._running)} constraints wait to be compiled, which is the limit; retry later")
        # A caller that goes away must not leave a half-read answer behind: the exchange finishes on its own.
        task = self._running[key] = asyncio.create_task(self._compile(constraint))
        task.add_done_callback(lambda task: self._finished(key, task))
        return await asyncio.shield(task)

    def _finished(self, key: Hashable, task: asyncio.Task[str]) -> None:
        del self._running[key]
        if not task.cancelled() and task.exception() is None:  # seen now, even when the caller has left
            self._cache.put(key, task.result(), len(task.result()))

    async def _compile(self, constraint: Constraint) -> str:
        async with self._turn:
            answer = await self._exchange(constraint)
        if isinstance(answer, Compiled):
            self.on_done(constraint.kind, "compiled", answer.seconds)
            return answer.grammar
        raise ERRORS[answer.code](answer.message, param=constraint.param)

    async def _exchange(self, constraint: Constraint) -> Compiled | Failed:
        worker = await self._ready_worker(constraint)
        try:
            frame = ipc.encode(Compile(constraint))
        except ipc.ENCODE_ERRORS:
            return Failed(InvalidParameter.code, "the constraint holds text that is not valid Unicode")
        try:
            async with asyncio.timeout(self._limits.constraint_timeout_s):
                return await worker.ask(frame)
        except TimeoutError:
            problem = f"compiling the constraint did not finish within {self._limits.constraint_timeout_s:g} s"
        except (OSError, ipc.ProtocolError):
            problem = "compiling the constraint needed too much time or memory"
        except BaseException:
            await self._discard()
            raise
        await self._discard()
        self._start()
        return Failed(SchemaTooComplex.code, f"{problem}; simplify it")

    async def _ready_worker(self, constraint: Constraint) -> _Worker:
        self._start()
        assert self._worker is not None
        try:
            return await asyncio.shield(self._worker)
        except ConfigError as error:
            raise UnsupportedParameter(str(error), param=constraint.param) from None

    async def _discard(self) -> None:
        starting, self._worker = self._worker, None
        if starting is None:
            return
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        if not starting.cancelled() and starting.exception() is None:
            await starting.result().kill()


async def _start(setup: Setup) -> _Worker:
    worker: _Worker
    worker, answer = await Worker.start(MODULE, setup, Compiled | Failed)
    if isinstance(answer, Failed):
        await worker.kill()
        raise ConfigError(answer.message)
    return worker
