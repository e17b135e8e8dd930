"""Drafters that are wrong in every way there is, for tests: whatever they say, the output must stay what it was."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import msgspec

from engine.core import EngineCore
from engine.scheduling.invariants import check_invariants
from engine.scheduling.plan import StepPlan
from engine.speculation.allowance import FixedBudget
from engine.speculation.base import RequestView, TapRows, Taps
from engine.speculation.manager import Speculation
from engine.speculation.tree import EMPTY, DraftTree
from engine.types import EngineRequest

NAME = "ngram"  # the name under which requests of these tests ask for whichever drafter is in use

Guess = Callable[[RequestView, int, random.Random], DraftTree]
Truth = Mapping[tuple[str, int], Sequence[int]]


class Scripted:
    """A drafter whose guesses are a function; it keeps account of what it was told."""

    name = NAME

    def __init__(self, guess: Guess, needs: Taps | None = None) -> None:
        self.guess = guess
        self.needs = needs or Taps()
        self.random = random.Random(5)
        self.known: dict[str, list[int]] = {}  # outputs by request, as told
        self.num_accepted = 0
        self.accepted: Counter[str] = Counter()  # by request
        self.num_dropped = 0
        self.taps: list[tuple[DraftTree, TapRows]] = []

    def admit(self, key: str, token_ids: Sequence[int], tenant: str) -> None:
        assert key not in self.known
        self.known[key] = []

    def fork(self, key: str, child: str) -> None:
        assert self.known[key] == []
        assert child not in self.known
        self.known[child] = []

    def propose(self, views: Sequence[RequestView], caps: Sequence[int]) -> list[DraftTree]:
        for view in views:
            outputs = list(view.token_ids[view.num_prompt_tokens :])
            assert self.known[view.key] == outputs, "every token is told exactly once"
        return [self.guess(view, cap, self.random) for view, cap in zip(views, caps, strict=True)]

    def on_commit(
        self, key: str, tree: DraftTree, accepted: Sequence[int], new_tokens: Sequence[int], taps: TapRows
    ) -> None:
        self.known[key].extend(new_tokens)
        self.num_accepted += len(accepted)
        self.accepted[key] += len(accepted)
        # the path reads like the output, unless a stop cut it
        for node, token_id in zip(accepted, new_tokens, strict=False):
            assert tree.tokens[node] == token_id
        if self.needs != Taps():
            self.taps.append((tree, taps))

    def drop(self, key: str) -> None:
        del self.known[key]
        self.num_dropped += 1

    @property
    def state_bytes(self) -> int:
        return 8 * sum(map(len, self.known.values()))


def equip(core: EngineCore, drafter: Scripted, *, max_rows: int = 64) -> EngineCore:
    """The core guesses with this drafter, and every plan it makes is checked."""
    vocab_size = core.runner.model.vocab_size  # type: ignore[attr-defined]
    core.speculation = Speculation(lambda name: drafter, FixedBudget(max_rows), vocab_size)
    schedule = core.scheduler.schedule

    def checked() -> StepPlan:
        plan = schedule()
        check_invariants(core.scheduler, plan)
        return plan

    core.scheduler.schedule = checked  # type: ignore[method-assign]
    return core


def speculating(requests: Sequence[EngineRequest], max_nodes: int = 8) -> list[EngineRequest]:
    choice = {"drafters": NAME, "max_nodes": max_nodes}
    return [msgspec.structs.replace(request, speculative=choice) for request in requests]


# ---- guesses


def nothing(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
    return EMPTY


def random_chain(vocab_size: int) -> Guess:
    def guess(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        return DraftTree.chain([generator.randrange(vocab_size) for _ in range(cap)], source=NAME)

    return guess


def random_tree(vocab_size: int) -> Guess:
    def guess(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        return tree_of([generator.randrange(vocab_size) for _ in range(cap)], generator)

    return guess


def too_deep(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
    """More nodes than allowed, deeper than the request can go on."""
    return DraftTree.chain([7] * (cap + 40), source=NAME)


def with_ends(eos: int) -> Guess:
    """End-of-sequence in the middle, and what would follow it."""

    def guess(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        return DraftTree.chain([eos if i % 2 else 9 for i in range(cap)], source=NAME)

    return guess


def unknown_tokens(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
    return DraftTree.chain([3, 1 << 20], source=NAME)


def twins(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
    """Two siblings with one token: not a tree that may be checked."""
    return DraftTree((5, 5, 6), (-1, -1, 0), (0.5, 0.5, 0.5), (NAME,) * 3)


def raising(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
    raise RuntimeError("a drafter that fails")


def oracle(truth: Truth, num_wrong: int = 0, vocab_size: int = 300) -> Guess:
    """The true continuation, each token of it hidden among up to `num_wrong` siblings."""

    def guess(view: RequestView, cap: int, generator: random.Random) -> DraftTree:
        request_id, _, choice = view.key.rpartition("/")
        outputs = truth[request_id, int(choice)]
        place = len(view.token_ids) - view.num_prompt_tokens
        tokens: list[int] = []
        parents: list[int] = []
        last = -1
        for right in outputs[place : place + cap]:
            siblings = {generator.randrange(vocab_size) for _ in range(generator.randint(0, num_wrong))} | {right}
            level = sorted(siblings, key=lambda _: generator.random())
            parents += [last] * len(level)
            last = len(tokens) + level.index(right)
            tokens += level
        tokens, parents = tokens[:cap], parents[:cap]
        return DraftTree(tuple(tokens), tuple(parents), (0.5,) * len(tokens), (NAME,) * len(tokens))

    return guess


def tree_of(tokens: Sequence[int], generator: random.Random) -> DraftTree:
    """Tokens hung below random earlier ones, but for those that would repeat a sibling."""
    kept: list[int] = []
    parents: list[int] = []
    seen: set[tuple[int, int]] = set()
    for token in tokens:
        parent = generator.randint(-1, len(kept) - 1)
        if (parent, token) not in seen:
            seen.add((parent, token))
            kept.append(token)
            parents.append(parent)
    return DraftTree(tuple(kept), tuple(parents), (0.5,) * len(kept), (NAME,) * len(kept))
