"""Prompts of Mimir's corpus for whoever wants its own answers, such as the training of a drafter. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from engine.mimir.presets import DRAFT_TEXTS
from engine.mimir.tasks import FIRST_TRAINING_SEED, Encoder, make_task

SHORTEST = 48  # tokens of context, for tasks that have one


def training_prompts(tokenizer: Encoder, seed: int, max_tokens: int) -> Iterator[str]:
    """Without end: what a drafter is asked most, each of about `max_tokens` tokens at most."""
    random = Random(seed)
    names, weights = list(DRAFT_TEXTS), list(DRAFT_TEXTS.values())
    while True:
        (name,) = random.choices(names, weights)
        size = random.randint(min(SHORTEST, max_tokens), max_tokens)
        yield make_task(name, random.randrange(FIRST_TRAINING_SEED, 1 << 62), size, tokenizer).prompt
