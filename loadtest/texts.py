"""Text of a wanted length out of what every installation has: made-up sentences, reference prose, sources."""

from __future__ import annotations

import re
from functools import cache
from random import Random

from engine.mimir.corpus.fillers import filler_sentence
from engine.mimir.corpus.python_source import source_files

NAMES = ("total", "entries", "buffer", "handle", "limit")


def sentences(generator: Random, num_chars: int) -> str:
    """Made-up sentences, at least one, of about so many characters."""
    found = [filler_sentence(generator)]
    length = len(found[0])
    while length < num_chars:
        found.append(filler_sentence(generator))
        length += 1 + len(found[-1])
    return " ".join(found)


def prose(generator: Random, num_chars: int) -> str:
    """A passage of the Python reference, from the start of a line; several when none is long enough."""
    found, length = [], 0
    while length < num_chars:
        topic = generator.choice(_topics())
        start = topic.find("\n", generator.randrange(max(1, len(topic) - num_chars))) + 1
        found.append(topic[start : start + num_chars - length])
        length += len(found[-1])
    return "".join(found)


def code(generator: Random, num_chars: int) -> str:
    """Lines of one module of the standard library; all of a module that has fewer characters."""
    source = generator.choice(_sources(min(num_chars, 20_000)))
    start = source.find("\n", generator.randrange(max(1, len(source) - num_chars))) + 1
    return source[start : start + num_chars]


def edited(source: str, generator: Random) -> str:
    """The text with one of its identifiers renamed throughout, as an assistant would write it again."""
    words = sorted(set(re.findall(r"[A-Za-z_]{4,}", source)))
    if not words:
        return source
    return re.sub(rf"\b{generator.choice(words)}\b", generator.choice(NAMES), source)


@cache
def _topics() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(text for _, text in sorted(topics.items()) if len(text) > 400)


@cache
def _sources(min_chars: int) -> tuple[str, ...]:
    return tuple(text for text in source_files() if len(text) > 2 * min_chars)
