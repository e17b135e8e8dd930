"""Seeded random traffic: the same mix for planted bugs, soaks and long walks."""

from __future__ import annotations

import random
from typing import Any

from tests.scheduling.harness import Harness


class Traffic:
    """Adds, steps and aborts at random. Prompts often continue earlier ones, so that caching and forking matter."""

    def __init__(self, harness: Harness, seed: int, *, faults: bool = True, alphabet: int = 3) -> None:
        self.harness = harness
        self.rng = random.Random(seed)
        self.faults = faults
        self.alphabet = alphabet
        self.recent: list[list[int]] = []  # prompts, some with their answers
        self.recent_ids: list[str] = []
        self.num_accepted = 0
        self.num_refused = 0

    def add(self) -> None:
        rng, harness = self.rng, self.harness
        prompt = [rng.randrange(self.alphabet) for _ in range(rng.randrange(1, 12))]
        if self.recent and rng.random() < 0.6:
            stem = rng.choice(self.recent)
            prompt = stem[: rng.randrange(1, len(stem) + 1)] + prompt[: rng.randrange(5)]
        options: dict[str, Any] = {
            "max_tokens": rng.randrange(1, 16),
            "num_choices": rng.choice((1, 1, 1, 1, 2, 4)),
            "priority": rng.choice((0, 0, 0, -1, 1)),
            "tenant": rng.choice("abc"),
            "cache_salt": rng.choice(("", "", "", "s")),
            "temperature": rng.choice((0.0, 1.0)),
            "deadline_s": rng.choice((None, None, None, 20.0)),
            "prompt_logprobs": rng.choice((None,) * 9 + (0,)),
        }
        request_id = harness.try_add(prompt, request_id=f"r{self.num_accepted}", **options)
        if request_id is None:
            self.num_refused += 1
            return
        self.num_accepted += 1
        self.recent = [*self.recent[-15:], prompt]
        self.recent_ids = [*self.recent_ids[-15:], request_id]
        if self.faults and rng.random() < 0.03:
            rng.choice((harness.runner.nan_ids, harness.runner.fail_ids)).add(request_id)

    def abort(self) -> None:
        if self.recent_ids:
            choice = self.rng.choice((None, None, 0, 1))
            self.harness.abort(self.rng.choice(self.recent_ids), choice)

    def tick(self) -> None:
        """One step of the engine, with what happens around it."""
        for _ in range(self.rng.choice((0, 0, 1, 1, 2))):
            self.add()
        chance = self.rng.random()
        if chance < 0.05:
            self.abort()
        elif chance < 0.06 and self.harness.scheduler.cache.prefix_cache is not None:
            self.harness.scheduler.cache.prefix_cache.clear(self.rng.choice("abc"))
        for output in self.harness.step(while_running=self.abort if self.rng.random() < 0.05 else None):
            if output.finish_reason in ("stop", "length"):
                request = self.harness.requests[output.request_id]
                tokens = self.harness.tokens(output.request_id, output.choice)
                self.recent = [*self.recent[-15:], request.prompt_token_ids + tokens]
        self.harness.now += self.rng.random()
