"""FakeEngine: the twin of `engine.client.AsyncEngine` for tests of the server. Scripted pieces, delays and errors.

Tokens are UTF-8 bytes on the way in, and scripted pieces of text on the way out, one token each.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from engine.errors import InvalidParameter, KvasirError, PromptTooLong
from engine.types import ChatPrompt, EngineStats, FinishReason, GenerationRequest, LogprobEntry, ModelInfo, TextOutput

PIECES = ("Hel", "lo", " wor", "ld", ", ", "caf", "\u00e9", "!")
VOCAB_SIZE = 258
EOS_ID = 257
FIRST_OUTPUT_ID = 100  # piece i is token 100 + i % 100


@dataclass
class FakeState:
    phase: str = "ready"
    detail: str = ""

    @property
    def is_ready(self) -> bool:
        return self.phase == "ready"


class FakeEngine:
    """Every choice is the scripted pieces, cut at max_tokens and at stop strings.

    error          raised after `error_after` outputs; 0 is before the first
    delay_s        before each output
    eos            end with the end-of-sequence token, which has no text
    hold           when set to an Event, the first output waits for it
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
        max_model_len: int = 256,
        generation_defaults: Mapping[str, object] | None = None,
        model_names: tuple[str, ...] = ("fake", "org/alias"),
    ) -> None:
        self.pieces = list(pieces)
        self.state = FakeState(phase)
        self.delay_s = delay_s
        self.eos = eos
        self.error = error
        self.error_after = error_after
        self.hold: asyncio.Event | None = None
        self.model_names = model_names
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.stats = EngineStats()
        self.num_restarts = 0
        self.heartbeat_age_s = 0.1
        self.seen: list[GenerationRequest] = []
        self.aborted: list[GenerationRequest] = []
        self.num_active = 0
        self.num_yielded = 0
        self.is_started = False
        self.is_stopped = False
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

    async def detokenize(self, token_ids: list[int]) -> str:
        return "".join("<s>" if token_id >= 256 else chr(token_id) for token_id in token_ids)

    def token_text(self, token_id: int) -> str:
        return "<s>" if token_id >= 256 else chr(token_id)

    async def render(self, prompt: ChatPrompt) -> str:
        lines = [f"{message['role']}: {message.get('content')}" for message in prompt.messages]
        return "\n".join([*lines, "assistant:"] if prompt.add_generation_prompt else lines)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TextOutput]:
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

    async def _outputs(self, request: GenerationRequest) -> AsyncIterator[TextOutput]:
        prompt_ids = await self._prompt_ids(request)
        if self.error is not None and self.error_after == 0:
            raise self.error
        if self.hold is not None:
            await self.hold.wait()
        num_cached = self._look_up(request, prompt_ids)
        pieces, finish_reason, stop_reason = self._script(request)
        for step in range(max(len(pieces), 1)):
            for choice in range(request.num_choices):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.error is not None and self.num_yielded >= self.error_after:
                    raise self.error
                self.num_yielded += 1
                piece = pieces[step] if pieces else ""
                is_last = step >= len(pieces) - 1
                is_eos = self.eos and is_last and finish_reason == "stop"
                token_id = EOS_ID if is_eos else _piece_id(step)
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
                    prompt_token_ids=prompt_ids if step == 0 else None,
                    prompt_logprobs=_prompt_logprobs(request, prompt_ids) if step == 0 and choice == 0 else None,
                    queued_s=0.0 if step == 0 else None,
                )

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
