"""What is sent: conversations, whose next turn may depend on the server's answer, and prompts of a chosen length.

Everything is drawn from a seed, so that two servers, or two runs, see the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from loadtest.client import Answer, Request

TEXT = (
    "the river carries small stones down to the sea and the wind moves over the hills while people walk home from "
    "work and talk about the weather the price of bread and the news of the day in a quiet street near the market"
)
WORDS = TEXT.split()


@dataclass(frozen=True)
class Conversation:
    """`turns` yields requests and is sent the answer to each; it has at least `num_turns`."""

    turns: Generator[Request, Answer, None]
    num_turns: int = 1
    think_s: float = 0.0  # from an answer to the next turn


def single(request: Request) -> Conversation:
    """A conversation of one turn."""

    def turns() -> Generator[Request, Answer, None]:
        yield request

    return Conversation(turns())


@dataclass(frozen=True)
class Workload:
    """Prompts of random tokens or words, all of the same length, with or without a shared prefix."""

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

    def conversations(self) -> Iterator[Conversation]:
        return (single(Request(prompt=prompt, max_tokens=self.output_tokens)) for prompt in self.prompts())

    def _draw(self, generator: random.Random, count: int) -> list[int | str]:
        if self.vocab_size:
            # the lowest ids are often special tokens
            low = min(300, self.vocab_size // 2)
            return [generator.randrange(low, self.vocab_size) for _ in range(count)]
        return [generator.choice(WORDS) for _ in range(count)]
