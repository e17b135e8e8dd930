"""A model's vocabulary as llguidance sees it, and the limits under which matchers work, in the child as in the engine.

Both must build exactly the same matchers: what the child has accepted, the engine can run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.errors import ConfigError

# 2 kB a state: what one output can make its matcher hold. The schemas that people use need some hundreds.
MAX_LEXER_STATES = 20_000
SILENT = 0


class Vocabulary:
    """Tokens, end-of-sequence tokens and special tokens of one model. Safe to use from several threads."""

    def __init__(self, definition: dict[str, Any], eos_token_ids: Sequence[int], size: int | None = None) -> None:
        """
        definition   parsed tokenizer.json
        size         columns of the logits; those beyond the vocabulary are never allowed
        Raises ConfigError for kinds of vocabularies that constraints cannot work on.
        """
        ends = list(eos_token_ids)
        try:
            self.tokenizer = LLTokenizer(json.dumps(definition), n_vocab=size, eos_token=ends or None)
        except Exception as error:  # the library raises plain ValueError for whatever it cannot read
            raise ConfigError(f"structured output is not possible with this tokenizer: {error}") from None
        self.eos_token_ids = tuple(ends)
        self.special_tokens: dict[str, int] = {
            token["content"]: token["id"]
            for token in definition["added_tokens"]
            if self.tokenizer.is_special_token(token["id"])
        }
        self._limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)

    def matcher(self, grammar: str) -> LLMatcher:
        """At the beginning of an output. Never raises: see `LLMatcher.is_error`. Releases the interpreter lock."""
        return LLMatcher(self.tokenizer, grammar, log_level=SILENT, limits=self._limits)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to the text, special tokens included."""
        return self.tokenizer.decode_bytes([token_id])
