"""Gives requests their cache blocks: admission, growth, sharing, forking, publication, release.

The only writer of block tables. Knows requests and block ids; never priorities, rows or outputs.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.compactor import Compactor
from engine.scheduling.compression import CachePlan
from engine.scheduling.parts import PartPool
from engine.scheduling.prefix_cache import HashChain, PrefixCache, PrefixStats
from engine.scheduling.request import BlockTable, Request


class CacheManager:
    """Block tables over one pool, with or without a prefix cache.

    A request is admitted when all tokens it comes with will find room, but takes blocks only as it computes. The
    difference is *promised*: other admissions cannot have it. Growth by generated tokens is not promised; when it
    meets an empty pool, the scheduler preempts.
    """

    def __init__(self, pool: BlockPool, block_size: int, prefix_cache: PrefixCache | None) -> None:
        self.pool = pool
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.num_promised = 0  # blocks
        self.compaction = Compactor(pool, block_size)
        self._promised: dict[Request, int] = {}  # of each running request, where not zero

    def num_promised_to(self, request: Request) -> int:
        return self._promised.get(request, 0)

    def new_chain(
        self, tenant: str, cache_salt: str, adapter: str = "", plan: CachePlan | None = None
    ) -> HashChain | None:
        """adapter: key of the low-rank adapter, on which keys and values depend, as on the plan of one that seals."""
        if self.prefix_cache is None:
            return None
        if plan is None or not plan.seals:
            return self.prefix_cache.chain(tenant, cache_salt, adapter=adapter)
        kv_format = f"sealed {plan.format} {plan.period}"
        return self.prefix_cache.chain(tenant, cache_salt, adapter=adapter, kv_format=kv_format, block_size=plan.period)

    @property
    def prefix_stats(self) -> PrefixStats:
        return PrefixStats() if self.prefix_cache is None else self.prefix_cache.stats

    @property
    def num_slots(self) -> int:
        """Tokens that a request can have in the cache when it is alone."""
        return self.pool.capacity * self.block_size

    def blocks_for(self, num_slots: int) -> int:
        return -(-num_slots // self.block_size)

    def fits_alone(self, num_tokens: int, plan: CachePlan | None = None) -> bool:
        """Whether one request that computes so many tokens could ever run."""
        return self.compaction.peak_blocks(plan, num_tokens) <= self.pool.capacity

    def has_room(self, request: Request, num_spare_blocks: int) -> bool:
        """Whether `admit` would let a waiting request in, as far as can be told without looking at its tokens again."""
        num_held = 0
        if self.prefix_cache is not None and request.chain is not None and not _needs_all_tokens(request):
            request.chain.extend(request.token_ids)
            _, num_held = self.prefix_cache.estimate(request.chain, self._max_hits(request))
        room = self.pool.num_available - self.num_promised - num_spare_blocks
        return self.compaction.blocks_needed(request) - num_held <= room

    def admit(self, request: Request, num_spare_blocks: int) -> bool:
        """Gives a waiting request the cached blocks of its beginning, if there is room for all its other tokens.

        num_spare_blocks   blocks that must stay available beyond that
        Sets `num_computed_tokens` to what the cached blocks hold. A refusal changes nothing and, however long the
        request is, costs O(log) once its tokens are hashed.
        """
        num_needed = self.compaction.blocks_needed(request)
        room = self.pool.num_available - self.num_promised - num_spare_blocks
        hits: list[int] = []
        if self.prefix_cache is None or request.chain is None or _needs_all_tokens(request):
            if num_needed > room:
                return False
            if request.cache_miss is None:
                request.cache_miss = self._why_not_looked_up()
        else:
            max_hits = self._max_hits(request)
            request.chain.extend(request.token_ids)
            _, num_held = self.prefix_cache.estimate(request.chain, max_hits)
            if num_needed - num_held > room:
                return False
            hits = self.prefix_cache.match(request.chain, request.token_ids, max_hits)
            if num_needed - sum(1 for block_id in hits if self.pool.is_held(block_id)) > room:
                return False
            self.prefix_cache.record_query(request.num_tokens, len(hits) * request.chain.block_size)
            self.pool.share(hits)
            if request.cache_miss is None:
                request.cache_miss = self._why_missing(request, len(hits), max_hits)
        request.num_published_blocks = len(hits)
        if _seals(request):
            self._start_sealed(request, hits)
        else:
            self._start(request, hits, len(hits) * self.block_size)
        return True

    def _max_hits(self, request: Request) -> int:
        """Blocks that may come from the prefix cache: always computed are the last token, whose logits choose the next
        one, what the cache policy looks at, and what comes after a compaction.
        """
        num_tokens = request.num_tokens - 1
        plan = request.cache_plan
        if plan is not None and plan.seals:
            return num_tokens // plan.period
        if plan is not None:
            num_tokens = min(num_tokens, max(0, request.num_prompt_tokens - plan.num_queries))
            if plan.first_point is not None:
                num_tokens = min(num_tokens, plan.first_point - 1)
        return num_tokens // self.block_size

    def _why_not_looked_up(self) -> str:
        if self.prefix_cache is None:
            return "disabled"
        self.prefix_cache.stats.misses["whole_prompt"] += 1
        return "whole_prompt"

    def _why_missing(self, request: Request, num_hits: int, max_hits: int) -> str:
        """One of MISS_REASONS, counted; "" when everything was found that could be."""
        assert self.prefix_cache is not None
        assert request.chain is not None
        if max_hits == 0:
            reason = "too_short"
        elif num_hits == max_hits:
            return ""
        else:
            reason = self.prefix_cache.why_missing(request.chain, request.token_ids, num_hits)
        self.prefix_cache.stats.misses[reason] += 1
        return reason

    def fork(self, request: Request, source: Request, num_spare_blocks: int) -> tuple[tuple[int, int], ...] | None:
        """Starts a request on the prompt blocks of a running one of its family, all but the last token.

        Full blocks are shared; a partly filled one must be copied before the step runs, because both go on writing
        there. Returns those copies as (source block, destination block), or None, with nothing changed, without room.
        """
        num_computed = request.num_tokens - 1
        num_shared, num_in_last = divmod(num_computed, self.block_size)
        room = self.pool.num_available - self.num_promised - num_spare_blocks
        if self.blocks_for(request.num_tokens) - num_shared > room:
            return None
        shared = source.tables[0].block_ids[:num_shared]
        self.pool.share(shared)
        own = self.pool.allocate(1) if num_in_last else []
        request.chain = source.chain.fork(num_shared) if source.chain is not None else None
        request.num_published_blocks = min(source.num_published_blocks, num_shared)
        copies = tuple((source.tables[0].block_ids[num_shared], block_id) for block_id in own)
        self._start(request, shared + own, num_computed)
        return copies

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Makes room for the next `num_tokens` tokens, and for the survivors of a compaction after them; False, with
        nothing changed, when blocks are lacking.
        """
        num_new = [self._num_lacking(table, num_tokens) for table in request.tables]
        num_side = self._num_side_lacking(request, num_tokens)
        if not self.compaction.has_room(request, num_tokens, sum(num_new) + num_side):
            return False
        num_available = self.pool.num_available
        self._extend(request, num_new)
        request.side += self.pool.allocate(num_side)
        self.compaction.reserve(request, num_tokens)
        self._take_promised(request, num_available - self.pool.num_available)
        return True

    def _extend(self, request: Request, num_new: Sequence[int]) -> None:
        """So many more blocks, or parts of blocks, for each table."""
        block_ids = self.compaction.pool_of(request).allocate(sum(num_new))[::-1]
        for table, count in zip(request.tables, num_new, strict=True):
            table.block_ids += [block_ids.pop() for _ in range(count)]

    def num_lacking(self, request: Request, num_tokens: int) -> int:
        """Blocks, or parts of blocks, that the next so many tokens want."""
        num_blocks = sum(self._num_lacking(table, num_tokens) for table in request.tables)
        return num_blocks + self._num_side_lacking(request, num_tokens)

    def _num_side_lacking(self, request: Request, num_tokens: int) -> int:
        num_slots = request.tables[0].num_slots + num_tokens
        return max(0, self.compaction.side_blocks(request.cache_plan, num_slots) - len(request.side))

    def _num_lacking(self, table: BlockTable, num_tokens: int) -> int:
        return max(0, self.blocks_for(table.num_slots + num_tokens) - len(table.block_ids))

    @property
    def num_unclaimed_slots(self) -> int:
        """Slots in blocks that are there for the taking, and that nobody counts on."""
        return max(0, self.pool.num_available - self.num_promised) * self.block_size

    def grow_for_draft(self, request: Request, num_tokens: int, num_nodes: int) -> int:
        """Makes room for guessed tokens behind the next `num_tokens`, from blocks that nobody counts on: how many fit.

        `trim` gives back what they leave unused.
        """
        pool = self.compaction.pool_of(request)
        room = max(0, self.pool.num_available - self.num_promised)
        if isinstance(pool, PartPool):
            room = pool.num_from(room)
        counts = range(1, num_nodes + 1)
        num_fitting = bisect.bisect_right(counts, room, key=lambda count: self.num_lacking(request, num_tokens + count))
        if num_fitting:
            num_side = self._num_side_lacking(request, num_tokens + num_fitting)
            self._extend(request, [self._num_lacking(table, num_tokens + num_fitting) for table in request.tables])
            request.side += self.pool.allocate(num_side)
        return num_fitting

    def trim(self, request: Request) -> None:
        """Takes back the blocks, or parts of blocks, behind the last one in use of every table."""
        pool = self.compaction.pool_of(request)
        for table in request.tables:
            num_used = self.blocks_for(table.num_slots)
            pool.free(table.block_ids[num_used:])
            del table.block_ids[num_used:]
            table.num_sent = min(table.num_sent, num_used)
        num_side = self.compaction.side_blocks(request.cache_plan, request.tables[0].num_slots)
        self.pool.free(request.side[num_side:])
        del request.side[num_side:]
        request.num_side_sent = min(request.num_side_sent, num_side)

    def take_new_blocks(self, request: Request) -> tuple[int, ...]:
        """Blocks of the table that the runner does not know yet; from now on it does. None where there are several."""
        if len(request.tables) > 1:
            return ()
        table = request.tables[0]
        if table.num_sent == len(table.block_ids):
            return ()
        new = tuple(table.block_ids[table.num_sent :])
        table.num_sent = len(table.block_ids)
        return new

    def take_new_parts(self, request: Request) -> tuple[tuple[int, int], ...]:
        """(table, part of a block) that the runner does not know yet; from now on it does."""
        if len(request.tables) == 1:
            return ()
        new = []
        for group, table in enumerate(request.tables):
            new += [(group, part) for part in table.block_ids[table.num_sent :]]
            table.num_sent = len(table.block_ids)
        return tuple(new)

    def take_new_side(self, request: Request) -> tuple[int, ...]:
        """Blocks for side data that the runner does not know yet; from now on it does."""
        new = tuple(request.side[request.num_side_sent :])
        request.num_side_sent = len(request.side)
        return new

    def take_packed_edits(self, request: Request) -> tuple[tuple[int, int], ...]:
        """As `take_edits`, of packed blocks."""
        edits, request.packed_edits = tuple(request.packed_edits), []
        return edits

    def take_edits(self, request: Request) -> list[tuple[int, int]]:
        """Entries (index, block id) that the runner knows differently; from now on it knows them."""
        table = request.tables[0]
        edits, table.edits = table.edits, []
        return edits

    def advance(self, request: Request, num_tokens: int) -> None:
        """So many tokens have been computed."""
        request.num_computed_tokens += num_tokens
        for table in request.tables:
            table.num_slots += num_tokens
            request.peak_slots = max(request.peak_slots, table.num_slots)

    def publish(self, request: Request) -> None:
        """Offers the newly filled blocks to the prefix cache. To be called when their contents are known to be finite.

        Where an equal block is already there (two requests computed the same beginning side by side), the request
        changes over to it and gives its own back.
        """
        num_full = self._num_shareable(request) // self.block_size
        if self.prefix_cache is None or request.chain is None or num_full == request.num_published_blocks:
            return
        if _seals(request):
            return  # what it has in common with others is in packed blocks
        if request.is_compressed:
            return  # what the rest was computed from is not what the tokens say
        table = request.tables[0]
        request.chain.extend(request.token_ids)
        for index in range(request.num_published_blocks, num_full):
            own = table.block_ids[index]
            parent = table.block_ids[index - 1] if index else None
            block_id = self.prefix_cache.publish(request.chain, request.token_ids, index, own, parent)
            if block_id is None:
                request.chain = None
                return
            if block_id != own:
                self._replace(table, index, block_id)
            request.num_published_blocks = index + 1

    def _num_shareable(self, request: Request) -> int:
        """First tokens whose keys and values are what the tokens alone say, while the cache has all of them."""
        if request.cache_plan is not None and request.cache_plan.is_private:
            return 0
        if request.cache_plan is not None and request.cache_plan.steps_singly:
            return min(request.num_computed_tokens, request.num_prompt_tokens)
        return request.num_computed_tokens

    def compact(self, request: Request, kept_blocks: Sequence[int] = ()) -> None:
        """The compaction that the step in flight was to make has been made; see `Compactor.apply`."""
        self.compaction.apply(request, kept_blocks)
        if _seals(request):
            self._publish_sealed(request)
        self._promise(request, self.compaction.blocks_needed(request) - self.compaction.num_held(request))

    def _publish_sealed(self, request: Request) -> None:
        """As `publish`, of packed blocks: each is full, and what it holds follows from the tokens alone."""
        if self.prefix_cache is None or request.chain is None:
            return
        request.chain.extend(request.token_ids)
        for index in range(request.num_published_blocks, len(request.packed)):
            own = request.packed[index]
            parent = request.packed[index - 1] if index else None
            block_id = self.prefix_cache.publish(request.chain, request.token_ids, index, own, parent)
            if block_id is None:
                request.chain = None
                return
            if block_id != own:
                self.pool.share([block_id])
                self.pool.free([own])
                request.packed[index] = block_id
                request.packed_edits.append((index, block_id))
            request.num_published_blocks = index + 1

    def release(self, request: Request) -> None:
        """Takes back everything. The request could start again from its tokens alone."""
        self.compaction.cancel(request)
        pool = self.compaction.pool_of(request)
        for table in request.tables:
            pool.free(table.block_ids)
        self.pool.free(request.packed)
        self.pool.free(request.side)
        request.tables, request.packed, request.num_packed = [BlockTable()], [], 0
        request.packed_edits, request.side, request.num_side_sent = [], [], 0
        if request.unsettled is not None:
            request.policy, request.unsettled = request.unsettled, None
        request.is_compressed = False
        request.num_computed_tokens = 0
        request.num_published_blocks = 0
        self._take_promised(request, self._promised.get(request, 0))

    def _start(self, request: Request, block_ids: list[int], num_computed: int) -> None:
        request.tables = [BlockTable(block_ids=block_ids, num_slots=num_computed)]
        request.num_computed_tokens = num_computed
        self._promise(request, self.compaction.blocks_needed(request) - len(block_ids))

    def _start_sealed(self, request: Request, packed: list[int]) -> None:
        """With full packed blocks: as after the compaction that made the last of them."""
        request.packed = list(packed)
        request.num_computed_tokens = request.num_packed = len(packed) * request.cache_plan.period  # type: ignore[union-attr]
        request.tables = [BlockTable()]
        request.is_compressed = bool(packed)
        self._promise(request, self.compaction.blocks_needed(request) - len(packed))

    def _promise(self, request: Request, num_blocks: int) -> None:
        """So many more blocks, and no others, are kept from other admissions."""
        self._take_promised(request, self._promised.get(request, 0))
        if num_blocks > 0:
            self._promised[request] = num_blocks
            self.num_promised += num_blocks

    def _take_promised(self, request: Request, num_blocks: int) -> None:
        promised = self._promised.get(request, 0)
        taken = min(promised, num_blocks)
        self.num_promised -= taken
        if taken < promised:
            self._promised[request] = promised - taken
        elif promised:
            del self._promised[request]

    def _replace(self, table: BlockTable, index: int, block_id: int) -> None:
        self.pool.share([block_id])
        self.pool.free([table.block_ids[index]])
        table.block_ids[index] = block_id
        if index < table.num_sent:
            table.edits.append((index, block_id))


def _seals(request: Request) -> bool:
    return request.cache_plan is not None and request.cache_plan.seals


def _needs_all_tokens(request: Request) -> bool:
    """Log-probabilities and means of prompt tokens come from computing them, so cached blocks are of no use. Nor are
    they where a cache policy computes the prompt in its own way.
    """
    if request.cache_plan is not None and request.cache_plan.is_private:
        return True
    if request.pooling is not None:
        return request.pooling.needs_all_tokens
    return request.prompt_logprobs is not None
