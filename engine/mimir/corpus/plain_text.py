"""Passages of plain text for language modelling: standard library code, reference prose, generated sentences.

Sources whose index is a multiple of `HELD_OUT_EVERY` are never trained on; perplexity is measured on them.
"""

from collections.abc import Callable
from random import Random

import numpy as np

from engine.mimir.corpus import fillers, python_source

HELD_OUT_EVERY = 25
PASSAGE_CHARS = 900  # about 256 tokens


def passage(rng: np.random.Generator, texts: tuple[str, ...]) -> str:
    """A stretch of a random text, from the start of a line."""
    text = texts[int(rng.integers(len(texts)))]
    start = int(rng.integers(max(1, len(text) - PASSAGE_CHARS // 2)))
    start = text.find("\n", start) + 1 if start else 0
    return text[start : start + PASSAGE_CHARS]


def training_part(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text for index, text in enumerate(texts) if index % HELD_OUT_EVERY)


def held_out_part(texts: tuple[str, ...]) -> tuple[str, ...]:
    return texts[::HELD_OUT_EVERY]


def python_code(rng: np.random.Generator) -> str:
    return passage(rng, training_part(python_source.source_files()))


def prose(rng: np.random.Generator) -> str:
    return passage(rng, training_part(python_source.prose()))


def sentences(rng: np.random.Generator) -> str:
    """Generated filler, so that the model knows the haystack's language."""
    local = Random(int(rng.integers(1 << 62)))
    return " ".join(fillers.filler_sentence(local) for _ in range(16))


PLAIN_MAKERS: dict[str, Callable[[np.random.Generator], str]] = {
    "python_code": python_code,
    "prose": prose,
    "sentences": sentences,
}
