"""How block tables shrink at the points of a cache plan. Writes the tables of requests, for the cache manager.

The blocks of survivors are settled when the step is planned, so the device needs no answer from the host; counts are
exact at once. Survivors stay in the request's own first blocks when nobody else can see those; else they are copied
into new ones, and the shared blocks, which nobody may write, keep the whole prompt for the next request.

A plan with one number for all layers and heads leaves one table of whole blocks. Where layers or heads keep different
numbers of tokens, there is a table for each of these groups after the first compaction, over parts of blocks.

A plan that packs takes new packed blocks, and what is older than the survivors leaves the table once it is packed. Here
the survivors are the newest blocks; they too are copied where others can see them, because nobody may hold a block of
the prefix cache without those before it. Where tokens are evicted and the others packed at one point, all that stays is
in new blocks. Packed blocks that are dropped later leave without a move; which ones, the device says.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.compression import CachePlan, Realisation
from engine.scheduling.parts import PartPool
from engine.scheduling.plan import Compaction
from engine.scheduling.request import BlockTable, Request


class Compactor:
    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self.part_pools: dict[int, PartPool] = {}  # by parts per block

    def pool_of(self, request: Request) -> BlockPool | PartPool:
        """Where the blocks of the request's tables are from."""
        plan = request.cache_plan
        if plan is None or not request.is_compressed or plan.num_groups == 1:
            return self._pool
        return self._parts(plan)

    def peak_blocks(self, plan: CachePlan | None, num_tokens: int) -> int:
        """The most blocks that a request with so many tokens holds at a time, the cache being empty at first."""
        side = self.side_blocks(plan, num_tokens)
        if plan is None or plan.first_point is None or num_tokens < plan.first_point:
            return self._blocks_for(num_tokens) + side
        new = self.blocks_left(plan, plan.first_point)
        return max(self._blocks_for(plan.first_point) + new, self._peak_after(plan, num_tokens)) + side

    def blocks_needed(self, request: Request) -> int:
        """The most blocks that a request holds until it has computed all tokens it has now."""
        plan = request.cache_plan
        if plan is None or not request.is_compressed:
            return self.peak_blocks(plan, request.num_tokens)
        num_left = request.num_tokens - request.num_computed_tokens
        side = self.side_blocks(plan, request.tables[0].num_slots + num_left)
        return self._peak_after(plan, request.num_tokens, request.num_computed_tokens) + side

    def blocks_left(self, plan: CachePlan, num_tokens: int) -> int:
        """Blocks that are left of a request at a point, after so many tokens; at most so many must be new."""
        slots = [plan.slots_at(num_tokens, group) for group in range(plan.num_groups)]
        return self._whole_blocks(plan, slots) + self._packed_blocks(plan, num_tokens)

    def exchange(self, request: Request, plan: CachePlan, num_tokens: int) -> tuple[int, int]:
        """New blocks, at most, that it takes to shrink a request by this plan after so many tokens, and those freed."""
        if plan.drops_at(num_tokens):
            return 0, len(request.packed) - self._packed_blocks(plan, num_tokens)
        return self.blocks_left(plan, num_tokens), self.num_held(request)

    def num_held(self, request: Request) -> int:
        """Blocks in the request's tables: parts of blocks count as the blocks that they would fill."""
        num_blocks = sum(len(table.block_ids) for table in request.tables) + len(request.packed) + len(request.side)
        pool = self.pool_of(request)
        return pool.blocks_for(num_blocks) if isinstance(pool, PartPool) else num_blocks

    def has_room(self, request: Request, num_tokens: int, num_new: int) -> bool:
        """Whether `num_new` blocks for its tables can be had, and those that `reserve` would take."""
        pool = self.pool_of(request)
        num_blocks = pool.new_blocks_for(num_new) if isinstance(pool, PartPool) else num_new
        counts = self._to_reserve(request, num_tokens)
        plan = request.cache_plan
        if counts and plan is not None:
            num_blocks += self._parts(plan).new_blocks_for(sum(counts)) if plan.num_groups > 1 else sum(counts)
        return num_blocks <= self._pool.num_available

    def reserve(self, request: Request, num_tokens: int) -> None:
        """Takes new blocks for the survivors, if the cache shrinks after so many tokens and they cannot stay."""
        plan = request.cache_plan
        counts = self._to_reserve(request, num_tokens)
        if counts and plan is not None:
            pool = self._parts(plan) if plan.num_groups > 1 else self._pool
            block_ids = pool.allocate(sum(counts))
            request.reserved = [[block_ids.pop() for _ in range(count)] for count in counts]

    def planned(self, request: Request, num_tokens: int) -> Compaction | None:
        """What the runner does after a chunk of so many tokens, for which there is room."""
        kept = self._kept(request, num_tokens)
        if kept is None:
            return None
        plan, num_computed = request.cache_plan, request.num_computed_tokens + num_tokens
        if plan is not None and plan.realisation is Realisation.BLOCKS:
            return Compaction(kept=kept, tables=())
        if plan is not None and plan.drops_at(num_computed):
            num_packed = self._packed_blocks(plan, num_computed)
            return Compaction(kept=kept, tables=(), num_packed=num_packed)
        if plan is not None and self._packs_at(plan, num_computed):
            packed, survivors = request.reserved or ([], [])
            newer = request.tables[0].block_ids[self._num_to_pack(request, num_tokens, kept) :]
            if plan.classes:
                newer = request.tables[0].block_ids[: self._blocks_for(kept[0])]
            return Compaction(kept=kept, tables=(tuple(survivors or newer),), packed=tuple(packed))
        tables = request.reserved or [
            table.block_ids[: self._blocks_for(count)] for table, count in zip(request.tables, kept, strict=True)
        ]
        return Compaction(kept=kept, tables=tuple(tuple(block_ids) for block_ids in tables))

    def apply(self, request: Request, kept_blocks: Sequence[int] = ()) -> None:
        """The survivors are in place: gives the other blocks back.

        kept_blocks   where whole blocks leave the table, or packed blocks the request: the places of those that stay
        """
        kept, plan = self._kept(request, 0), request.cache_plan
        assert kept is not None, "the chunk ended at a point"
        num_held = self.num_held(request)
        if plan is not None and plan.drops_at(request.num_computed_tokens):
            survivors = [request.packed[place] for place in kept_blocks]
            self._pool.free([block_id for block_id in request.packed if block_id not in survivors])
            request.packed = survivors
            request.num_packed = plan.packed_slots_at(request.num_computed_tokens)
            request.num_blocks_released += num_held - self.num_held(request)
            return
        if plan is not None and self._packs_at(plan, request.num_computed_tokens):
            self._apply_packed(request, 0 if plan.classes else self._num_to_pack(request, 0, kept))
            request.num_packed = plan.packed_slots_at(request.num_computed_tokens)
        elif kept_blocks:
            table = request.tables[0]
            survivors = [table.block_ids[place] for place in kept_blocks]
            self._pool.free([block_id for block_id in table.block_ids if block_id not in survivors])
            table.block_ids = survivors
        elif request.reserved:
            self._pool.free(request.tables[0].block_ids)
            request.tables = [BlockTable(block_ids=block_ids) for block_ids in request.reserved]
            request.reserved = []
        request.is_compressed = True
        pool = self.pool_of(request)
        for table, count in zip(request.tables, kept, strict=True):
            num_blocks = self._blocks_for(count)
            pool.free(table.block_ids[num_blocks:])
            del table.block_ids[num_blocks:]
            table.num_slots = count
            table.num_sent = num_blocks
            table.edits = []
        num_side = self.side_blocks(plan, request.tables[0].num_slots)
        self._pool.free(request.side[num_side:])
        del request.side[num_side:]
        request.num_side_sent = min(request.num_side_sent, num_side)
        request.num_blocks_released += num_held - self.num_held(request)

    def side_blocks(self, plan: CachePlan | None, num_slots: int) -> int:
        """Blocks for the side data of so many slots."""
        return 0 if plan is None or not plan.side_tokens else -(-num_slots // plan.side_tokens)

    def cancel(self, request: Request) -> None:
        """The compaction does not take place."""
        plan = request.cache_plan
        if request.reserved and plan is not None:
            pool = self._parts(plan) if plan.num_groups > 1 else self._pool
            pool.free([block_id for block_ids in request.reserved for block_id in block_ids])
            request.reserved = []

    def _kept(self, request: Request, num_tokens: int) -> tuple[int, ...] | None:
        """Slots of each group after a compaction that so many more tokens lead to, None when they lead to none."""
        plan = request.cache_plan
        num_computed = request.num_computed_tokens + num_tokens
        if plan is None or not plan.is_point(num_computed):
            return None
        return tuple([plan.slots_at(num_computed, group) for group in range(plan.num_groups)])

    def _to_reserve(self, request: Request, num_tokens: int) -> list[int]:
        """New blocks for the survivors of each group; empty when they stay where they are."""
        kept, plan = self._kept(request, num_tokens), request.cache_plan
        num_computed = request.num_computed_tokens + num_tokens
        if plan is not None and kept is not None and self._packs_at(plan, num_computed) and not request.reserved:
            is_in_place = num_computed != plan.first_point or not plan.num_evicted
            is_in_place = is_in_place and self._has_own_newest(request, num_tokens, kept)
            if plan.classes:
                is_in_place = self._is_private(request, kept)
            counts = [
                self._packed_blocks(plan, num_computed) - len(request.packed),
                0 if is_in_place else self._blocks_for(kept[0]),
            ]
            return counts if any(counts) else []
        if plan is not None and plan.drops_at(num_computed):
            return []
        if kept is None or request.reserved or self._is_private(request, kept):
            return []
        if plan is not None and plan.realisation is Realisation.BLOCKS:
            return []
        return [self._blocks_for(count) for count in kept]

    def _is_private(self, request: Request, kept: Sequence[int]) -> bool:
        """Whether the blocks that survivors would go to are seen by nobody else, and will not be."""
        if request.is_compressed:
            return True
        if len(kept) > 1 or request.chain is not None:
            return False  # a new kind of table, or the blocks of the prompt enter the prefix cache
        block_ids = request.tables[0].block_ids[: self._blocks_for(kept[0])]
        return all(self._pool.num_references(block_id) == 1 for block_id in block_ids)

    def _packs_at(self, plan: CachePlan, num_computed: int) -> bool:
        """Whether the compaction at this point puts tokens into packed blocks."""
        return plan.packed_slots_at(num_computed) > 0 and not plan.drops_at(num_computed)

    def _num_to_pack(self, request: Request, num_tokens: int, kept: Sequence[int]) -> int:
        """First blocks of the table that are packed after so many more tokens."""
        return (request.tables[0].num_slots + num_tokens - kept[0]) // self._block_size

    def _apply_packed(self, request: Request, num_packed: int) -> None:
        """The first blocks have been packed: they leave the table, and the others move up or have been copied."""
        table = request.tables[0]
        packed, survivors = request.reserved or ([], [])
        request.packed += packed
        request.reserved = []
        num_left = len(table.block_ids) if survivors else num_packed
        self._pool.free(table.block_ids[:num_left])
        table.block_ids = survivors or table.block_ids[num_left:]

    def _has_own_newest(self, request: Request, num_tokens: int, kept: Sequence[int]) -> bool:
        """Whether the blocks that are not packed after so many more tokens are seen by nobody else, and will not be."""
        if request.is_compressed:
            return True
        newer = request.tables[0].block_ids[self._num_to_pack(request, num_tokens, kept) :]
        shared = (b for b in newer if self._pool.num_references(b) > 1 or self._pool.is_published(b))
        return request.chain is None and next(shared, None) is None

    def _packed_blocks(self, plan: CachePlan, num_tokens: int) -> int:
        """Packed blocks of a request that has computed so many tokens."""
        return plan.packed_blocks_at(num_tokens, self._block_size) if plan.places else 0

    def _peak_after(self, plan: CachePlan, num_tokens: int, num_computed: int = 0) -> int:
        """The most blocks from so many computed tokens on; packed ones are the most at the end, or before some go."""
        num_blocks = self._whole_blocks(plan, [plan.peak_after(num_tokens, group) for group in range(plan.num_groups)])
        before_drops = [at - 1 for at, _ in plan.drops if num_computed < at <= num_tokens]
        return num_blocks + max([self._packed_blocks(plan, count) for count in (num_tokens, *before_drops)])

    def _whole_blocks(self, plan: CachePlan, num_slots: Sequence[int]) -> int:
        """Blocks that tables with so many slots fill."""
        num_blocks = sum(self._blocks_for(count) for count in num_slots)
        return self._parts(plan).blocks_for(num_blocks) if plan.num_groups > 1 else num_blocks

    def _parts(self, plan: CachePlan) -> PartPool:
        pool = self.part_pools.get(plan.num_groups)
        if pool is None:
            pool = self.part_pools[plan.num_groups] = PartPool(self._pool, plan.num_groups)
        return pool

    def _blocks_for(self, num_slots: int) -> int:
        return -(-num_slots // self._block_size)
