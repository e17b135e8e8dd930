"""Prompts to token ids and back, off the event loop: templates in a child process, long texts tokenized in threads.

Every step has a time limit, and text that cannot fit is refused before any work is spent on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from engine.config import Limits
from engine.errors import InvalidParameter, PromptTooLong, UnsupportedParameter
from engine.faults import Faults
from engine.text.bad_words import token_sequences
from engine.text.rendered import RenderedText
from engine.text.template_process import TemplateProcess
from engine.text.tokenizer import Tokenizer
from engine.types import ChatPrompt, PoolingRequest, TextPair

NUM_THREADS = 2
# Up to this length a text is tokenized where it stands: less than half a millisecond whatever it is, and two changes of
# threads cost as much as most of them.
MAX_INLINE_CHARS = 512
_CLIP_FACTOR = 8  # times the usual bound on bytes per token, for texts that are cut to length

T = TypeVar("T")


class PromptEncoder:
    """Turns text and chat prompts into token ids for one model."""

    def __init__(self, tokenizer: Tokenizer, limits: Limits, faults: Faults) -> None:
        self.tokenizer = tokenizer
        self._limits = limits
        self._faults = faults
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")
        self._free = asyncio.Semaphore(NUM_THREADS)
        self._template: TemplateProcess | None = None

    async def start(self) -> None:
        """Starts the template process. Raises ConfigError when the template is not valid."""
        source = self.tokenizer.files.chat_template
        if source is None:
            return
        self._template = TemplateProcess(
            source,
            self.tokenizer.files.named_tokens,
            self.tokenizer.control_tokens,
            timeout_s=self._limits.template_timeout_s,
            max_chars=self._limits.max_body_bytes,
        )
        await self._template.start()

    async def close(self) -> None:
        if self._template is not None:
            await self._template.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(
        self,
        prompt: str | list[int] | ChatPrompt,
        *,
        max_tokens: int,
        add_special_tokens: bool = True,
        param: str = "prompt",
        label: str = "",
    ) -> list[int]:
        """Token ids of any kind of prompt.

        max_tokens   the context length: text that could not fit by far is refused untokenized
        param        the field to name in errors; label: the client's id, for fault injection
        Raises PromptTooLong, TemplateError, InvalidParameter, UnsupportedParameter.
        """
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, ChatPrompt):
            rendered = await self._render(prompt, label)
            self._check_size(rendered.text, max_tokens, param)
            if len(rendered.text) <= MAX_INLINE_CHARS:
                return self._encode_rendered(rendered, label)
            return await self._in_thread(lambda: self._encode_rendered(rendered, label), param)
        self._check_size(prompt, max_tokens, param)
        if len(prompt) <= MAX_INLINE_CHARS:
            return self._encode_text(prompt, add_special_tokens, label)
        return await self._in_thread(lambda: self._encode_text(prompt, add_special_tokens, label), param)

    async def infill(
        self, prefix: str | list[int], suffix: str, *, max_tokens: int, add_special_tokens: bool, param: str
    ) -> tuple[list[int], tuple[int, ...]]:
        """Token ids of a prompt that asks for the text between two parts, and of the tokens that end that text.

        add_special_tokens   begin with the beginning-of-text token where this vocabulary's texts do; for text prefixes
        Raises UnsupportedParameter for a model that cannot, and otherwise as `encode`.
        """
        form = self.tokenizer.infill
        if form is None:
            raise UnsupportedParameter(
                "this model's vocabulary has no tokens for filling in the middle; leave out suffix", param="suffix"
            )
        self._check_size(suffix, max_tokens, "suffix")

        def work() -> list[int]:
            return form.prompt(before, self.tokenizer.encode_inner(suffix))

        before = await self.encode(prefix, max_tokens=max_tokens, add_special_tokens=False, param=param)
        ids = await self._in_thread(work, "suffix")
        start = self.tokenizer.encode("")[:1] if isinstance(prefix, str) and add_special_tokens else []
        return ([*start, *ids] if start == [self.tokenizer.bos_token_id] else ids), form.end_ids

    async def encode_pooling(self, given: PoolingRequest, *, max_tokens: int) -> tuple[list[int], int]:
        """Token ids of a pooling request, cut as it asks, and the number of them that are the first text's of a pair.

        max_tokens   what the model takes. Raises as `encode`.
        """
        prompt, asked, side = given.prompt, given.truncate_prompt_tokens, given.truncation_side
        param = given.prompt_param
        if asked is not None and (asked < -1 or asked == 0):
            raise InvalidParameter(
                f"truncate_prompt_tokens is {asked}; give -1 or at least 1", param="truncate_prompt_tokens"
            )
        keep = max_tokens if asked == -1 else asked
        if isinstance(prompt, list | ChatPrompt):
            ids = await self.encode(prompt, max_tokens=max_tokens, param=param, label=given.client_request_id)
            return (ids if keep is None else ids[:keep] if side == "right" else ids[-keep:]), 0
        pair = prompt if isinstance(prompt, TextPair) else None
        text = prompt if isinstance(prompt, str) else prompt.first
        second, max_second = (None, None) if pair is None else (pair.second, pair.max_second_tokens)
        is_cut = keep is not None or max_second is not None
        if second is not None and is_cut:
            second = self._clipped(second, min(keep or max_tokens, max_second or max_tokens, max_tokens), side)
        elif keep is not None:
            text = self._clipped(text, min(keep, max_tokens), side)
        self._check_size(text + (second or ""), max_tokens * (_CLIP_FACTOR if is_cut else 1), param)

        def work() -> tuple[list[int], int]:
            self._faults.check("tokenizer", label=given.client_request_id)
            return self.tokenizer.encode_cut(
                text,
                second,
                add_special_tokens=given.add_special_tokens,
                max_tokens=keep,
                max_second_tokens=max_second,
                side=side,
            )

        return await self._in_thread(work, param)

    def _clipped(self, text: str, num_tokens: int, side: Literal["left", "right"]) -> str:
        """The part of a text that can end up in `num_tokens` tokens: what is cut anyway costs no tokenizing."""
        size = num_tokens * self._limits.max_prompt_bytes_per_token * _CLIP_FACTOR // 4  # a character has up to 4 bytes
        return text[:size] if side == "right" else text[-size:]

    async def render(self, prompt: ChatPrompt) -> str:
        """The text that the model would see. Raises TemplateError, InvalidParameter, UnsupportedParameter."""
        return (await self._render(prompt, "")).plain()

    async def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens included. Raises InvalidParameter for ids outside the vocabulary."""
        vocab_size = self.tokenizer.vocab_size
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
            raise InvalidParameter(f"token ids must be in 0 to {vocab_size - 1}", param="tokens")
        return await self._in_thread(lambda: self.tokenizer.decode(token_ids), "tokens")

    async def bad_words(self, words: Iterable[str]) -> list[tuple[int, ...]]:
        """Token sequences of words that must not appear. Raises InvalidParameter."""
        words = list(words)
        if not words:
            return []
        return await self._in_thread(lambda: token_sequences(self.tokenizer, words), "bad_words")

    async def _render(self, prompt: ChatPrompt, label: str) -> RenderedText:
        if self._template is None:
            raise UnsupportedParameter(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE",
                param="messages",
            )
        self._faults.check("template", label=label)
        return await self._template.render(prompt)

    def _check_size(self, text: str, max_tokens: int, param: str) -> None:
        limit = self._limits.max_prompt_bytes_per_token * max_tokens
        num_bytes = len(text) if len(text) > limit else len(text.encode("utf-8", "surrogatepass"))
        if num_bytes > limit:
            raise PromptTooLong(
                f"the prompt has {num_bytes} bytes or more; this model's context of {max_tokens} tokens takes at most "
                f"{limit} bytes of text",
                param=param,
            )

    async def _in_thread(self, work: Callable[[], T], param: str) -> T:
        """Runs `work` in a thread. The time limit starts once a thread is free: the wait for one is not the text's."""
        await self._free.acquire()
        # A thread cannot be stopped: whoever times out or leaves, its place is taken until the work ends.
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(lambda _: self._free.release())
        try:
            return await asyncio.wait_for(asyncio.shield(future), self._limits.tokenize_timeout_s)
        except TimeoutError:
            future.add_done_callback(_retrieve)
            raise PromptTooLong(
                f"tokenizing did not finish within {self._limits.tokenize_timeout_s:g} s; shorten the text", param=param
            ) from None
        except asyncio.CancelledError:
            future.add_done_callback(_retrieve)
            raise

    def _encode_text(self, text: str, add_special_tokens: bool, label: str) -> list[int]:
        self._faults.check("tokenizer", label=label)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _encode_rendered(self, rendered: RenderedText, label: str) -> list[int]:
        self._faults.check("tokenizer", label=label)
        return self.tokenizer.encode_rendered(rendered)


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Marks a result that nobody waits for as seen."""
    if not future.cancelled():
        future.exception()
