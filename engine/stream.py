"""The client's side of one running request: token outputs in, text outputs out; nobody ever waits for the reader.

What the reader has not taken is merged per choice when it comes. This is the front end's path of every token: what it
does per token is kept to a few dictionary look-ups.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from engine.error_codes import to_exception
from engine.errors import EngineDead, KvasirError
from engine.faults import Faults
from engine.submission import with_time_left
from engine.text.detokenizer import Decoded, Detokenizer
from engine.text.parsed_output import ParsedOutput
from engine.text.parsers import OutputParser
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
class _Choice:
    detokenizer: Detokenizer
    parsed: ParsedOutput | None = None  # None: all text is content
    token_ids: list[int] = field(default_factory=list)  # all that count so far
    num_replayed: int = 0  # those of them that the present engine process has produced
    is_done: bool = False
    is_announced: bool = False  # its first piece, with the prompt's ids, is on its way


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
        notify: Callable[[], None] | None = None,
        closed: Callable[[RequestStream], None] | None = None,
        new_parser: Callable[[], OutputParser | None] = lambda: None,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        """
        abort    abort(request_id, choice) tells the core that nobody wants a choice, or any of them, any more
        notify   called whenever there is something to `take`, or nothing more will come; default: wakes `next`
        closed   called once, when the reader is done with the stream
        new_parser, kept_ids   what tells thinking and calls from content, and the special tokens that it has to see
        """
        self.given = given
        self.request = request
        self._created_s = time.monotonic()
        self.num_restarts = 0
        self.is_started = False  # the engine has begun to compute it
        self.has_progressed = False  # beyond what was known at the last restart
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset() if request.sampling.ignore_eos else eos_token_ids
        self._faults = faults
        self._abort = abort
        self._kept_ids = kept_ids
        self._choices = [self._new_choice(new_parser()) for _ in range(request.num_choices)]
        self._num_unfinished = request.num_choices
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._pending: dict[int, list[TextOutput]] = {}  # by choice
        self.unsent_bytes = 0  # about what the pending pieces will take on the wire
        self._error: KvasirError | None = None
        self._wake = asyncio.Event()
        self._notify = notify or self._wake.set
        self._closed = closed
        self._num_cached_tokens: int | None = None
        self._has_prompt_logprobs = False

    @property
    def is_done(self) -> bool:
        """No more output will be accepted."""
        return self._error is not None or not self._num_unfinished

    @property
    def done_choices(self) -> list[int]:
        return [index for index, choice in enumerate(self._choices) if choice.is_done]

    @property
    def has_output(self) -> bool:
        """The core has begun to answer."""
        return self._num_cached_tokens is not None

    def push(self, output: TokenOutput) -> None:
        """Takes what one step produced. A fault in turning it into text ends this request alone."""
        choice = self._choices[output.choice]
        if choice.is_done or self._error is not None:
            return  # the tail of a choice that a stop string ended here
        try:
            self._push(choice, output)
        except KvasirError as error:
            self.fail(error)
        except Exception:
            logger.exception("request %s: output could not be turned into text", self.request.request_id)
            self.fail(to_exception("internal_error"))

    def to_send(self) -> EngineRequest:
        """The request for the core, with what is left of its time."""
        return with_time_left(self.request, self._created_s)

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
            self._notify()

    def close(self) -> None:
        """The reader is gone: aborts what still runs. What is pending can be taken nevertheless."""
        if not self.is_done:
            self._error = to_exception("aborted", "the reader left")
            self._abort(self.request.request_id, None)
        closed, self._closed = self._closed, None
        if closed is not None:
            closed(self)

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
        outputs = self._pending.pop(index)
        if not self._pending:
            self.unsent_bytes = 0
        return outputs[0] if len(outputs) == 1 else TextOutput.join(outputs)

    def _new_choice(self, parser: OutputParser | None) -> _Choice:
        return _Choice(self._new_detokenizer(), None if parser is None else ParsedOutput(parser))

    def _new_detokenizer(self) -> Detokenizer:
        given = self.given
        return Detokenizer(
            self._tokenizer,
            stop=given.stop,
            include_stop=given.include_stop_str_in_output,
            min_tokens=self.request.sampling.min_tokens,
            skip_special_tokens=given.skip_special_tokens,
            spaces_between_special_tokens=given.spaces_between_special_tokens,
            kept_ids=self._kept_ids,
        )

    def _push(self, choice: _Choice, output: TokenOutput) -> None:
        self._faults.check("detok", label=self.given.client_request_id)
        if output.finish_reason in ("error", "abort"):
            raise to_exception(output.error or "internal_error")
        if choice.num_replayed < len(choice.token_ids):
            output = _skip_replayed(choice, output)
        if output.num_cached_tokens is not None and self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        if not output.token_ids and output.finish_reason is None:
            return
        decoded, finish_reason, stop_reason = self._to_text(choice, output)
        choice.token_ids += output.token_ids[: decoded.num_tokens]
        choice.num_replayed = len(choice.token_ids)
        self.has_progressed = True
        self._store(choice, output, decoded, finish_reason, stop_reason)
        if finish_reason is not None:
            choice.is_done = True
            self._num_unfinished -= 1
            if output.finish_reason is None:
                self._abort(self.request.request_id, output.choice)
        self._notify()

    def _to_text(self, choice: _Choice, output: TokenOutput) -> tuple[Decoded, FinishReason | None, str | int | None]:
        """What to show, how many of the tokens count, and why the choice ends, if it does."""
        token_ids = output.token_ids
        # the token that ends a stream is not part of its text, unless the user wants to see what stopped it
        hides_last = output.stop_token_id is not None and not self.given.include_stop_str_in_output
        decoded = self._decode(choice, token_ids[:-1] if hides_last else token_ids)
        if decoded.stop is not None:
            if choice.parsed is not None:
                choice.parsed.finish("")
            return decoded, "stop", decoded.stop
        if output.finish_reason is None:
            return decoded, None, None
        rest = choice.detokenizer.finish()
        if choice.parsed is not None:
            choice.parsed.finish(rest.text)
        text = decoded.text + rest.text
        if rest.stop is not None:
            return Decoded(text, len(token_ids), rest.stop), "stop", rest.stop
        stop_reason = None if output.stop_token_id in self._eos_token_ids else output.stop_token_id
        return Decoded(text, len(token_ids)), output.finish_reason, stop_reason

    def _decode(self, choice: _Choice, token_ids: Sequence[int]) -> Decoded:
        """The text of tokens, which the parser gets one by one: it tells which of them were thinking."""
        if choice.parsed is None:
            return choice.detokenizer.push(token_ids)
        texts = []
        for count, token_id in enumerate(token_ids, 1):
            decoded = choice.detokenizer.push((token_id,))
            texts.append(decoded.text)
            choice.parsed.push(decoded.text, choice.detokenizer.num_held)
            if decoded.stop is not None:
                return Decoded("".join(texts), count, decoded.stop)
        return Decoded("".join(texts), len(token_ids))

    def _store(
        self,
        choice: _Choice,
        output: TokenOutput,
        decoded: Decoded,
        finish_reason: FinishReason | None,
        stop_reason: str | int | None,
    ) -> None:
        token_ids = output.token_ids[: decoded.num_tokens]
        logprobs = prompt_logprobs = None
        if output.logprobs is not None:
            logprobs = [self._logprob_entry(item) for item in output.logprobs[: decoded.num_tokens]]
        if output.prompt_logprobs is not None and not self._has_prompt_logprobs:
            self._has_prompt_logprobs = True
            prompt_logprobs = [None if item is None else self._logprob_entry(item) for item in output.prompt_logprobs]
        is_first, choice.is_announced = not choice.is_announced, True
        piece = TextOutput(
            choice=output.choice,
            text=decoded.text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens or 0,
            num_output_tokens=len(choice.token_ids),
            num_reasoning_tokens=0 if choice.parsed is None else choice.parsed.num_reasoning_tokens,
            delta=None if choice.parsed is None else choice.parsed.take(),
            prompt_token_ids=self.request.prompt_token_ids if is_first else None,
            prompt_logprobs=prompt_logprobs,
            cache_miss=output.cache_miss,
            queued_s=output.queued_s,
            num_preemptions=output.num_preemptions,
            kv=output.kv,
            speculative=output.speculative,
        )
        pieces = self._pending.get(output.choice)
        if pieces is None:
            self._pending[output.choice] = [piece]
        else:
            pieces.append(piece)
        self.unsent_bytes += piece.size_bytes

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
