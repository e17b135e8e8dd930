"""Order of service: priority, then round robin over tenants, then arrival."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from engine.scheduling.queue import LazyHeap, WaitingQueue
from engine.scheduling.request import Family, Request
from engine.types import EngineRequest, SamplingParams


def make(number: int, *, tenant: str = "", priority: int = 0, choice: int = 0, num_tokens: int = 3) -> Request:
    engine_request = EngineRequest(
        request_id=f"r{number}",
        prompt_token_ids=[0] * num_tokens,
        sampling=SamplingParams(),
        tenant=tenant,
        priority=priority,
    )
    family = Family(engine_request, number, arrival_s=float(number), stop_ids=frozenset(), max_tokens=1)
    return Request(family, choice, [0] * num_tokens, num_tokens, chain=None, waiting_since_s=float(number))


def drain(queue: WaitingQueue) -> list[Request]:
    order = []
    while (request := queue.first()) is not None:
        queue.take(request)
        order.append(request)
    return order


def test_lower_priority_numbers_come_first() -> None:
    queue = WaitingQueue()
    requests = [make(i, priority=p) for i, p in enumerate([5, -1, 0, 5, -1])]
    for request in requests:
        queue.push(request)
    assert [r.priority for r in drain(queue)] == [-1, -1, 0, 5, 5]


def test_tenants_take_turns_and_each_is_served_in_order() -> None:
    queue = WaitingQueue()
    numbers = {"a": range(6), "b": range(6, 8), "c": range(8, 9)}
    for tenant, arrivals in numbers.items():
        for number in arrivals:
            queue.push(make(number, tenant=tenant))
    served = [(r.tenant, r.family.number) for r in drain(queue)]
    assert [tenant for tenant, _ in served] == ["a", "b", "c", "a", "b", "a", "a", "a", "a"]
    for tenant, arrivals in numbers.items():
        assert [number for owner, number in served if owner == tenant] == list(arrivals)


def test_nobody_waits_longer_than_a_round_per_request_before_it() -> None:
    """A tenant that floods the queue delays another one's request by one turn, not by its flood."""
    queue = WaitingQueue()
    for number in range(1000):
        queue.push(make(number, tenant="flood"))
    queue.push(make(1000, tenant="quiet"))
    assert "quiet" in [r.tenant for r in drain(queue)[:2]]


def test_a_preempted_request_takes_its_place_by_arrival_again() -> None:
    queue = WaitingQueue()
    old, new = make(1), make(2)
    queue.push(new)
    queue.push(old)
    assert drain(queue) == [old, new]


def test_the_head_stays_until_it_is_taken_or_discarded() -> None:
    queue = WaitingQueue()
    first, second = make(1, tenant="a"), make(2, tenant="b")
    queue.push(first)
    queue.push(second)
    assert queue.first() is queue.first() is first
    queue.push(make(3, tenant="c"))
    assert queue.first() is first
    assert queue.discard(first)
    assert not queue.discard(first)
    assert queue.first() is second


def test_lengths_tokens_and_age_follow_every_change() -> None:
    queue = WaitingQueue()
    assert queue.oldest_since_s() is None
    leader, sibling, other = make(1, num_tokens=10), make(1, choice=1, num_tokens=10), make(2, num_tokens=5)
    for request in (other, leader, sibling):
        queue.push(request)
    assert (len(queue), queue.num_tokens, queue.oldest_since_s()) == (3, 16, 1.0)
    queue.discard(leader)
    queue.discard(sibling)
    assert (len(queue), queue.num_tokens, queue.oldest_since_s()) == (1, 5, 2.0)
    queue.take(other)
    assert (len(queue), queue.num_tokens, queue.first()) == (0, 0, None)


def test_lazy_heap_agrees_with_a_sorted_list() -> None:
    rng = random.Random(0)
    heap: LazyHeap[int] = LazyHeap()
    model: dict[int, tuple[int, int]] = {}
    for serial in range(3000):
        item = rng.randrange(40)
        if rng.random() < 0.5:
            key = rng.randrange(10)
            heap.push(key, item)
            model[item] = (key, serial)
        else:
            assert heap.discard(item) == (model.pop(item, None) is not None)
        assert len(heap) == len(model)
        expected = min(((key, s, i) for i, (key, s) in model.items()), default=None)
        assert heap.first() == (None if expected is None else (expected[0], expected[2]))


def test_lazy_heap_forgets_discarded_items() -> None:
    heap: LazyHeap[int] = LazyHeap()
    heap.push(0, -1)  # never leaves: what is behind it is never on top
    for item in range(10_000):
        heap.push(1, item)
        heap.discard(item)
    assert len(heap._heap) < 100


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_loses_and_duplicates_nobody(seed: int) -> None:
    rng = random.Random(seed)
    queue, waiting, served = WaitingQueue(), set(), Counter()
    for number in range(500):
        request = make(number, tenant=rng.choice("abc"), priority=rng.randrange(3))
        queue.push(request)
        waiting.add(request)
        if rng.random() < 0.3:
            gone = rng.choice(sorted(waiting, key=lambda r: r.order))
            assert queue.discard(gone)
            waiting.remove(gone)
        if rng.random() < 0.3 and (head := queue.first()) is not None:
            assert head.priority == min(r.priority for r in waiting)
            queue.take(head)
            waiting.remove(head)
            served[head] += 1
        assert len(queue) == len(waiting)
    assert set(drain(queue)) == waiting
    assert all(count == 1 for count in served.values())
