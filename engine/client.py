"""AsyncEngine: what the server talks to. Text in, text out; the engine process behind it may die and come back.

Owns the prompt encoder, one stream per running request, and the supervisor of the engine process. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine import ipc
from engine.client_admission import Admission
from engine.config import Config
from engine.error_codes import to_exception
from engine.errors import ConfigError, EngineDead, InvalidParameter, KvasirError, NotReady
from engine.faults import Faults
from engine.launch import resolve_model_path
from engine.prompts import PromptEncoder
from engine.recovery import Recovery
from engine.stream import RequestStream
from engine.submission import build, context_limit, truncate
from engine.supervisor import ENGINE_COMMAND, Supervisor
from engine.text.tokenizer import Tokenizer
from engine.types import ChatPrompt, EngineRequest, EngineStats, GenerationRequest, ModelInfo, TextOutput

logger = logging.getLogger(__name__)

EnginePhase = Literal["starting", "loading", "warming", "ready", "draining", "dead"]
STOP_POLL_S = 0.02
RETRY_WHILE_LOADING_S = 2


@dataclass(frozen=True)
class EngineState:
    """Where the engine is. `detail` is a sentence for operators."""

    phase: EnginePhase = "starting"
    detail: str = ""

    @property
    def is_ready(self) -> bool:
        return self.phase == "ready"


class AsyncEngine:
    """One model, served by one engine process.

    fatal      why the engine will not come back (then `state.phase` is "dead"), or None
    on_stats   called with every report of the core; the lists in it hold what happened since the report before
    """

    def __init__(self, config: Config, *, command: Sequence[str] = ENGINE_COMMAND) -> None:
        """command starts the engine process; another one than ours only makes sense in tests."""
        self.config = config
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.state = EngineState()
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.fatal: str | None = None
        self.model_names = config.model.served_model_name or (Path(config.model.model).name,)
        self._faults = Faults.parse(config.runtime.faults)
        self._supervisor = Supervisor(config, self, command)
        self._admission = Admission(config.scheduler)
        self._encoder: PromptEncoder | None = None
        self._streams: dict[str, RequestStream] = {}
        self._recovery = Recovery(self._send)
        self._num_open = 0  # requests between the first and the last moment of `generate`
        self._is_loaded = False
        self._is_stopping = False
        self._decided = asyncio.Event()  # ready, or dead
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life

    async def start(self) -> None:
        """Starts loading and returns at once; `state` tells how it goes."""
        self._tasks = [
            asyncio.create_task(self._fail_on_error(self._load_text())),
            asyncio.create_task(self._fail_on_error(self._supervisor.run())),
        ]

    async def wait_ready(self) -> None:
        """Raises ConfigError with the reason when the engine will never be ready, NotReady when it is being stopped."""
        while not self.state.is_ready:
            if self.fatal is not None:
                raise ConfigError(self.fatal)
            if self._is_stopping:
                raise self._not_ready()
            self._decided.clear()
            await self._decided.wait()

    async def stop(self, drain_s: float) -> None:
        """Takes no more requests, gives the running ones `drain_s` seconds, ends the rest and the engine process."""
        self._is_stopping = True
        self._decided.set()
        if self.state.phase != "dead":
            self._set_state(EngineState("draining", f"{self._num_open} requests are finishing"))
        end = time.monotonic() + drain_s
        while self._num_open and self.state.phase != "dead" and time.monotonic() < end:
            await asyncio.sleep(STOP_POLL_S)
        for stream in list(self._streams.values()):
            stream.fail(to_exception("draining"))
        await self._supervisor.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._encoder is not None:
            await self._encoder.close()

    @property
    def num_restarts(self) -> int:
        """Starts of the engine process after the first."""
        return max(self._supervisor.num_starts - 1, 0)

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine process last sent anything."""
        return time.monotonic() - self._supervisor.last_heard_s

    # ---- requests

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextOutput, None]:
        """Streams the text of all choices; exactly one output per choice has a finish_reason.

        Raises RequestError and CapacityError before the first output, EngineError at any time. Closing or cancelling
        the iterator aborts the request everywhere, whatever it was doing.
        """
        with self._opened():
            stream = await self._submit(request)
            try:
                while (output := await stream.next()) is not None:
                    yield output
            finally:
                stream.close()
                self._streams.pop(stream.request.request_id, None)
                self._recovery.noticed(stream)

    async def render(self, prompt: ChatPrompt) -> str:
        """The text that the chat template makes of messages. Raises TemplateError, InvalidParameter, NotReady."""
        with _internal_errors():
            return await self._text().render(prompt)

    async def tokenize(
        self, prompt: str | list[int] | ChatPrompt, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of a prompt, exactly as `generate` would see them. Raises like `generate`."""
        with _internal_errors():
            return await self._text().encode(
                prompt,
                max_tokens=context_limit(self._info()),
                add_special_tokens=add_special_tokens,
                param=param,
            )

    async def detokenize(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens included. Raises InvalidParameter for ids outside the vocabulary."""
        with _internal_errors():
            return await self._text().decode(token_ids)

    def token_text(self, token_id: int) -> str:
        """One token for display."""
        return self._text().tokenizer.token_text(token_id)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Counts the request while it is open. Raises NotReady and EngineDead."""
        self._info()
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    async def _submit(self, given: GenerationRequest) -> RequestStream:
        with _internal_errors():
            request = await self._prepare(given)
        info = self._info()  # again: the engine may have ended while the prompt was being encoded
        self._admission.check_queue(len(request.prompt_token_ids), info.kv_cache_tokens)
        stream = RequestStream(
            self._text().tokenizer,
            given,
            request,
            eos_token_ids=frozenset(info.eos_token_ids),
            faults=self._faults,
            abort=self._abort,
        )
        try:
            self._send(stream)
        except ipc.ENCODE_ERRORS:
            raise InvalidParameter("the request holds text or numbers that cannot be passed on") from None
        self._streams[request.request_id] = stream
        return stream

    async def _prepare(self, given: GenerationRequest) -> EngineRequest:
        arrival_s = time.monotonic()
        encoder, info = self._text(), self._info()
        limit = context_limit(info)
        token_ids = await encoder.encode(
            given.prompt,
            max_tokens=limit,
            add_special_tokens=given.add_special_tokens,
            param=given.prompt_param,
            label=given.client_request_id,
        )
        return build(
            given,
            secrets.token_hex(16),
            truncate(token_ids, given, limit),
            await encoder.bad_words(given.bad_words),
            info,
            is_strict=self.config.server.strict_max_tokens,
            limits=self.config.limits,
            elapsed_s=time.monotonic() - arrival_s,
        )

    def _send(self, stream: RequestStream) -> None:
        self._supervisor.send(ipc.AddRequest(stream.to_send()))
        self._admission.sent(stream.request.num_choices, len(stream.request.prompt_token_ids))
        for choice in stream.done_choices:  # after a restart
            self._abort(stream.request.request_id, choice)

    def _abort(self, request_id: str, choice: int | None) -> None:
        self._supervisor.send(ipc.Abort(request_id, choice))

    def _text(self) -> PromptEncoder:
        if self._encoder is None:
            raise self._not_ready()
        return self._encoder

    def _info(self) -> ModelInfo:
        if not self.state.is_ready or self.info is None:
            raise self._not_ready()
        return self.info

    def _not_ready(self) -> KvasirError:
        if self.state.phase == "dead":
            return EngineDead(f"the engine cannot be started: {self.fatal}")
        if self.state.phase == "draining":
            return NotReady("the server is shutting down", retry_after_s=RETRY_WHILE_LOADING_S, code="draining")
        return NotReady(
            f"the model is not ready: {self.state.detail}; retry later", retry_after_s=RETRY_WHILE_LOADING_S
        )

    async def _load_text(self) -> None:
        """Tokenizer and template, while the engine process loads the weights."""
        model = self.config.model
        try:
            folder = Path(model.tokenizer) if model.tokenizer else resolve_model_path(model.model)
            tokenizer = await asyncio.to_thread(Tokenizer.from_folder, folder, model.chat_template)
            encoder = PromptEncoder(tokenizer, self.config.limits, self._faults)
            await encoder.start()
        except ConfigError as error:
            self.engine_failed(str(error))
            await self._supervisor.stop()
            return
        self._encoder = encoder
        self._become_ready()

    async def _fail_on_error(self, work: Coroutine[Any, Any, None]) -> None:
        """Nothing may leave the engine half alive: a bug in the background ends it visibly."""
        try:
            await work
        except Exception as error:
            logger.exception("the engine's front end failed")
            self.engine_failed(f"internal error ({type(error).__name__}); the log has the details")

    # ---- what the supervisor tells

    def engine_starting(self, detail: str) -> None:
        self._set_state(EngineState("starting", detail))

    def engine_progress(self, phase: ipc.Phase) -> None:
        name: EnginePhase = "warming" if phase.phase == "warming" else "loading"
        share = f", {phase.share:.0%} done" if phase.share else ""
        self._set_state(EngineState(name, phase.detail + share))

    def engine_ready(self, ready: ipc.Ready) -> None:
        self.info = ready.info
        self._is_loaded = True
        self._become_ready()

    def engine_message(self, message: ipc.Outputs | ipc.Rejected) -> None:
        if isinstance(message, ipc.Outputs):
            self._take_outputs(message)
            return
        stream = self._streams.get(message.request_id)
        if stream is not None:
            stream.fail(to_exception(message.code, message.message, retry_after_s=message.retry_after_s))

    def engine_lost(self) -> None:
        self._is_loaded = False
        self._admission.reset()
        self._set_state(EngineState("starting", "the engine process ended and is being restarted"))
        self._recovery.lost(list(self._streams.values()))

    def engine_failed(self, message: str) -> None:
        self.fatal = message
        self._set_state(EngineState("dead", message))
        for stream in list(self._streams.values()):
            stream.fail(EngineDead(f"the engine ended and could not be restarted: {message}"))

    def _become_ready(self) -> None:
        if not self._is_loaded or self._encoder is None:
            return
        self._set_state(EngineState("ready"))
        self._recovery.ready(list(self._streams.values()))  # in order of arrival

    def _take_outputs(self, message: ipc.Outputs) -> None:
        if message.stats is not None:
            self.stats = message.stats
            self._admission.report(message.stats, message.num_received)
            self._tell_stats(message.stats)
        for output in message.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                if not stream.has_output:
                    self._admission.started()
                stream.push(output)
                self._recovery.noticed(stream)

    def _tell_stats(self, stats: EngineStats) -> None:
        try:
            if self.on_stats is not None:
                self.on_stats(stats)
        except Exception:  # metrics must not stop the service
            logger.exception("a report of the engine could not be processed")

    def _set_state(self, state: EngineState) -> None:
        if self.state.phase == "dead" or (self._is_stopping and state.phase not in ("draining", "dead")):
            return
        self.state = state
        if state.phase in ("ready", "dead"):
            self._decided.set()


@contextlib.contextmanager
def _internal_errors() -> Iterator[None]:
    """A fault in one request's own work ends that request with our error, and nothing else."""
    try:
        yield
    except (KvasirError, asyncio.CancelledError):
        raise
    except Exception as error:
        logger.exception("a request failed before it reached the engine")
        raise to_exception("internal_error") from error
