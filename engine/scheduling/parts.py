"""Blocks broken into equal parts: one per layer, or one per layer and kv head. Integers only.

A block of the pool holds one unit per layer and kv head. A request whose layers or heads keep different numbers of
tokens gets its memory in such units, so that what one head gives up another may have. A broken block is held here with
one reference; it goes back to the pool when the last of its parts is free.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.scheduling.block_pool import BlockAccountingError, BlockPool, OutOfBlocks


class PartPool:
    """Part i of block b is number b * parts_per_block + i. Fuller blocks are filled first, so that others empty."""

    def __init__(self, pool: BlockPool, parts_per_block: int) -> None:
        self.parts_per_block = parts_per_block
        self._pool = pool
        self._free: dict[int, list[int]] = {}  # broken block -> its free parts
        self._by_room: list[set[int]] = [set() for _ in range(parts_per_block + 1)]  # broken blocks by number of those

    @property
    def broken_blocks(self) -> list[int]:
        return list(self._free)

    @property
    def num_free(self) -> int:
        """Free parts of blocks that are broken already."""
        return sum(room * len(blocks) for room, blocks in enumerate(self._by_room))

    @property
    def num_available(self) -> int:
        """Parts that `allocate` can hand out now."""
        return self.num_free + self._pool.num_available * self.parts_per_block

    def blocks_for(self, num_parts: int) -> int:
        """Blocks that so many parts fill."""
        return -(-num_parts // self.parts_per_block)

    def new_blocks_for(self, num_parts: int) -> int:
        """Blocks that `allocate` would break."""
        return self.blocks_for(max(0, num_parts - self.num_free))

    def num_from(self, num_blocks: int) -> int:
        """Parts that `allocate` can hand out if it breaks at most so many blocks."""
        return self.num_free + num_blocks * self.parts_per_block

    def allocate(self, num_parts: int) -> list[int]:
        """So many parts, or OutOfBlocks and no change."""
        if num_parts > self.num_available:
            raise OutOfBlocks(f"{num_parts} parts of blocks asked for, {self.num_available} available")
        for block_id in self._pool.allocate(self.new_blocks_for(num_parts)):
            first = block_id * self.parts_per_block
            self._free[block_id] = list(range(first + self.parts_per_block - 1, first - 1, -1))
            self._by_room[self.parts_per_block].add(block_id)
        parts: list[int] = []
        room = 1
        while len(parts) < num_parts:
            while not self._by_room[room]:
                room += 1
            block_id = next(iter(self._by_room[room]))
            count = min(room, num_parts - len(parts))
            free = self._free[block_id]
            parts += [free.pop() for _ in range(count)]
            self._move(block_id, room, room - count)
        return parts

    def free(self, parts: Sequence[int]) -> None:
        """Raises BlockAccountingError, with nothing changed, for a part that is not handed out."""
        if len(set(parts)) != len(parts):
            raise BlockAccountingError(f"parts freed twice in one call: {sorted(parts)}")
        for part in parts:
            block_id = part // self.parts_per_block
            if block_id not in self._free or part in self._free[block_id]:
                raise BlockAccountingError(f"part {part} of block {block_id} is not handed out")
        for part in parts:
            block_id = part // self.parts_per_block
            free = self._free[block_id]
            free.append(part)
            self._move(block_id, len(free) - 1, len(free))
            if len(free) == self.parts_per_block:
                self._by_room[self.parts_per_block].discard(block_id)
                del self._free[block_id]
                self._pool.free([block_id])

    def handed_out(self) -> set[int]:
        """Parts in use. For checks: takes time with the number of broken blocks."""
        first = self.parts_per_block
        everything = {part for block_id in self._free for part in range(block_id * first, (block_id + 1) * first)}
        return everything.difference(*self._free.values()) if self._free else set()

    def _move(self, block_id: int, room: int, new_room: int) -> None:
        self._by_room[room].discard(block_id)
        self._by_room[new_room].add(block_id)
