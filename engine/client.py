"""AsyncEngine: what the server talks to. Text in, text out; the engine process behind it may die and come back.

Owns the prompt encoder, one stream per running request, and the supervisor of the engine process. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine import ipc
from engine.client_adapters import ClientAdapters
from engine.client_admission import Admission
from engine.client_text import TextSide
from engine.config import Config
from engine.control import ControlCalls, Payload
from engine.error_codes import to_exception
from engine.errors import ConfigError, EngineDead, InvalidParameter, KvasirError, NotReady
from engine.faults import Faults
from engine.pooled_stream import PooledStream
from engine.recovery import AnyStream, Recovery
from engine.stream import RequestStream
from engine.submission import context_limit
from engine.supervisor import ENGINE_COMMAND, Supervisor
from engine.text.output_format import OutputFormat, check_names
from engine.types import (
    AdapterInfo,
    ChatPrompt,
    EngineStats,
    GenerationRequest,
    ModelInfo,
    PooledOutput,
    PoolingRequest,
    TextOutput,
)

logger = logging.getLogger(__name__)

EnginePhase = Literal["starting", "loading", "warming", "ready", "draining", "sleeping", "dead"]
STOP_POLL_S = 0.02
RETRY_WHILE_LOADING_S = 2
RETRY_WHILE_ASLEEP_S = 30


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
    on_timing  called with "tokenize" (one prompt) or "detokenize" (one step's tokens), and seconds
    on_constraint  called for every constraint, see `ConstraintCompiler.on_done`
    """

    def __init__(self, config: Config, *, command: Sequence[str] = ENGINE_COMMAND) -> None:
        """command starts the engine process; another one than ours only makes sense in tests."""
        self.config = config
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.on_timing: Callable[[str, float], None] | None = None
        self.on_constraint: Callable[[str, str, float], None] | None = None
        self.state = EngineState()
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.fatal: str | None = None
        self.model_names = config.model.served_model_name or (Path(config.model.model).name,)
        self._faults = Faults.parse(config.runtime.faults)
        self._supervisor = Supervisor(config, self, command)
        self._admission = Admission(config.scheduler)
        self._text_side: TextSide | None = None
        check_names(config.model.tool_call_parser, config.model.reasoning_parser)
        self._streams: dict[str, AnyStream] = {}
        self._recovery = Recovery(self._send)
        self._controls = ControlCalls(self._supervisor.send)
        self._adapters = ClientAdapters(self._controls.call, self.model_names)
        self._num_open = 0  # requests between the first and the last moment of `generate`
        self._is_loaded = False
        self._is_stopping = False
        self._decided = asyncio.Event()  # ready, or dead
        self._tasks: list[asyncio.Task[None]] = []
        self._restoring: asyncio.Task[None] | None = None  # what the last engine process had, into the present one

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
        tasks = self._tasks if self._restoring is None else [*self._tasks, self._restoring]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._text_side is not None:
            await self._text_side.close()

    async def sleep(self, *, is_patient: bool, timeout_s: float) -> None:
        """Ends the engine process, which gives back weights and cache. Requests are refused until `wake_up`.

        is_patient   running requests may finish, for at most timeout_s; else they end at once with an error
        """
        self._info()
        self._set_state(EngineState("sleeping", "an operator sent the engine to sleep"))
        end = time.monotonic() + (timeout_s if is_patient else 0.0)
        while self._num_open and time.monotonic() < end:
            await asyncio.sleep(STOP_POLL_S)
        for stream in list(self._streams.values()):
            stream.fail(to_exception("aborted", "the engine was sent to sleep while the request was running"))
        await self._supervisor.pause()

    async def wake_up(self) -> None:
        """Starts the engine process again and waits until it is ready. Without effect on one that is awake."""
        if self.state.phase == "sleeping":
            self._set_state(EngineState("starting", "the engine process starts"))
            self._supervisor.resume()
        await self.wait_ready()

    @property
    def num_restarts(self) -> int:
        """Starts of the engine process after the first."""
        return max(self._supervisor.num_starts - 1 - self._supervisor.num_resumes, 0)

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
        stream = await self.open(request)
        try:
            while (output := await stream.next()) is not None:
                yield output
        finally:
            stream.close()

    async def open(self, request: GenerationRequest, notify: Callable[[], None] | None = None) -> RequestStream:
        """Starts a request. Its outputs are to be taken from the stream, which must be closed in the end.

        notify   called whenever there is something to take: the way of few costs per token
        Raises like `generate`; taking raises what comes later.
        """
        self._info()
        self._num_open += 1
        try:
            return await self._submit(request, notify)
        except BaseException:
            self._num_open -= 1
            raise

    def _closed(self, stream: RequestStream) -> None:
        """The end of a stream that `open` gave."""
        self._streams.pop(stream.request.request_id, None)
        self._num_open -= 1
        self._recovery.noticed(stream)

    async def pool(self, request: PoolingRequest) -> PooledOutput:
        """The embedding or scores of one prompt. Raises like `generate`; cancelling aborts the request."""
        with self._opened():
            with _internal_errors():
                prepared = await self._text().prepare_pooling(request, self._info(), self._adapters.key_of)
            info = self._info()
            self._admission.check_queue(len(prepared.prompt_token_ids), info.kv_cache_tokens)
            stream = PooledStream(prepared, self._abort)
            self._send(stream)
            self._streams[prepared.request_id] = stream
            try:
                return await stream.result()
            finally:
                stream.close()
                self._streams.pop(prepared.request_id, None)
                self._recovery.noticed(stream)

    async def render(self, prompt: ChatPrompt) -> str:
        """The text that the chat template makes of messages. Raises TemplateError, InvalidParameter, NotReady."""
        with _internal_errors():
            return await self._text().encoder.render(prompt)

    async def tokenize(
        self, prompt: str | list[int] | ChatPrompt, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> list[int]:
        """Token ids of a prompt, exactly as `generate` would see them. Raises like `generate`."""
        with _internal_errors():
            return await self._text().encoder.encode(
                prompt,
                max_tokens=context_limit(self._info()),
                add_special_tokens=add_special_tokens,
                param=param,
            )

    async def infill(
        self, prefix: str | list[int], suffix: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> tuple[list[int], tuple[int, ...]]:
        """Token ids of a prompt for the text between two parts, and of the tokens that end it.

        Raises UnsupportedParameter for a model that cannot fill in, and otherwise like `generate`.
        """
        with _internal_errors():
            return await self._text().encoder.infill(
                prefix,
                suffix,
                max_tokens=context_limit(self._info()),
                add_special_tokens=add_special_tokens,
                param=param,
            )

    async def detokenize(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens included. Raises InvalidParameter for ids outside the vocabulary."""
        with _internal_errors():
            return await self._text().encoder.decode(token_ids)

    def token_text(self, token_id: int) -> str:
        """One token for display."""
        return self._text().tokenizer.token_text(token_id)

    @property
    def output_format(self) -> OutputFormat:
        """How the model writes thinking and calls. Raises NotReady."""
        return self._text().output_format

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """The loaded low-rank adapters by the name that requests give."""
        return self._adapters.loaded

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        """Loads an adapter below the configured root. Raises Conflict, RequestError, NotReady and EngineError."""
        self._info()
        return await self._adapters.load(name, path, in_place=in_place)

    async def unload_adapter(self, name: str) -> None:
        """New requests no longer find it; those that run finish. Raises ModelNotFound, NotReady and EngineError."""
        self._info()
        await self._adapters.unload(name)

    async def control(self, name: str, payload: Payload | None = None, *, timeout_s: float = 60.0) -> Payload:
        """Has the engine do what its table of actions (`EngineCore.controls`) offers under `name`, between two steps.

        Raises what the action raises, NotReady, EngineDead when the engine ends meanwhile, EngineError after timeout_s.
        """
        self._info()
        return await self._controls.call(name, payload or {}, timeout_s)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        """Counts the request while it is open. Raises NotReady and EngineDead."""
        self._info()
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    async def _submit(self, given: GenerationRequest, notify: Callable[[], None] | None) -> RequestStream:
        with _internal_errors():
            request = await self._text().prepare(given, self._info(), self._adapters.key_of, self._tell_tokenize_s)
        info = self._info()  # again: the engine may have ended while the prompt was being encoded
        self._admission.check_queue(len(request.prompt_token_ids), info.kv_cache_tokens)
        stream = RequestStream(
            self._text().tokenizer,
            given,
            request,
            eos_token_ids=frozenset(info.eos_token_ids),
            faults=self._faults,
            abort=self._abort,
            notify=notify,
            closed=self._closed,
            **self.output_format.parser_options(given, request.prompt_token_ids),
        )
        try:
            self._send(stream)
        except ipc.ENCODE_ERRORS:
            raise InvalidParameter("the request holds text or numbers that cannot be passed on") from None
        self._streams[request.request_id] = stream
        return stream

    def _send(self, stream: AnyStream) -> None:
        self._supervisor.send(ipc.AddRequest(stream.to_send()))
        self._admission.sent(stream.request.num_choices, len(stream.request.prompt_token_ids))
        for choice in stream.done_choices:  # after a restart
            self._abort(stream.request.request_id, choice)

    def _abort(self, request_id: str, choice: int | None) -> None:
        self._supervisor.send(ipc.Abort(request_id, choice))

    def _text(self) -> TextSide:
        if self._text_side is None:
            raise self._not_ready()
        return self._text_side

    def _info(self) -> ModelInfo:
        if not self.state.is_ready or self.info is None:
            raise self._not_ready()
        return self.info

    def _not_ready(self) -> KvasirError:
        if self.state.phase == "dead":
            return EngineDead(f"the engine cannot be started: {self.fatal}")
        if self.state.phase == "sleeping":
            return NotReady(
                "the engine sleeps; POST /wake_up wakes it", retry_after_s=RETRY_WHILE_ASLEEP_S, code="sleeping"
            )
        if self.state.phase == "draining":
            return NotReady("the server is shutting down", retry_after_s=RETRY_WHILE_LOADING_S, code="draining")
        return NotReady(
            f"the model is not ready: {self.state.detail}; retry later", retry_after_s=RETRY_WHILE_LOADING_S
        )

    async def _load_text(self) -> None:
        """Tokenizer and template, while the engine process loads the weights."""
        try:
            self._text_side = await TextSide.load(self.config, self._faults, self._tell_constraint)
        except ConfigError as error:
            self.engine_failed(str(error))
            await self._supervisor.stop()
            return
        self._become_ready()

    async def _restore(self, info: ModelInfo) -> None:
        """Gives a new engine process the adapters of the one before it; then requests may come."""
        try:
            await self._adapters.engine_started(info.adapters)
        except EngineDead:
            return  # this process is gone too; the next one brings us here again
        self._is_loaded = True
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
        self._restoring = asyncio.create_task(self._fail_on_error(self._restore(ready.info)))

    def engine_message(self, message: ipc.Outputs | ipc.Rejected | ipc.ControlReply) -> None:
        if isinstance(message, ipc.Outputs):
            self._take_outputs(message)
            return
        if isinstance(message, ipc.ControlReply):
            self._controls.take(message)
            return
        stream = self._streams.get(message.request_id)
        if stream is not None:
            error = to_exception(
                message.code, message.message, retry_after_s=message.retry_after_s, param=message.param
            )
            stream.fail(error)

    def engine_lost(self) -> None:
        self._is_loaded = False
        if self._restoring is not None:
            self._restoring.cancel()
        self._admission.reset()
        if self.state.phase != "sleeping":
            self._set_state(EngineState("starting", "the engine process ended and is being restarted"))
        self._controls.lost()
        self._recovery.lost(list(self._streams.values()))

    def engine_failed(self, message: str) -> None:
        self.fatal = message
        self._set_state(EngineState("dead", message))
        for stream in list(self._streams.values()):
            stream.fail(EngineDead(f"the engine ended and could not be restarted: {message}"))

    def _become_ready(self) -> None:
        if not self._is_loaded or self._text_side is None:
            return
        self._set_state(EngineState("ready"))
        self._recovery.ready(list(self._streams.values()))  # in order of arrival

    def _take_outputs(self, message: ipc.Outputs) -> None:
        if message.stats is not None:
            self.stats = message.stats
            self._admission.report(message.stats, message.num_received)
            self._tell_stats(message.stats)
        for request_id in message.started:
            if (waiting := self._streams.get(request_id)) is not None:
                waiting.is_started = True
        began_s = time.perf_counter()
        for output in message.outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                if not stream.has_output:
                    self._admission.started()
                stream.push(output)
                self._recovery.noticed(stream)
        if message.outputs:
            self._tell_time("detokenize", time.perf_counter() - began_s)

    def _tell_time(self, work: str, seconds: float) -> None:
        if self.on_timing is not None:
            self.on_timing(work, seconds)

    def _tell_tokenize_s(self, seconds: float) -> None:
        self._tell_time("tokenize", seconds)

    def _tell_constraint(self, kind: str, outcome: str, seconds: float) -> None:
        if self.on_constraint is not None:
            self.on_constraint(kind, outcome, seconds)

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
