"""What is sent: prompts of a chosen length, with or without a shared prefix, as token ids or text.

Prompts are drawn from a seed, so that two servers, or two runs, see the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

TEXT = (
    "the river carries small stones down to the sea and the wind moves over the hills while people walk home from "
    "work and talk about the weather the price of bread and the news of the day in a quiet street near the market"
)
WORDS = TEXT.split()


@dataclass(frozen=True)
class Workload:
    """One kind of request."""

    num_requests: int = 32
    prompt_tokens: int = 128  # own tokens of each prompt
    output_tokens: int = 64
    shared_prefix_tokens: int = 0  # in front of every prompt, the same for all
    vocab_size: int = 1000  # token ids are drawn below it; ids are sent when > 0, words when 0
    seed: int = 0

    def prompts(self) -> Iterator[list[int] | str]:
        """`num_requests` prompts: lists of token ids, or text of about one token a word."""
        generator = random.Random(self.seed)
        prefix = self._draw(generator, self.shared_prefix_tokens)
        for _ in range(self.num_requests):
            own = self._draw(generator, self.prompt_tokens)
            if self.vocab_size:
                yield [int(token) for token in prefix + own]
            else:
                yield " ".join(str(word) for word in prefix + own)

    def _draw(self, generator: random.Random, count: int) -> list[int | str]:
        if self.vocab_size:
            # the lowest ids are often special tokens
            low = min(300, self.vocab_size // 2)
            return [generator.randrange(low, self.vocab_size) for _ in range(count)]
        return [generator.choice(WORDS) for _ in range(count)]


def arrival_times(num_requests: int, rate: float | None, seed: int) -> list[float]:
    """Seconds after the start at which each request is sent: Poisson at `rate` per second, or all at once."""
    if rate is None:
        return [0.0] * num_requests
    generator = random.Random(seed)
    times, now = [], 0.0
    for _ in range(num_requests):
        now += generator.expovariate(rate)
        times.append(now)
    return times
