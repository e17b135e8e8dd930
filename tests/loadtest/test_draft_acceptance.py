"""The replay counts what a walk over a known text would accept."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from engine.speculation.base import RequestView
from engine.speculation.catalogue import drafters
from engine.speculation.tree import EMPTY, DraftTree
from loadtest.draft_acceptance import Sample, Tally, edited, replay, texts, walk


class Oracle:
    """Guesses the text itself, `right` tokens of it and then a wrong one."""

    name = "oracle"

    def __init__(self, text: list[int], right: int) -> None:
        self.text, self.right = text, right
        self.seen: list[int] = []

    def admit(self, key: str, token_ids: list[int], tenant: str) -> None:
        self.seen = list(token_ids)

    def propose(self, views: list[RequestView], caps: list[int]) -> list[DraftTree]:
        (view,) = views
        assert list(view.token_ids) == self.seen
        done = len(self.seen)
        tokens = [*self.text[done : done + self.right], -1][: view.max_depth]
        return [DraftTree.chain([token if token >= 0 else 999 for token in tokens], source="oracle")]

    def on_commit(self, key: str, tree: DraftTree, accepted: object, new_tokens: list[int], taps: object) -> None:
        self.seen += new_tokens

    def drop(self, key: str) -> None:
        assert self.seen == self.text


@pytest.mark.parametrize("right", [0, 1, 3])
def test_an_oracle_gains_what_it_guesses(right: int) -> None:
    text, tally = list(range(10 + 1 + 4 * (right + 1))), Tally()
    replay(Oracle(text, right), Sample(text, 10), "r", 16, tally)  # type: ignore[arg-type]
    assert (tally.steps, tally.tokens) == (4, 4 * (right + 1))
    assert tally.row()["tokens/step"] == right + 1


def test_a_walk_follows_the_text_through_the_tree() -> None:
    tree = DraftTree((1, 2, 3, 2), (-1, 0, -1, 2), (0.5, 0.4, 0.3, 0.2), ("s",) * 4)
    assert walk(tree, [3, 2, 9]) == [2, 3]
    assert walk(tree, [1, 3, 9]) == [0]
    assert walk(tree, [3, 2]) == [2]  # the last token is the target's own
    assert walk(EMPTY, [1, 2]) == []


def test_candidates_reach_the_drafter_that_wants_them() -> None:
    text = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    topk = np.array([[*text[1:], 0]] * 8, dtype=np.int32).T.copy()
    tally, drafter = Tally(), drafters.create("token_recycling", learn_prompt=0)
    replay(drafter, Sample(text, 1, topk), "r", 8, tally)
    assert tally.tokens > tally.steps


def test_texts_are_drawn_from_the_seed() -> None:
    assert list(texts("json", 2, 5)) == list(texts("json", 2, 5))
    assert edited("value = total_value", Random(0)) != "value = total_value"
