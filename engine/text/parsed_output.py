"""One choice's text as its parser sees it, token by token, so that the tokens of the thinking can be counted.

Text may come later than its token, because the detokenizer holds back what could become a stop string. Pieces are
therefore cut where tokens end before the parser gets them.
"""

from __future__ import annotations

from collections import deque

from engine.text.parsers import OutputParser
from engine.types import Delta

NOTHING = Delta()


class ParsedOutput:
    """Deltas of one choice, and how many of its tokens were thinking, the markers included."""

    def __init__(self, parser: OutputParser) -> None:
        self.num_reasoning_tokens = 0
        self._parser = parser
        self._deltas: list[Delta] = []
        self._num_undecided = 0  # tokens that may turn out to be thinking
        self._num_shown = 0  # characters given to the parser
        self._ends: deque[int] = deque()  # where the tokens end whose text has not come completely

    def push(self, text: str, num_held: int) -> None:
        """One more token: the text that has become certain with it, and how many characters are still held back."""
        if not num_held and not self._ends:
            self._num_shown += len(text)
            self._take_token(text)
            return
        self._ends.append(self._num_shown + len(text) + num_held)
        self._settle(text)

    def finish(self, text: str) -> None:
        """The end of the output, with what was held back of its text."""
        self._settle(text)
        while self._ends:  # a stop string took their text away
            self._ends.popleft()
            self._take_token("")
        self._deltas.append(self._parser.finish())

    def take(self) -> Delta:
        """What came since the last call."""
        if not self._deltas:
            return NOTHING
        delta, self._deltas = Delta.join(self._deltas), []
        return delta

    def _settle(self, text: str) -> None:
        while self._ends and self._ends[0] - self._num_shown <= len(text):
            count = self._ends.popleft() - self._num_shown
            self._num_shown += count
            self._take_token(text[:count])
            text = text[count:]
        if text:
            self._num_shown += len(text)
            self._deltas.append(self._parser.feed(text))

    def _take_token(self, text: str) -> None:
        was_thinking = self._parser.is_thinking
        if text:
            self._deltas.append(self._parser.feed(text))
        is_thinking = self._parser.is_thinking
        if was_thinking or is_thinking:
            self.num_reasoning_tokens += self._num_undecided + 1
            self._num_undecided = 0
        elif is_thinking is None:
            self._num_undecided += 1
        else:
            self._num_undecided = 0
