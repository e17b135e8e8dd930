"""Keeps users' strings from spelling control tokens in a rendered chat template.

Before rendering, the first character of every control token found in a user's string is replaced by a stand-in (see
`RenderedText`). Templates may trim, split and quote such strings as they like; the tokenizer puts the character back
after it has parsed the control tokens that the template itself wrote.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from engine.text.rendered import stand_in

NONCE_DIGITS = 24
# Fields whose text templates compare with constants and never write beside other text.
STRUCTURAL_KEYS = frozenset({"type", "role"})


class Protection:
    """Finds and replaces control tokens in nested values of JSON shape."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = sorted(control_tokens, key=len, reverse=True)
        either = "|".join(map(re.escape, tokens)) or r"(?!)"
        self._any = re.compile(either)
        self._starts = re.compile(f"(?={either})")  # overlapping occurrences too

    def apply(self, value: Any) -> tuple[Any, str | None]:
        """A copy of `value` with stand-ins and their nonce, or `value` itself and None when nothing is suspicious.

        Also catches a control token that is spread over strings that templates write one after the other, such as the
        text parts of one message.
        """
        texts: list[str] = []
        free: list[int] = []  # indices of the texts that templates may write side by side
        _collect(value, texts, free, is_free=True)
        found = {index for index, text in enumerate(texts) if self._any.search(text)}
        joined = "".join(texts[index] for index in free)
        if not found and not self._any.search(joined):
            return value, None
        nonce = draw_nonce()
        places = {index: {match.start() for match in self._starts.finditer(texts[index])} for index in found}
        ends = list(accumulate(len(texts[index]) for index in free))
        for match in self._starts.finditer(joined):
            at = bisect_right(ends, match.start())
            index = free[at]
            places.setdefault(index, set()).add(match.start() - (ends[at] - len(texts[index])))
        changed = [_replace(text, places.get(index, set()), nonce) for index, text in enumerate(texts)]
        return _rebuild(value, iter(changed)), nonce


def draw_nonce() -> str:
    """Random digits: they survive quoting, trimming and changes of case."""
    return "".join(secrets.choice("0123456789") for _ in range(NONCE_DIGITS))


def _collect(value: Any, texts: list[str], free: list[int], is_free: bool) -> None:
    """Appends every string of `value`, dictionary keys included, in the order in which `_rebuild` meets them."""
    if isinstance(value, str):
        if is_free:
            free.append(len(texts))
        texts.append(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            texts.append(key)
            _collect(item, texts, free, is_free and key not in STRUCTURAL_KEYS)
    elif isinstance(value, list):
        for item in value:
            _collect(item, texts, free, is_free)


def _rebuild(value: Any, texts: Iterator[str]) -> Any:
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, dict):
        return {next(texts): _rebuild(item, texts) for item in value.values()}
    if isinstance(value, list):
        return [_rebuild(item, texts) for item in value]
    return value


def _replace(text: str, places: set[int], nonce: str) -> str:
    parts = []
    start = 0
    for place in sorted(places):
        parts += [text[start:place], stand_in(nonce, text[place])]
        start = place + 1
    return "".join([*parts, text[start:]]) if places else text
