"""Prompts to token ids and back, off the event loop: templates in a child process, tokenizing in threads.

Every step has a time limit, and text that cannot fit is refused before any work is spent on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from engine.config import Limits
from engine.errors import InvalidParameter, PromptTooLong, UnsupportedParameter
from engine.faults import Faults
from engine.text.bad_words import token_sequences
from engine.text.rendered import RenderedText
from engine.text.template_process import TemplateProcess
from engine.text.tokenizer import Tokenizer
from engine.types import ChatPrompt

NUM_THREADS = 2

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
            return await self._in_thread(lambda: self._encode_rendered(rendered, label), param)
        self._check_size(prompt, max_tokens, param)
        return await self._in_thread(lambda: self._encode_text(prompt, add_special_tokens, label), param)

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
