"""The client's side of one running request: token outputs in, text outputs out; nobody ever waits for the reader.

Text that the reader has not taken is merged per choice, so a slow reader costs one pending piece and not a queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from engine.error_codes import to_exception
from engine.errors import EngineDead, KvasirError
from engine.faults import Faults
from engine.text.detokenizer import Delta, Detokenizer
from engine.text.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    FinishReason,
    GenerationRequest,
    LogprobEntry,
    TextOutput,
    TokenLogprob,
    TokenOutput,
)

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pending:
    """Output of one choice that the reader has not taken."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[LogprobEntry | None] | None = None
    queued_s: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class _Choice:
    detokenizer: Detokenizer
    token_ids: list[int] = field(default_factory=list)  # all that count so far
    num_replayed: int = 0  # those of them that the present engine process has produced
    is_done: bool = False
    is_announced: bool = False  # its first piece, with the prompt's ids, has been taken


class RequestStream:
    """All choices of one request.

    When the engine process dies, `restart` lets the next one produce the same tokens again: they depend on nothing but
    prompt, parameters and seed. Those that were seen before are compared and dropped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        given: GenerationRequest,
        request: EngineRequest,
        *,
        eos_token_ids: frozenset[int],
        faults: Faults,
        abort: Callable[[str, int | None], None],
    ) -> None:
        """abort(request_id, choice) tells the core that nobody wants a choice, or any of them, any more."""
        self.given = given
        self.request = request
        self._created_s = time.monotonic()
        self.num_restarts = 0
        self.has_progressed = False  # beyond what was known at the last restart
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset() if request.sampling.ignore_eos else eos_token_ids
        self._faults = faults
        self._abort = abort
        self._choices = [_Choice(self._new_detokenizer()) for _ in range(request.num_choices)]
        self._pending: dict[int, _Pending] = {}
        self._error: KvasirError | None = None
        self._wake = asyncio.Event()
        self._num_cached_tokens: int | None = None
        self._has_prompt_logprobs = False

    @property
    def is_done(self) -> bool:
        """No more output will be accepted."""
        return self._error is not None or all(choice.is_done for choice in self._choices)

    @property
    def done_choices(self) -> list[int]:
        return [index for index, choice in enumerate(self._choices) if choice.is_done]

    @property
    def has_output(self) -> bool:
        """The core has begun to answer."""
        return self._num_cached_tokens is not None

    def push(self, output: TokenOutput) -> None:
        """Takes what one step produced. A fault in turning it into text ends this request alone."""
        if self.is_done or self._choices[output.choice].is_done:
            return  # the tail of a choice that a stop string ended here
        try:
            self._push(output)
        except KvasirError as error:
            self.fail(error)
        except Exception:
            logger.exception("request %s: output could not be turned into text", self.request.request_id)
            self.fail(to_exception("internal_error"))

    def to_send(self) -> EngineRequest:
        """The request for the core, with what is left of its time."""
        deadline_s = self.request.deadline_s
        if deadline_s is None:
            return self.request
        left_s = deadline_s - (time.monotonic() - self._created_s)
        return msgspec.structs.replace(self.request, deadline_s=max(left_s, 0.0))

    def restart(self) -> None:
        """The engine process is gone; the next one will get the request from its beginning."""
        self.num_restarts += 1
        self.has_progressed = False
        for choice in self._choices:
            choice.num_replayed = 0

    def fail(self, error: KvasirError) -> None:
        """Ends the request for its reader with an exception, after what is pending. The core is told to drop it."""
        if not self.is_done:
            self._error = error
            self._abort(self.request.request_id, None)
            self._wake.set()

    def close(self) -> None:
        """The reader is gone."""
        if not self.is_done:
            self._error = to_exception("aborted", "the reader left")
            self._abort(self.request.request_id, None)

    async def next(self) -> TextOutput | None:
        """The next piece of any choice, or None after the last. Raises what `fail` was given."""
        while (output := self.take()) is None and not self.is_done:
            self._wake.clear()
            await self._wake.wait()
        return output

    def take(self) -> TextOutput | None:
        """The next piece that is there already, or None. Raises what `fail` was given."""
        if not self._pending:
            if self._error is not None:
                raise self._error
            return None
        index = next(iter(self._pending))
        return self._to_output(index, self._pending.pop(index))

    def _new_detokenizer(self) -> Detokenizer:
        given = self.given
        return Detokenizer(
            self._tokenizer,
            stop=given.stop,
            include_stop=given.include_stop_str_in_output,
            min_tokens=self.request.sampling.min_tokens,
            skip_special_tokens=given.skip_special_tokens,
            spaces_between_special_tokens=given.spaces_between_special_tokens,
        )

    def _push(self, output: TokenOutput) -> None:
        choice = self._choices[output.choice]
        self._faults.check("detok", label=self.given.client_request_id)
        if output.finish_reason in ("error", "abort"):
            raise to_exception(output.error or "internal_error")
        output = _skip_replayed(choice, output)
        if output.num_cached_tokens is not None and self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        if not output.token_ids and output.finish_reason is None:
            return
        delta, finish_reason, stop_reason = self._to_text(choice, output)
        choice.token_ids += output.token_ids[: delta.num_tokens]
        choice.num_replayed = len(choice.token_ids)
        self.has_progressed = True
        self._store(output, delta, finish_reason, stop_reason)
        if finish_reason is not None:
            choice.is_done = True
            if output.finish_reason is None:
                self._abort(self.request.request_id, output.choice)
        self._wake.set()

    def _to_text(self, choice: _Choice, output: TokenOutput) -> tuple[Delta, FinishReason | None, str | int | None]:
        """What to show, how many of the tokens count, and why the choice ends, if it does."""
        token_ids = output.token_ids
        # the token that ends a stream is not part of its text, unless the user wants to see what stopped it
        hides_last = output.stop_token_id is not None and not self.given.include_stop_str_in_output
        delta = choice.detokenizer.push(token_ids[:-1] if hides_last else token_ids)
        if delta.stop is not None:
            return delta, "stop", delta.stop
        if output.finish_reason is None:
            return delta, None, None
        rest = choice.detokenizer.finish()
        text = delta.text + rest.text
        if rest.stop is not None:
            return Delta(text, len(token_ids), rest.stop), "stop", rest.stop
        stop_reason = None if output.stop_token_id in self._eos_token_ids else output.stop_token_id
        return Delta(text, len(token_ids)), output.finish_reason, stop_reason

    def _store(
        self, output: TokenOutput, delta: Delta, finish_reason: FinishReason | None, stop_reason: str | int | None
    ) -> None:
        pending = self._pending.setdefault(output.choice, _Pending())
        pending.texts.append(delta.text)
        pending.token_ids += output.token_ids[: delta.num_tokens]
        if output.logprobs is not None:
            entries = [self._logprob_entry(item) for item in output.logprobs[: delta.num_tokens]]
            pending.logprobs = (pending.logprobs or []) + entries
        if output.prompt_logprobs is not None and not self._has_prompt_logprobs:
            self._has_prompt_logprobs = True
            pending.prompt_logprobs = [
                None if item is None else self._logprob_entry(item) for item in output.prompt_logprobs
            ]
        if output.queued_s is not None:
            pending.queued_s = output.queued_s
        pending.finish_reason = finish_reason
        pending.stop_reason = stop_reason
        pending.num_preemptions = output.num_preemptions

    def _logprob_entry(self, item: TokenLogprob) -> LogprobEntry:
        text_of, bytes_of = self._tokenizer.token_text, self._tokenizer.token_bytes
        return LogprobEntry(
            token_id=item.token_id,
            token=text_of(item.token_id),
            data=bytes_of(item.token_id),
            logprob=item.logprob,
            rank=item.rank,
            top=[
                (token_id, text_of(token_id), bytes_of(token_id), logprob)
                for token_id, logprob in zip(item.top_ids, item.top_logprobs, strict=True)
            ],
        )

    def _to_output(self, index: int, pending: _Pending) -> TextOutput:
        choice = self._choices[index]
        is_first, choice.is_announced = not choice.is_announced, True
        return TextOutput(
            choice=index,
            text="".join(pending.texts),
            token_ids=pending.token_ids,
            logprobs=pending.logprobs,
            finish_reason=pending.finish_reason,
            stop_reason=pending.stop_reason,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self._num_cached_tokens or 0,
            num_output_tokens=len(choice.token_ids),
            prompt_token_ids=self.request.prompt_token_ids if is_first else None,
            prompt_logprobs=pending.prompt_logprobs,
            queued_s=pending.queued_s,
            num_preemptions=pending.num_preemptions,
        )


def _skip_replayed(choice: _Choice, output: TokenOutput) -> TokenOutput:
    """The part of an output that is new after a restart. Raises EngineDead when the tokens differ from those before."""
    num_known = len(choice.token_ids) - choice.num_replayed
    if not num_known:
        return output
    known = choice.token_ids[choice.num_replayed : choice.num_replayed + len(output.token_ids)]
    if output.token_ids[: len(known)] != known or (output.finish_reason and len(output.token_ids) < num_known):
        raise EngineDead("the engine process ended while the request was running, and its answer could not be resumed")
    choice.num_replayed += len(known)
    logprobs = None if output.logprobs is None else output.logprobs[len(known) :]
    return msgspec.structs.replace(output, token_ids=output.token_ids[len(known) :], logprobs=logprobs)
