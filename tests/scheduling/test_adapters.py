"""The table of adapters: indices, versions that leave, and who still uses them, under random traffic."""

from __future__ import annotations

import functools
import random

import pytest

from engine.errors import InvalidParameter, ModelNotFound
from engine.scheduling.adapters import AdapterTable
from engine.scheduling.scheduler import Scheduler
from tests.scheduling.harness import Harness


class Indices(list[int]):
    """The indices that were given back, in order."""

    def __call__(self, index: int) -> None:
        self.append(index)


def test_an_index_is_given_back_when_the_last_choice_has_ended() -> None:
    freed = Indices()
    table = AdapterTable(2, freed)
    first, second = table.add("a@1"), table.add("b@1")
    assert sorted([first or 0, second or 0]) == [1, 2]
    assert table.acquire("a@1", 2) == first
    table.remove("a@1")
    assert ("a@1" in table, "b@1" in table, freed) == (False, True, [])
    with pytest.raises(ModelNotFound):
        table.check("a@1")
    table.release("a@1")
    assert (freed, table.users()) == ([], {"a@1": 1})
    table.release("a@1")
    assert (freed, table.users(), table.num_loaded) == ([first], {}, 1)
    assert table.add("c@1") == first
    table.remove("b@1")
    assert freed == [first, second]
    table.remove("b@1")
    table.remove("never")
    assert len(freed) == 2


def test_a_version_that_is_leaving_can_come_back_with_its_weights() -> None:
    freed = Indices()
    table = AdapterTable(1, freed)
    index = table.add("a@1")
    table.acquire("a@1", 1)
    table.remove("a@1")
    assert table.add("a@1") is None
    assert table.acquire("a@1", 1) == index
    table.release("a@1")
    table.release("a@1")
    assert freed == []


def test_a_full_table_has_room_for_one_replacement_only() -> None:
    table = AdapterTable(2)
    table.add("a@1")
    table.add("b@1")
    table.acquire("a@1", 1)
    with pytest.raises(InvalidParameter, match="2 adapters are loaded, the limit is 2"):
        table.check_room("c@1")
    with pytest.raises(InvalidParameter):
        table.add("c@1", replaces="never@1")
    assert table.add("a@2", replaces="a@1") == 3
    table.remove("a@1")
    for replaces in ("", "a@1", "a@2"):
        with pytest.raises(InvalidParameter, match="1 of them until their last requests end"):
            table.add("x@1", replaces=replaces)
    table.release("a@1")
    assert table.add("a@3", replaces="a@2") is not None


def test_without_capacity_there_is_only_the_base_model() -> None:
    table = AdapterTable()
    assert table.num_indices == 1
    table.check("")
    assert table.acquire("", 3) == 0
    table.release("")
    with pytest.raises(InvalidParameter):
        table.add("a@1")


@pytest.mark.parametrize("seed", range(4))
def test_counts_hold_under_random_traffic(seed: int) -> None:
    """Loads, unloads, aborts, preemptions and errors in any order; the harness checks the counts at every step."""
    rng = random.Random(seed)
    freed = Indices()
    table = AdapterTable(3, freed)
    harness = Harness(num_blocks=24, scheduler_type=functools.partial(Scheduler, adapters=table), max_num_seqs=5)
    given: list[int] = []
    for _ in range(400):
        key = f"{rng.choice('ab')}@{rng.randrange(2)}"
        action = rng.random()
        if action < 0.1 and table.num_loaded < 3:
            index = table.add(key)
            if index is not None:
                given.append(index)
        elif action < 0.2:
            table.remove(key)
        elif action < 0.5:
            prompt = [rng.randrange(8, 12) for _ in range(rng.randrange(1, 30))]
            choices = rng.choice([1, 1, 3])
            harness.try_add(prompt, adapter=rng.choice(["", key]), num_choices=choices, max_tokens=rng.randrange(1, 20))
        elif action < 0.58 and harness.requests:
            name = rng.choice(list(harness.requests))
            harness.step(while_running=lambda name=name: harness.abort(name))  # type: ignore[misc]
        else:
            harness.step()
    harness.run()
    harness.check_finished()
    assert table.users() == {}
    for key in ("a@0", "a@1", "b@0", "b@1"):
        table.remove(key)
    assert table.num_loaded == 0
    assert sorted(freed) == sorted(given)
    assert len(given) > 5
