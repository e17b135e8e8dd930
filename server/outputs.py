"""Arithmetic on engine outputs: merging pieces of the same choice, and counting tokens for `usage`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.types import TextOutput

# one piece of choice `output.choice` of prompt number `index`: (index, output)
Piece = tuple[int, TextOutput]


def merge(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece per choice, in the order in which the choices first appear."""
    if len(pieces) <= 1:
        return list(pieces)
    by_choice: dict[tuple[int, int], list[TextOutput]] = {}
    for index, output in pieces:
        by_choice.setdefault((index, output.choice), []).append(output)
    return [(index, _joined(outputs)) for (index, _), outputs in by_choice.items()]


def unsent_size(output: TextOutput) -> int:
    """About how many bytes the piece will take on the wire, without its frame."""
    size = len(output.text) + 8 * len(output.token_ids)
    if output.logprobs:
        size += sum(64 * (1 + len(entry.top)) for entry in output.logprobs)
    return size


def _joined(outputs: list[TextOutput]) -> TextOutput:
    if len(outputs) == 1:
        return outputs[0]
    first, last = outputs[0], outputs[-1]
    logprobs = None
    if any(output.logprobs is not None for output in outputs):
        logprobs = list(itertools.chain.from_iterable(output.logprobs or () for output in outputs))
    return msgspec.structs.replace(
        last,
        text="".join([output.text for output in outputs]),
        token_ids=list(itertools.chain.from_iterable(output.token_ids for output in outputs)),
        logprobs=logprobs,
        num_prompt_tokens=max(output.num_prompt_tokens for output in outputs),
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
        prompt_token_ids=first.prompt_token_ids,
        prompt_logprobs=first.prompt_logprobs,
        queued_s=first.queued_s,
    )


class UsageCounter:
    """Adds up `usage` over the prompts and choices of one HTTP request; each prompt counts once."""

    def __init__(self) -> None:
        self._prompt_tokens: dict[int, int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._output_tokens: dict[tuple[int, int], int] = {}

    def add(self, index: int, output: TextOutput) -> None:
        if output.num_prompt_tokens:
            self._prompt_tokens[index] = output.num_prompt_tokens
        if output.num_cached_tokens:
            self._cached_tokens[index] = output.num_cached_tokens
        self._output_tokens[index, output.choice] = output.num_output_tokens

    def as_dict(self, *, counts_output: bool = True) -> dict[str, Any]:
        """The `usage` object. Without `counts_output`, for a request that only scores its prompt."""
        num_prompt = sum(self._prompt_tokens.values())
        num_output = sum(self._output_tokens.values()) if counts_output else 0
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }
