"""Renders chat templates in child processes that are killed when they run too long.

A small pool, so that one slow render does not hold up everybody else; children start when first needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from engine import ipc
from engine.children import Worker
from engine.errors import ConfigError, InvalidParameter, RequestError, TemplateError
from engine.text.rendered import RenderedText
from engine.text.template_worker import Failed, Render, Rendered, Setup
from engine.types import ChatPrompt

ERRORS: dict[str, type[RequestError]] = {"TemplateError": TemplateError, "InvalidParameter": InvalidParameter}

_Worker = Worker[Rendered | Failed]


class TemplateProcess:
    """A pool of at most `num_workers` children for one template."""

    def __init__(
        self,
        source: str,
        named_tokens: Mapping[str, str],
        control_tokens: Iterable[str],
        *,
        timeout_s: float,
        max_chars: int,
        num_workers: int = 2,
    ) -> None:
        """timeout_s bounds one render, max_chars its output."""
        self._setup = Setup(source, dict(named_tokens), list(control_tokens))
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._free = asyncio.Semaphore(num_workers)
        self._idle: list[_Worker] = []
        self._running: set[asyncio.Task[RenderedText]] = set()

    async def start(self) -> None:
        """Starts the first child and compiles the template. Raises ConfigError when the template is invalid."""
        self._idle.append(await _start(self._setup))

    async def render(self, prompt: ChatPrompt) -> RenderedText:
        """The prompt's text. Raises TemplateError or InvalidParameter."""
        try:
            frame = ipc.encode(Render(prompt, self._max_chars))
        except ipc.ENCODE_ERRORS:
            message = "the messages hold lone surrogates, integers beyond 64 bits or too deep nesting"
            raise InvalidParameter(message, param="messages") from None
        # A caller that goes away must not leave a half-read answer behind: the exchange finishes on its own.
        task = asyncio.create_task(self._exchange(frame))
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Ends the children; renders in progress fail."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        while self._idle:
            await self._idle.pop().kill()

    def _finished(self, task: asyncio.Task[RenderedText]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even when the caller has left

    async def _exchange(self, frame: bytes) -> RenderedText:
        async with self._free:
            worker = self._idle.pop() if self._idle else await _start(self._setup)
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await worker.ask(frame)
            except TimeoutError:
                await worker.kill()
                message = f"the chat template did not finish within {self._timeout_s:g} s"
                raise TemplateError(message, param="messages") from None
            except (OSError, ipc.ProtocolError):
                await worker.kill()
                message = "rendering the chat template needed too much memory or ended its process"
                raise TemplateError(message, param="messages") from None
            except BaseException:
                await worker.kill()
                raise
            self._idle.append(worker)
        if isinstance(answer, Failed):
            raise ERRORS[answer.kind](answer.message, param=answer.param)
        return answer.rendered


async def _start(setup: Setup) -> _Worker:
    worker: _Worker
    worker, answer = await Worker.start("engine.text.template_worker", setup, Rendered | Failed)
    if isinstance(answer, Failed):
        await worker.kill()
        raise ConfigError(answer.message)
    return worker
