"""Words that must not appear, as the token sequences that would write them."""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import InvalidParameter
from engine.text.tokenizer import Tokenizer


def token_sequences(tokenizer: Tokenizer, words: Iterable[str]) -> list[tuple[int, ...]]:
    """Each word with and without a space before it. Raises InvalidParameter for an empty word."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word:
            raise InvalidParameter("bad_words holds an empty word; leave it out", param="bad_words")
        for text in (word, " " + word.lstrip()):
            sequences[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return list(sequences)
