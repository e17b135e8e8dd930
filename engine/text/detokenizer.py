"""Token ids to text, piece by piece, for one stream: incomplete UTF-8 and possible stop strings are held back.

The cost of a token does not depend on how many came before. Knows no requests and no ids of streams.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from engine.text.stop_matcher import StopMatcher
from engine.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Delta:
    """What some tokens added.

    text        safe to show: no later token can change it
    num_tokens  how many of the given tokens count; fewer than given when a stop string ended the text before the last
    stop        the stop string that ended the text
    """

    text: str
    num_tokens: int
    stop: str | None = None


class Detokenizer:
    """The text of one stream.

    The concatenated deltas equal the text of all tokens decoded as a continuation (sentencepiece's leading space
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
    ) -> None:
        """min_tokens: stop strings that are complete within the first so many tokens do not count."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._tight_specials = tokenizer.joins_words and not spaces_between_special_tokens
        self._after_added = False
        self._min_tokens = min_tokens
        self._include_stop = include_stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = StopMatcher(stop) if stop else None
        self._held = ""  # decoded, not shown: the end of it may begin a stop string
        self._num_chars = 0  # decoded so far
        self._num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Takes the next tokens. Nothing may follow a delta that has a `stop`."""
        shown = []
        for count, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            if token_id in self._skipped:
                continue
            text, stop = self._take(self._utf8.decode(self._bytes_of(token_id)))
            shown.append(text)
            if stop is not None:
                return Delta("".join(shown), count, stop)
        return Delta("".join(shown), len(token_ids))

    def finish(self) -> Delta:
        """The end of the stream: everything that was held back. A stop string can still be completed here."""
        text, stop = self._take(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return Delta(text if stop is not None else text + held, 0, stop)

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
