"""Speculation with low-rank adapters: rows of several adapters and of none check their drafts in one batch."""

from __future__ import annotations

import msgspec
import pytest

from tests.e2e.driving import request, run, tokens
from tests.e2e.test_lora import FAMILIES, Served, build, engine
from tests.speculation import hostile
from tests.speculation.hostile import Scripted, equip, speculating


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return build(FAMILIES[0], tmp_path_factory.mktemp("llama"), [("a", {"rank": 4}), ("b", {"rank": 8})])


def test_adapters_and_drafts_give_what_adapters_give_alone(served: Served) -> None:
    core, info = engine(served, ["a", "b"], budget=64)
    keys = ["", *(adapter.key for adapter in info.adapters)]
    requests = [
        msgspec.structs.replace(
            request(f"r{i}", [7 + i, 8, 9, 10 + i], max_tokens=24, temperature=0.8 * (i % 2), seed=i),
            adapter=keys[i % len(keys)],
        )
        for i in range(6)
    ]
    expected = tokens(run(core, requests))
    for num_wrong in (0, 2):
        core, _ = engine(served, ["a", "b"], budget=64)
        drafter = Scripted(hostile.oracle(expected, num_wrong=num_wrong, vocab_size=served.model.vocab_size))
        assert tokens(run(equip(core, drafter), speculating(requests, 10))) == expected
        assert drafter.num_accepted > 20
