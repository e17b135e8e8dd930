"""Prompts that are the same for servers that take token ids and for those that take text only.

A drawn prompt's text encodes to exactly its ids. Knows the checkpoint's tokenizer.json, no server.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from loadtest.workloads import Workload

MAX_TRIES = 50


@dataclass(frozen=True)
class Prompt:
    text: str
    token_ids: list[int]


@dataclass(frozen=True)
class GivenPrompts(Workload):
    """A workload whose prompts are drawn already, each ids or text."""

    given: tuple[list[int] | str, ...] = ()

    def prompts(self) -> Iterator[list[int] | str]:
        yield from self.given


class PromptSource:
    """Draws prompts of an exact number of tokens from plain words of one tokenizer."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds tokenizer.json. Raises ValueError when it has no plain words."""
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        special = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        vocab = self._tokenizer.get_vocab(with_added_tokens=False)
        self._ids = sorted(index for token, index in vocab.items() if token not in special and self._is_plain(index))
        if not self._ids:
            raise ValueError(f"the tokenizer of {folder} has no token of plain letters to make prompts of")

    def draw(self, generator: random.Random, num_tokens: int, prefix: Prompt | None = None) -> Prompt:
        """A prompt of `num_tokens` tokens, after those of `prefix`. Raises RuntimeError when none is found."""
        start = prefix.token_ids if prefix is not None else []
        goal = len(start) + num_tokens
        for _ in range(MAX_TRIES):
            ids = [*start, *generator.choices(self._ids, k=num_tokens)]
            # neighbours may merge into fewer tokens: fill up, cut, and see whether the rest still reads the same
            for _ in range(MAX_TRIES):
                text = self._tokenizer.decode(ids, skip_special_tokens=False)
                again = self._tokenizer.encode(text).ids
                if again == ids and len(ids) == goal:
                    return Prompt(text=text, token_ids=ids)
                ids = [*again, *generator.choices(self._ids, k=max(0, goal - len(again)))][:goal]
                if ids[: len(start)] != start:
                    break
        raise RuntimeError(f"found no text of exactly {goal} tokens with this tokenizer; try another length")

    def _is_plain(self, index: int) -> bool:
        text = self._tokenizer.decode([index])
        return text.isascii() and text.strip().isalpha()
