"""Which cache blocks are free, in use, or kept for reuse. Integers only: no tokens, no hashes, no requests.

A block is a bundle: the keys and values of as many tokens in every layer and kv head. `engine.scheduling.parts` breaks
blocks into smaller parts; here such a block is one that is in use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

NULL_BLOCK = 0  # padding of block tables: never handed out, never freed, never written


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are free or reclaimable. Nothing was changed."""


class BlockAccountingError(RuntimeError):
    """The caller broke the rules (double free, unknown block...): a bug of ours. Nothing was changed."""


class BlockCounts(NamedTuple):
    """Every block but the null block is in exactly one of these states."""

    free: int  # holds nothing
    active: int  # referenced by at least one block table
    cached: int  # referenced by nobody, published, reclaimed on demand
    pinned: int  # referenced by pins only


def _keep_nothing(block_id: int) -> None:
    """The eviction hook of a pool without a prefix cache."""


class BlockPool:
    """Reference counts over blocks 1 .. num_blocks - 1.

    A block is referenced once per block table that contains it, and once per pin. A *published* block (one that the
    prefix cache knows) goes to an idle list when its last reference goes, and is reclaimed from there, least recently
    used first, when the free list is empty. `free` puts the end of a sequence on the idle list before its beginning:
    with the rule that whoever holds a published block also holds the ones before it, the oldest idle block never has
    a cached successor, so that reclaiming is leaves-first without any bookkeeping about children.

    All methods take time proportional to the number of blocks they are given.
    """

    def __init__(self, num_blocks: int, *, max_pinned: int = 0) -> None:
        """`max_pinned`: how many blocks pins may hold, so that what one sequence can get (`capacity`) is constant."""
        if num_blocks - 1 - max_pinned < 1:
            raise ValueError(f"{num_blocks} blocks minus the null block and {max_pinned} for pins leave none to use")
        self.num_blocks = num_blocks
        self.max_pinned = max_pinned
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))  # a stack: the lowest id comes first
        self._refs = [0] * num_blocks
        self._pins = [0] * num_blocks
        self._published = bytearray(num_blocks)
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._num_with_pins = 0
        self._num_pinned_only = 0
        self._on_evict: Callable[[int], None] = _keep_nothing

    def set_evict_hook(self, on_evict: Callable[[int], None]) -> None:
        """`on_evict(block_id)` is called when an idle block is reclaimed, before it can be handed out again."""
        self._on_evict = on_evict

    @property
    def capacity(self) -> int:
        """Blocks that one sequence can have when it is alone."""
        return self.num_blocks - 1 - self.max_pinned

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now: free ones and reclaimable ones."""
        return len(self._free) + len(self._idle)

    @property
    def counts(self) -> BlockCounts:
        free, cached, pinned = len(self._free), len(self._idle), self._num_pinned_only
        return BlockCounts(free, self.num_blocks - 1 - free - cached - pinned, cached, pinned)

    def num_references(self, block_id: int) -> int:
        """Block tables that contain the block."""
        return self._refs[block_id]

    def is_held(self, block_id: int) -> bool:
        return self._refs[block_id] > 0 or self._pins[block_id] > 0

    def is_published(self, block_id: int) -> bool:
        return bool(self._published[block_id])

    def allocate(self, num_blocks: int) -> list[int]:
        """So many blocks with one reference each, or OutOfBlocks and no change."""
        if num_blocks > self.num_available:
            raise OutOfBlocks(f"{num_blocks} blocks asked for, {self.num_available} of {self.num_blocks - 1} available")
        if num_blocks > len(self._free):
            self.evict(num_blocks - len(self._free))
        block_ids = [self._free.pop() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._refs[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """One more reference on each: blocks that are held, or idle in the prefix cache."""
        block_ids = list(block_ids)
        for block_id in block_ids:
            self._require(self.is_held(block_id) or block_id in self._idle, block_id, "shared", "it is free")
        for block_id in block_ids:
            self._leave_idle(block_id)
            if self._refs[block_id] == 0 and self._pins[block_id] > 0:
                self._num_pinned_only -= 1
            self._refs[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """One reference less on each. Give a sequence's blocks from its beginning to its end, each once per call.

        Raises BlockAccountingError, with nothing changed, when a block has no reference to give back.
        """
        if len(set(block_ids)) != len(block_ids):
            raise BlockAccountingError(f"blocks freed twice in one call: {sorted(block_ids)}")
        for block_id in block_ids:
            self._require(NULL_BLOCK < block_id < self.num_blocks, block_id, "freed", "it is no block of this pool")
            self._require(self._refs[block_id] > 0, block_id, "freed", "no table references it")
        for block_id in reversed(block_ids):
            self._refs[block_id] -= 1
            if self._refs[block_id] == 0:
                self._retire(block_id)

    def publish(self, block_id: int) -> None:
        """The prefix cache knows this block from now on: nobody may write to it."""
        self._require(self._refs[block_id] > 0, block_id, "published", "no table references it")
        self._require(not self._published[block_id], block_id, "published", "it is published")
        self._published[block_id] = 1

    def unpublish(self, block_id: int) -> None:
        """The prefix cache forgets this block. An idle one becomes free."""
        self._require(bool(self._published[block_id]), block_id, "unpublished", "it is not published")
        self._published[block_id] = 0
        if block_id in self._idle:
            self._leave_idle(block_id)
            self._free.append(block_id)

    def pin(self, block_ids: Sequence[int]) -> None:
        """Keeps published blocks from being reclaimed. Pin whole prefixes, so that no successor outlives its base.

        Raises OutOfBlocks, with nothing changed, when pins would hold more than `max_pinned` blocks.
        """
        for block_id in block_ids:
            self._require(bool(self._published[block_id]), block_id, "pinned", "it is not published")
        num_new = sum(1 for block_id in block_ids if self._pins[block_id] == 0)
        if self._num_with_pins + num_new > self.max_pinned:
            raise OutOfBlocks(
                f"pinning {num_new} more blocks exceeds max_pinned {self.max_pinned}: {self._num_with_pins} are pinned"
            )
        for block_id in block_ids:
            self._leave_idle(block_id)
            if self._pins[block_id] == 0:
                self._num_with_pins += 1
                self._num_pinned_only += self._refs[block_id] == 0
            self._pins[block_id] += 1

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Takes one pin off each; same order and same errors as `free`."""
        if len(set(block_ids)) != len(block_ids):
            raise BlockAccountingError(f"blocks unpinned twice in one call: {sorted(block_ids)}")
        for block_id in block_ids:
            self._require(self._pins[block_id] > 0, block_id, "unpinned", "it has no pin")
        for block_id in reversed(block_ids):
            self._pins[block_id] -= 1
            if self._pins[block_id] == 0:
                self._num_with_pins -= 1
                if self._refs[block_id] == 0:
                    self._num_pinned_only -= 1
                    self._retire(block_id)

    def evict(self, num_blocks: int) -> int:
        """Reclaims up to so many idle blocks, least recently used first. Returns how many."""
        num_evicted = min(num_blocks, len(self._idle))
        for _ in range(num_evicted):
            block_id, _ = self._idle.popitem(last=False)
            self._published[block_id] = 0
            self._on_evict(block_id)
            self._free.append(block_id)
        return num_evicted

    def violations(self) -> list[str]:
        """What is wrong with the accounting: empty when all is well. Looks at every block."""
        problems = []
        free = set(self._free)
        if len(free) != len(self._free):
            problems.append("the free list has duplicates")
        if NULL_BLOCK in free or self.is_held(NULL_BLOCK) or self._published[NULL_BLOCK]:
            problems.append("the null block is in circulation")
        for block_id in range(1, self.num_blocks):
            refs, pins, published = self._refs[block_id], self._pins[block_id], bool(self._published[block_id])
            idle = block_id in self._idle
            if refs < 0 or pins < 0:
                problems.append(f"block {block_id} has {refs} references and {pins} pins")
            if (refs > 0 or pins > 0) + idle + (block_id in free) != 1:
                problems.append(f"block {block_id} is not in exactly one state: {refs=} {pins=} {idle=}")
            if idle and not published:
                problems.append(f"block {block_id} is kept but not published")
            if block_id in free and published:
                problems.append(f"block {block_id} is free but published")
        with_pins = [b for b in range(1, self.num_blocks) if self._pins[b] > 0]
        pinned_only = sum(1 for b in with_pins if self._refs[b] == 0)
        if (len(with_pins), pinned_only) != (self._num_with_pins, self._num_pinned_only):
            problems.append(f"{len(with_pins)} pinned blocks, {self._num_with_pins} counted")
        return problems

    def idle_blocks(self) -> list[int]:
        """Reclaimable blocks, the next to go first. For checks and reports: takes time with their number."""
        return list(self._idle)

    def _retire(self, block_id: int) -> None:
        """The last table reference went, or the last pin of a block without one."""
        if self._pins[block_id]:
            self._num_pinned_only += 1
        elif self._published[block_id]:
            self._idle[block_id] = None
        else:
            self._free.append(block_id)

    def _leave_idle(self, block_id: int) -> None:
        if block_id in self._idle:
            del self._idle[block_id]

    def _require(self, is_legal: bool, block_id: int, verb: str, reason: str) -> None:
        if not is_legal:
            raise BlockAccountingError(f"block {block_id} cannot be {verb}: {reason}")
