"""Where a piece of text occurred before, in many token sequences that come and go: what a suffix tree answers.

Two indexes of short runs of tokens (grams) stand in for the tree: a longer match is found among the occurrences of its
last gram. Adding a token costs a constant, and a token needs about as much memory as one node of a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from engine.speculation.host import ENTRY_BYTES, INT_BYTES

SEQUENCE_BITS = 32  # low bits of a place: an index into the sequence, whose number stands above
INDEX_MASK = (1 << SEQUENCE_BITS) - 1
TOKEN_BYTES = 8 + INT_BYTES
FIRST_PLACE_BYTES = ENTRY_BYTES + 2 * INT_BYTES  # key and place
SECOND_PLACE_BYTES = 88 + INT_BYTES  # a list takes the place of the number
NEXT_PLACE_BYTES = 9 + INT_BYTES


class Hit(NamedTuple):
    """An occurrence: the last `length` tokens before `end` agree with the end of the text that was looked for."""

    tokens: list[int]
    end: int  # index of the token that followed; there is one
    length: int


class Occurrences:
    """Occurrences of text in numbered sequences, of those that were followed by another token.

    grams     (short, long): lengths of the runs that are indexed; a match has at least `short` tokens
    max_hits  so many most recent occurrences of each gram are looked at
    """

    def __init__(self, grams: tuple[int, int] = (1, 3), max_hits: int = 16) -> None:
        self._grams = grams
        self._max_hits = max_hits
        self._sequences: dict[int, list[int]] = {}
        # hash of a gram -> places behind it, the newest last; a lone one without its list
        self._places: dict[int, int | list[int]] = {}
        self.num_bytes = 0

    def append(self, sequence: int, tokens: Sequence[int]) -> None:
        """Add tokens at the end of a sequence; a new number begins one. O(tokens)."""
        known = self._sequences.setdefault(sequence, [])
        start = len(known)
        known.extend(tokens)
        first_place = sequence << SEQUENCE_BITS
        places = self._places
        num_bytes = TOKEN_BYTES * len(tokens)
        for gram in self._grams:
            for end in range(max(start, gram), len(known)):
                key = hash(tuple(known[end - gram : end]))
                entry = places.get(key)
                if entry is None:
                    places[key] = first_place + end
                    num_bytes += FIRST_PLACE_BYTES
                elif isinstance(entry, int):
                    places[key] = [entry, first_place + end]
                    num_bytes += SECOND_PLACE_BYTES
                else:
                    entry.append(first_place + end)
                    num_bytes += NEXT_PLACE_BYTES
        self.num_bytes += num_bytes

    def remove(self, sequence: int) -> None:
        """Forget a sequence and all counts it had a part in. O(its tokens) when the oldest goes first."""
        known = self._sequences.pop(sequence)
        self.num_bytes -= TOKEN_BYTES * len(known)
        for gram in self._grams:
            for end in range(gram, len(known)):
                self._remove_place(hash(tuple(known[end - gram : end])), (sequence << SEQUENCE_BITS) + end)

    def _remove_place(self, key: int, place: int) -> None:
        entry = self._places[key]
        if isinstance(entry, int):
            del self._places[key]
            self.num_bytes -= FIRST_PLACE_BYTES
            return
        entry.remove(place)  # finds the oldest at once
        if len(entry) == 1:
            self._places[key] = entry[0]
            self.num_bytes -= SECOND_PLACE_BYTES
        else:
            self.num_bytes -= NEXT_PLACE_BYTES

    def find(self, text: Sequence[int], besides: int | None = None) -> list[Hit]:
        """Occurrences of the end of `text`, the longest first, of equally long ones the most recent first.

        besides  a sequence not to look in
        """
        places: dict[int, None] = {}
        for gram in reversed(self._grams):
            for place in self._recent(text, gram):
                places[place] = None
        hits = []
        for place in sorted(places, reverse=True):
            sequence = place >> SEQUENCE_BITS
            if sequence != besides:
                tokens, end = self._sequences[sequence], place & INDEX_MASK
                length = common_end(tokens, end, text)
                if length >= self._grams[0]:  # otherwise only the hashes agree
                    hits.append(Hit(tokens, end, length))
        hits.sort(key=lambda hit: -hit.length)
        return hits

    def count(self, text: Sequence[int]) -> int:
        """How often `text`, of at least the shorter gram's length, occurred and was followed by another token."""
        short, long = self._grams
        gram = long if len(text) >= long else short
        assert len(text) >= gram, f"{len(text)} tokens are fewer than the {gram} of a gram"
        entry = self._places.get(hash(tuple(text[-gram:])), [])
        found = 0
        for place in [entry] if isinstance(entry, int) else entry:
            tokens, end = self._sequences[place >> SEQUENCE_BITS], place & INDEX_MASK
            found += end >= len(text) and tokens[end - len(text) : end] == list(text)
        return found

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def _recent(self, text: Sequence[int], gram: int) -> list[int]:
        if len(text) < gram:
            return []
        entry = self._places.get(hash(tuple(text[-gram:])))
        if entry is None:
            return []
        return [entry] if isinstance(entry, int) else list(islice(reversed(entry), self._max_hits))


def common_end(tokens: list[int], end: int, text: Sequence[int]) -> int:
    """How many tokens before `end` agree with the end of `text`."""
    longest = min(end, len(text))
    length = 0
    while length < longest and tokens[end - 1 - length] == text[-1 - length]:
        length += 1
        # most matches are short; one that is not is often complete, which a comparison at once finds sooner
        if length == 4 and tokens[end - longest : end] == text[len(text) - longest :]:
            return longest
    return length
