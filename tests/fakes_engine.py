"""FakeEngine: the twin of `engine.client.AsyncEngine` for tests of the server. Scripted pieces, delays and errors.

Tokens are UTF-8 bytes on the way in, and scripted pieces of text on the way out, one token each.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from engine.client_adapters import ClientAdapters
from engine.control import Controls, Payload
from engine.errors import EngineError, InvalidParameter, KvasirError, PromptTooLong, UnsupportedParameter
from engine.submission_pooling import build_pooling, require_pooling
from engine.text.output_format import OutputFormat
from engine.text.parsed_output import ParsedOutput
from engine.types import (
    AdapterInfo,
    ChatPrompt,
    EngineStats,
    FinishReason,
    GenerationRequest,
    LogprobEntry,
    ModelInfo,
    PooledOutput,
    PoolingInfo,
    PoolingRequest,
    TextOutput,
    TextPair,
)

PIECES = ("Hel", "lo", " wor", "ld", ", ", "caf", "\u00e9", "!")
VOCAB_SIZE = 258
EOS_ID = 257
FIRST_OUTPUT_ID = 100  # piece i is token 100 + i % 100


class FakeTokenizer:
    """As much of a tokenizer as choosing parsers takes."""

    special_ids = frozenset({256, 257})

    def __init__(self) -> None:
        self.files = SimpleNamespace(chat_template="", definition={"added_tokens": []})

    def token_text(self, token_id: int) -> str:
        return "</s>"

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")


@dataclass
class FakeState:
    phase: str = "ready"
    detail: str = ""

    @property
    def is_ready(self) -> bool:
        return self.phase == "ready"


class FakeStream:
    """What `FakeEngine.open` gives."""

    def __init__(self, outputs: AsyncGenerator[TextOutput, None], notify: Callable[[], None]) -> None:
        self._notify = notify
        self._pending: list[TextOutput] = []
        self._error: Exception | None = None
        self.is_started = False
        self.is_done = False
        self._task = asyncio.create_task(self._pump(outputs))

    @property
    def unsent_bytes(self) -> int:
        return sum(output.size_bytes for output in self._pending)

    def take(self) -> TextOutput | None:
        if not self._pending:
            if self._error is not None:
                raise self._error
            return None
        choice = self._pending[0].choice
        same = [output for output in self._pending if output.choice == choice]
        self._pending = [output for output in self._pending if output.choice != choice]
        return TextOutput.join(same)

    def close(self) -> None:
        if not self.is_done:
            self.is_done = True
            self._error = EngineError("the reader left")
            self._task.cancel()

    async def _pump(self, outputs: AsyncGenerator[TextOutput, None]) -> None:
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    self.is_started = True
                    self._pending.append(output)
                    self._notify()
        except Exception as error:
            self._error = error
        finally:
            self.is_done = True
            self._notify()


class FakeEngine:
    """Every choice is the scripted pieces, cut at max_tokens and at stop strings.

    error          raised after `error_after` outputs; 0 is before the first. With `error_once` by one request only
    delay_s        before each output
    eos            end with the end-of-sequence token, which has no text
    hold           when set to an Event, the first output waits for it
    tool_parser, reasoning_parser   what tells calls and thinking from content, where a request asks for it
    """

    def __init__(
        self,
        pieces: Sequence[str] = PIECES,
        *,
        phase: str = "ready",
        delay_s: float = 0.0,
        eos: bool = False,
        error: KvasirError | Exception | None = None,
        error_after: int = 0,
        error_once: bool = False,
        max_model_len: int = 256,
        generation_defaults: Mapping[str, object] | None = None,
        model_names: tuple[str, ...] = ("fake", "org/alias"),
        pooling: PoolingInfo | None = None,
        tool_parser: str = "hermes",
        reasoning_parser: str = "qwen3",
        can_infill: bool = False,
    ) -> None:
        self.can_infill = can_infill
        self.output_format = OutputFormat(FakeTokenizer(), tool_parser, reasoning_parser)  # type: ignore[arg-type]
        self.pieces = list(pieces)
        self.state = FakeState(phase)
        self.delay_s = delay_s
        self.eos = eos
        self.error = error
        self.error_after = error_after
        self.error_once = error_once
        self.hold: asyncio.Event | None = None
        self.model_names = model_names
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.on_timing: Callable[[str, float], None] | None = None
        self.on_constraint: Callable[[str, str, float], None] | None = None
        self.stats = EngineStats()
        self.num_restarts = 0
        self.heartbeat_age_s = 0.1
        self.seen: list[GenerationRequest] = []
        self.pooled: list[PoolingRequest] = []
        self.aborted: list[GenerationRequest] = []
        self.num_active = 0
        self.num_yielded = 0
        self.is_started = False
        self.is_stopped = False
        self.controls = Controls()
        self.controlled: list[tuple[str, Payload]] = []
        self.refused_paths: dict[str, KvasirError] = {}  # what loading an adapter from there raises
        self._adapters = ClientAdapters(self._do_adapter, model_names)
        self._cached: set[tuple[str, str, str]] = set()
        self._info = ModelInfo(
            architecture="Fake",
            dtype="float32",
            device="cpu",
            vocab_size=VOCAB_SIZE,
            logits_size=VOCAB_SIZE,
            max_model_len=max_model_len,
            num_layers=1,
            block_size=16,
            num_blocks=64,
            kv_cache_bytes=64 * 1024,
            weight_bytes=1000,
            eos_token_ids=[EOS_ID],
            generation_defaults=dict(generation_defaults or {}),
            pooling=pooling,
        )

    @property
    def info(self) -> ModelInfo | None:
        return None if self.state.phase in ("starting", "loading", "warming") else self._info

    async def start(self) -> None:
        self.is_started = True

    async def wait_ready(self) -> None:
        while not self.state.is_ready:
            await asyncio.sleep(0.01)

    async def stop(self, drain_s: float) -> None:
        self.is_stopped = True

    async def tokenize(self, prompt: str | ChatPrompt, *, add_special_tokens: bool = True) -> list[int]:
        text = prompt if isinstance(prompt, str) else await self.render(prompt)
        return ([256] if add_special_tokens else []) + list(text.encode())

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        return self._adapters.loaded

    async def load_adapter(self, name: str, path: str, *, in_place: bool = False) -> AdapterInfo:
        return await self._adapters.load(name, path, in_place=in_place)

    async def unload_adapter(self, name: str) -> None:
        await self._adapters.unload(name)

    async def _do_adapter(self, action: str, payload: Payload, timeout_s: float) -> Payload:
        """The engine process's side: the path is the content."""
        if action == "unload_adapter":
            return {}
        name, path = payload["name"], payload["path"]
        if path in self.refused_paths:
            raise self.refused_paths[path]
        key = f"{name}@{path}"
        return {"adapter": {"name": name, "key": key, "path": path, "rank": 8, "num_bytes": 10, "created_s": 7}}

    async def detokenize(self, token_ids: list[int]) -> str:
        return "".join("<s>" if token_id >= 256 else chr(token_id) for token_id in token_ids)

    async def infill(
        self, prefix: str | list[int], suffix: str, *, add_special_tokens: bool = True, param: str = "prompt"
    ) -> tuple[list[int], tuple[int, ...]]:
        """Marks are the bytes 1, 2 and 3, byte 4 ends the middle; with `can_infill` only."""
        if not self.can_infill:
            raise UnsupportedParameter("this model cannot fill in", param="suffix")
        ids = prefix if isinstance(prefix, list) else list(prefix.encode())
        return [1, *ids, 2, *suffix.encode(), 3], (4,)

    def token_text(self, token_id: int) -> str:
        return "<s>" if token_id >= 256 else chr(token_id)

    async def render(self, prompt: ChatPrompt) -> str:
        lines = [f"{message['role']}: {message.get('content')}" for message in prompt.messages]
        return "\n".join([*lines, "assistant:"] if prompt.add_generation_prompt else lines)

    async def open(self, request: GenerationRequest, notify: Callable[[], None]) -> FakeStream:
        return FakeStream(self.generate(request), notify)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TextOutput, None]:
        self.seen.append(request)
        self.num_active += 1
        is_done = False
        try:
            async for output in self._outputs(request):
                yield output
            is_done = True
        except KvasirError:
            is_done = True
            raise
        finally:
            self.num_active -= 1
            if not is_done:
                self.aborted.append(request)

    async def pool(self, request: PoolingRequest) -> PooledOutput:
        """Embeddings: a text's share of each of four ranges of bytes. The one class score: its length."""
        self.pooled.append(request)
        params = require_pooling(request, self._info)
        prompt = request.prompt
        text = f"{prompt.first}|{prompt.second}" if isinstance(prompt, TextPair) else prompt
        ids = text if isinstance(text, list) else await self.tokenize(text)
        keep = request.truncate_prompt_tokens
        ids = ids if keep is None else ids[: self._info.max_model_len if keep == -1 else keep]
        build_pooling(request, "fake", ids, params, self._info)
        self.num_active += 1
        try:
            if self.hold is not None:
                await self.hold.wait()
            await asyncio.sleep(self.delay_s)
            self._check_error()
            self.num_yielded += 1
        finally:
            self.num_active -= 1
        counts = [float(sum(1 for i in ids if i // 64 == part)) for part in range(4)]
        values = [float(len(ids))] if params.task == "classify" else counts[: params.dimensions]
        if params.task != "classify" and params.activate:
            values = [value / math.hypot(*values) for value in values]
        data = struct.pack(f"<{len(values)}f", *values)
        return PooledOutput(data=data, shape=(len(values),), num_prompt_tokens=len(ids))

    async def sleep(self, *, is_patient: bool, timeout_s: float) -> None:
        self.state = FakeState("sleeping")

    async def wake_up(self) -> None:
        self.state = FakeState("ready")

    async def control(self, name: str, payload: Payload | None = None, *, timeout_s: float = 60.0) -> Payload:
        self.controlled.append((name, payload or {}))
        return self.controls.call(name, payload or {})

    async def _outputs(self, request: GenerationRequest) -> AsyncIterator[TextOutput]:
        prompt_ids = await self._prompt_ids(request)
        self._check_error()
        if self.hold is not None:
            await self.hold.wait()
        num_cached = self._look_up(request, prompt_ids)
        pieces, finish_reason, stop_reason = self._script(request)
        parsed = [self._new_parsed(request, prompt_ids) for _ in range(request.num_choices)]
        for step in range(max(len(pieces), 1)):
            for choice in range(request.num_choices):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                self._check_error()
                self.num_yielded += 1
                piece = pieces[step] if pieces else ""
                is_last = step >= len(pieces) - 1
                is_eos = self.eos and is_last and finish_reason == "stop"
                token_id = EOS_ID if is_eos else _piece_id(step)
                parse = parsed[choice]
                if parse is not None:
                    parse.push("" if is_eos else piece, 0)
                    if is_last:
                        parse.finish("")
                yield TextOutput(
                    choice=choice,
                    text="" if is_eos else piece,
                    token_ids=[token_id],
                    logprobs=_logprobs(request, token_id, "</s>" if is_eos else piece, choice),
                    finish_reason=finish_reason if is_last else None,
                    stop_reason=stop_reason if is_last else None,
                    num_prompt_tokens=len(prompt_ids),
                    num_cached_tokens=num_cached,
                    num_output_tokens=step + 1,
                    num_reasoning_tokens=0 if parse is None else parse.num_reasoning_tokens,
                    delta=None if parse is None else parse.take(),
                    prompt_token_ids=prompt_ids if step == 0 else None,
                    prompt_logprobs=_prompt_logprobs(request, prompt_ids) if step == 0 and choice == 0 else None,
                    queued_s=0.0 if step == 0 else None,
                )

    def _new_parsed(self, request: GenerationRequest, prompt_ids: list[int]) -> ParsedOutput | None:
        options = self.output_format.parser_options(request, prompt_ids)
        parser = options["new_parser"]() if options else None
        return None if parser is None else ParsedOutput(parser)

    def _check_error(self) -> None:
        error = self.error
        if error is not None and self.num_yielded >= self.error_after:
            if self.error_once:
                self.error = None
            raise error

    async def _prompt_ids(self, request: GenerationRequest) -> list[int]:
        prompt = request.prompt
        ids = prompt
        if not isinstance(ids, list):
            ids = await self.tokenize(ids, add_special_tokens=request.add_special_tokens)
        if any(token_id >= VOCAB_SIZE for token_id in ids):
            raise InvalidParameter("a token id is outside of the vocabulary", param=request.prompt_param)
        if request.truncate_prompt_tokens is not None and request.truncate_prompt_tokens > 0:
            ids = ids[-request.truncate_prompt_tokens :]
        if len(ids) >= self._info.max_model_len:
            raise PromptTooLong(
                f"the context holds {self._info.max_model_len} tokens; the prompt has {len(ids)} and "
                f"{request.sampling.max_tokens} were asked for",
                param=request.prompt_param,
            )
        return ids

    def _look_up(self, request: GenerationRequest, prompt_ids: list[int]) -> int:
        key = (request.tenant, request.cache_salt, str(prompt_ids))
        if key in self._cached:
            return len(prompt_ids) - 1
        self._cached.add(key)
        return 0

    def _script(self, request: GenerationRequest) -> tuple[list[str], FinishReason, str | None]:
        limit = request.sampling.max_tokens
        pieces = self.pieces if limit <= 0 else self.pieces[:limit]
        text = "".join(pieces)
        hits = [(text.index(stop), stop) for stop in request.stop if stop in text]
        if hits:
            end, stop = min(hits)
            return _cut(pieces, end + len(stop) * request.include_stop_str_in_output), "stop", stop
        return list(pieces), "length" if 0 < limit <= len(self.pieces) else "stop", None


def _logprobs(request: GenerationRequest, token_id: int, token: str, choice: int) -> list[LogprobEntry] | None:
    num_top = request.sampling.logprobs
    if num_top is None:
        return None
    # the later the choice, the likelier: best_of has something to find
    return [_entry(token_id, token, -1.0 / (choice + 1), num_top)]


def _prompt_logprobs(request: GenerationRequest, prompt_ids: list[int]) -> list[LogprobEntry | None] | None:
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return None
    entries = [
        _entry(token_id, "<s>" if token_id >= 256 else chr(token_id), float("-inf"), num_top)
        for token_id in prompt_ids[1:]
    ]
    return [None, *entries]


def _entry(token_id: int, token: str, logprob: float, num_top: int) -> LogprobEntry:
    top = [(200 + rank, f"alt{rank}", f"alt{rank}".encode(), -2.0 - rank) for rank in range(num_top)]
    return LogprobEntry(token_id, token, token.encode(), logprob, 1, top)


def _piece_id(step: int) -> int:
    return FIRST_OUTPUT_ID + step % 100


def _cut(pieces: Sequence[str], num_chars: int) -> list[str]:
    kept: list[str] = []
    for piece in pieces:
        kept.append(piece[: max(num_chars, 0)])
        num_chars -= len(piece)
        if num_chars <= 0:
            break
    return kept
