"""Token ids to text, piece by piece, for one stream: incomplete UTF-8 and possible stop strings are held back.

The cost of a token does not depend on how many came before. Knows no requests and no ids of streams.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from engine.text.stop_matcher import StopMatcher
from engine.text.tokenizer import Tokenizer


class Decoded(msgspec.Struct, frozen=True):
    """What some tokens added to the text.

    text        safe to show: no later token can change it
    num_tokens  how many of the given tokens count; fewer than given when a stop string ended the text before the last
    stop        the stop string that ended the text
    """

    text: str
    num_tokens: int
    stop: str | None = None


class Detokenizer:
    """The text of one stream.

    The concatenated texts equal the text of all tokens decoded as a continuation (sentencepiece's leading space
    stays), cut at the first complete stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        """
        min_tokens   stop strings that are complete within the first so many tokens do not count
        kept_ids     special tokens that are shown in any case
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - kept_ids if skip_special_tokens else frozenset()
        self._tight_specials = tokenizer.joins_words and not spaces_between_special_tokens
        self._after_added = False
        # nearly every token is whole characters by itself: its text is looked up, not decoded
        self._is_plain = not stop and not self._tight_specials
        self._is_inside_character = False
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop) if stop else None
        self._held = ""  # decoded, not shown: the end of it may begin a stop string
        self._num_chars = 0  # decoded so far
        self._num_tokens = 0

    @property
    def num_held(self) -> int:
        """Characters that are decoded and held back, because they could become a stop string."""
        return len(self._held)

    def push(self, token_ids: Sequence[int]) -> Decoded:
        """Takes the next tokens. Nothing may follow one that has a `stop`."""
        if self._is_plain:
            return Decoded("".join([self._plain_text(token_id) for token_id in token_ids]), len(token_ids))
        shown = []
        for count, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            if token_id in self._skipped:
                continue
            text, stop = self._take(self._utf8.decode(self._bytes_of(token_id)))
            shown.append(text)
            if stop is not None:
                return Decoded("".join(shown), count, stop)
        return Decoded("".join(shown), len(token_ids))

    def finish(self) -> Decoded:
        """The end of the stream: everything that was held back. A stop string can still be completed here."""
        text, stop = self._take(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return Decoded(text if stop is not None else text + held, 0, stop)

    def _plain_text(self, token_id: int) -> str:
        """The text that a token completes, when there are no stop strings to look for."""
        if token_id in self._skipped:
            return ""
        if not self._is_inside_character:
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                return text
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._is_inside_character = bool(self._utf8.getstate()[0])
        return text

    def _bytes_of(self, token_id: int) -> bytes:
        data = self._tokenizer.token_bytes(token_id)
        if self._tight_specials:
            is_added = self._tokenizer.is_added(token_id)
            if is_added and self._after_added:
                data = data.removeprefix(b" ")
            self._after_added = is_added
        return data

    def _take(self, text: str) -> tuple[str, str | None]:
        """Decoded text in, showable text out."""
        if self._matcher is None or not text:
            return text, None
        match = self._matcher.feed(text, is_testing=self._num_tokens > self._min_tokens)
        self._held += text
        self._num_chars += len(text)
        if match is None:
            num_shown = len(self._held) - self._matcher.num_held
            shown, self._held = self._held[:num_shown], self._held[num_shown:]
            return shown, None
        held_from = self._num_chars - len(self._held)
        cut = match.end if self._include_stop else match.start
        shown, self._held = self._held[: cut - held_from], ""
        return shown, match.stop
