"""Trains the tokenizer: `python -m engine.mimir.build_tokenizer [--out DIR]`.

The result is committed, so training and serving never depend on which Python version built it.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from engine.mimir import tokenizer
from engine.mimir.corpus import python_source, words

SEED = 0
NUM_SOURCES = 120
SOURCE_CHARS = 20_000
MAX_POSITIONS = 4096
# How often each word list is shown, so that every listed word is likely to become one token.
SPACED_REPEATS = 400
OPENING_REPEATS = 250
OPENING_LISTS = ("STARTERS", "FIRST_NAMES", "CITIES", "COLOURS")


def training_texts(seed: int = SEED) -> Iterator[str]:
    """Reference prose, a sample of standard library code, and every word list in shuffled order."""
    rng = random.Random(seed)
    yield from python_source.prose()
    for source in rng.sample(python_source.source_files(), NUM_SOURCES):
        yield source[:SOURCE_CHARS]
    lists = {name: value for name, value in vars(words).items() if name.isupper()}
    for listed in lists.values():
        for _ in range(SPACED_REPEATS):
            yield " " + " ".join(rng.sample(listed, len(listed)))
    for name in OPENING_LISTS:
        for _ in range(OPENING_REPEATS):
            yield "\n".join(rng.sample(lists[name], len(lists[name])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights" / "mimir")
    out = parser.parse_args().out
    tokenizer.save(tokenizer.train_tokenizer(training_texts()), out, MAX_POSITIONS)


if __name__ == "__main__":
    main()
