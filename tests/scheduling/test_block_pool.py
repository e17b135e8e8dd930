"""The block pool against a naive model, and its rules one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.scheduling.block_pool import NULL_BLOCK, BlockAccountingError, BlockCounts, BlockPool, OutOfBlocks
from tests.scheduling.machines import case_of, pick, picks


def state_of(pool: BlockPool) -> tuple[object, ...]:
    blocks = range(pool.num_blocks)
    return (
        pool.counts,
        pool.num_available,
        tuple(pool.idle_blocks()),
        tuple((pool.num_references(b), pool.is_held(b), pool.is_published(b)) for b in blocks),
    )


def test_every_block_but_the_null_block_can_be_allocated_once() -> None:
    pool = BlockPool(8)
    blocks = pool.allocate(7)
    assert sorted(blocks) == [1, 2, 3, 4, 5, 6, 7]
    assert NULL_BLOCK not in blocks
    assert pool.counts == BlockCounts(free=0, active=7, cached=0, pinned=0)


def test_failed_allocation_changes_nothing() -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    before = state_of(pool)
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 of 3 available"):
        pool.allocate(2)
    assert state_of(pool) == before
    pool.free(held)
    assert len(pool.allocate(3)) == 3


def test_double_free_raises_and_changes_nothing() -> None:
    pool = BlockPool(6)
    first, second = pool.allocate(2)
    pool.free([second])
    before = state_of(pool)
    for illegal in ([second], [first, second], [first, first], [NULL_BLOCK], [-1], [6]):
        with pytest.raises(BlockAccountingError):
            pool.free(illegal)
        assert state_of(pool) == before


def test_a_shared_block_is_free_only_after_its_last_reference() -> None:
    pool = BlockPool(3)
    [block] = pool.allocate(1)
    pool.share([block])
    pool.free([block])
    assert pool.counts.active == 1
    pool.free([block])
    assert pool.counts == BlockCounts(free=2, active=0, cached=0, pinned=0)


def test_a_free_block_cannot_be_shared_or_published_or_pinned() -> None:
    pool = BlockPool(4, max_pinned=1)
    for action in (lambda: pool.share([1]), lambda: pool.publish(1), lambda: pool.pin([1]), lambda: pool.unpin([1])):
        with pytest.raises(BlockAccountingError):
            action()
    assert pool.counts.free == 3


def test_published_blocks_are_kept_and_reclaimed_from_the_end_of_the_oldest_sequence() -> None:
    pool = BlockPool(7)
    evicted: list[int] = []
    pool.set_evict_hook(evicted.append)
    old, new = pool.allocate(3), pool.allocate(3)
    for block in old + new:
        pool.publish(block)
    pool.free(old)
    pool.free(new)
    assert pool.counts == BlockCounts(free=0, active=0, cached=6, pinned=0)
    pool.allocate(4)
    assert evicted == [old[2], old[1], old[0], new[2]]


def test_a_reused_block_becomes_the_most_recently_used() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    for block in (first, second):
        pool.publish(block)
        pool.free([block])
    pool.share([first])
    pool.free([first])
    assert pool.idle_blocks() == [second, first]


def test_pinned_blocks_survive_pressure_up_to_their_bound() -> None:
    pool = BlockPool(5, max_pinned=2)
    blocks = pool.allocate(3)
    for block in blocks:
        pool.publish(block)
    pool.pin(blocks[:2])
    with pytest.raises(OutOfBlocks, match="max_pinned 2"):
        pool.pin(blocks[2:])
    pool.free(blocks)
    assert pool.counts == BlockCounts(free=1, active=0, cached=1, pinned=2)
    assert pool.capacity == 2
    assert set(pool.allocate(2)).isdisjoint(blocks[:2])
    pool.unpin(blocks[:2])
    assert pool.counts == BlockCounts(free=0, active=2, cached=2, pinned=0)


def test_a_pool_without_a_usable_block_is_refused() -> None:
    with pytest.raises(ValueError, match="leave none to use"):
        BlockPool(4, max_pinned=3)


class PoolMachine(RuleBasedStateMachine):
    """Compares counts and contents with plain dictionaries after every operation."""

    @initialize(num_blocks=st.integers(3, 64), max_pinned=st.integers(0, 1))
    def start(self, num_blocks: int, max_pinned: int) -> None:
        self.pool = BlockPool(num_blocks, max_pinned=max_pinned)
        self.refs = dict.fromkeys(range(1, num_blocks), 0)
        self.pins = dict.fromkeys(range(1, num_blocks), 0)
        self.published: set[int] = set()
        self.idle: list[int] = []
        self.pool.set_evict_hook(self.evicted)

    def evicted(self, block: int) -> None:
        assert self.idle.pop(0) == block, "not the least recently used one"
        self.published.remove(block)

    def held(self) -> list[int]:
        return [b for b in self.refs if self.refs[b]]

    def pinned(self) -> list[int]:
        return [b for b in self.pins if self.pins[b]]

    def is_free(self, block: int) -> bool:
        return not self.refs[block] and not self.pins[block] and block not in self.published

    def let_go(self, block: int) -> None:
        if not self.refs[block] and not self.pins[block] and block in self.published:
            self.idle.append(block)

    def take_up(self, block: int) -> None:
        if block in self.idle:
            self.idle.remove(block)

    def refuses(self, error: type[Exception], action: Callable[..., object], *arguments: object) -> None:
        before = state_of(self.pool)
        with pytest.raises(error):
            action(*arguments)
        assert state_of(self.pool) == before

    @rule(count=st.integers(0, 12))
    def allocate(self, count: int) -> None:
        free = [b for b in self.refs if self.is_free(b)]
        if count > len(free) + len(self.idle):
            self.refuses(OutOfBlocks, self.pool.allocate, count)
            return
        allowed = set(free) | set(self.idle[: max(0, count - len(free))])
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert set(blocks) <= allowed
        for block in blocks:
            self.refs[block] = 1

    @precondition(lambda self: self.held())
    @rule(first=picks, count=st.integers(1, 6))
    def free(self, first: int, count: int) -> None:
        held = self.held()
        blocks = [pick(first + i, held) for i in range(min(count, len(held)))]
        self.pool.free(blocks)
        for block in reversed(blocks):
            self.refs[block] -= 1
            self.let_go(block)

    @rule(index=picks)
    def free_too_much(self, index: int) -> None:
        unheld = [b for b in self.refs if not self.refs[b]]
        if unheld:
            self.refuses(BlockAccountingError, self.pool.free, [*self.held()[:1], pick(index, unheld)])

    @precondition(lambda self: self.held() or self.idle)
    @rule(index=picks)
    def share(self, index: int) -> None:
        block = pick(index, sorted({*self.held(), *self.idle}))
        self.pool.share([block])
        self.refs[block] += 1
        self.take_up(block)

    @precondition(lambda self: set(self.held()) - self.published)
    @rule(index=picks)
    def publish(self, index: int) -> None:
        block = pick(index, sorted(set(self.held()) - self.published))
        self.pool.publish(block)
        self.published.add(block)

    @precondition(lambda self: self.published)
    @rule(index=picks)
    def unpublish(self, index: int) -> None:
        block = pick(index, sorted(self.published))
        self.pool.unpublish(block)
        self.published.remove(block)
        self.take_up(block)

    @precondition(lambda self: self.published)
    @rule(index=picks)
    def pin(self, index: int) -> None:
        block = pick(index, sorted(self.published))
        if len({*self.pinned(), block}) > self.pool.max_pinned:
            self.refuses(OutOfBlocks, self.pool.pin, [block])
            return
        self.pool.pin([block])
        self.pins[block] += 1
        self.take_up(block)

    @precondition(lambda self: self.pinned())
    @rule(index=picks)
    def unpin(self, index: int) -> None:
        block = pick(index, self.pinned())
        self.pool.unpin([block])
        self.pins[block] -= 1
        self.let_go(block)

    @rule(count=st.integers(0, 8))
    def evict(self, count: int) -> None:
        expected = min(count, len(self.idle))
        assert self.pool.evict(count) == expected

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.pool.violations() == []
        assert self.pool.idle_blocks() == self.idle
        assert {b: self.pool.num_references(b) for b in self.refs} == self.refs
        assert self.pool.counts == BlockCounts(
            free=sum(1 for b in self.refs if self.is_free(b)),
            active=len(self.held()),
            cached=len(self.idle),
            pinned=sum(1 for b in self.pinned() if not self.refs[b]),
        )

    def teardown(self) -> None:
        for block in self.refs:
            for _ in range(self.refs[block]):
                self.pool.free([block])
            for _ in range(self.pins[block]):
                self.pool.unpin([block])
        self.idle = self.pool.idle_blocks()
        self.pool.evict(len(self.idle))
        assert self.pool.counts.free == self.pool.num_blocks - 1, "a block is missing after all is done"


TestPool = case_of(PoolMachine, 500, 100)
TestPoolLong = pytest.mark.slow(case_of(PoolMachine, 20_000, 100))
