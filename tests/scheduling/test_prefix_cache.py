"""The prefix index against a naive model, and its promises one by one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.scheduling.block_pool import BlockPool, OutOfBlocks
from engine.scheduling.prefix_cache import HashChain, PrefixCache, sha256
from tests.scheduling.machines import case_of, pick, picks

BLOCK_SIZE = 4


def make(num_blocks: int = 32, **options: object) -> tuple[BlockPool, PrefixCache]:
    pool = BlockPool(num_blocks, max_pinned=4)
    return pool, PrefixCache(pool, BLOCK_SIZE, **{"secret": b"tests", **options})  # type: ignore[arg-type]


def publish_all(pool: BlockPool, cache: PrefixCache, chain: HashChain, tokens: list[int]) -> list[int]:
    """Computes a sequence from nothing and publishes its full blocks. Returns its table, still held."""
    table = pool.allocate(-(-len(tokens) // BLOCK_SIZE))
    chain.extend(tokens)
    for index in range(len(tokens) // BLOCK_SIZE):
        canonical = cache.publish(chain, tokens, index, table[index], table[index - 1] if index else None)
        assert canonical == table[index]
    return table


def matched(cache: PrefixCache, tokens: list[int], tenant: str = "", salt: str = "", **labels: str) -> list[int]:
    chain = cache.chain(tenant, salt, **labels)
    chain.extend(tokens)
    return cache.match(chain, tokens, len(tokens) // BLOCK_SIZE)


def test_the_longest_common_run_of_whole_blocks_is_found() -> None:
    pool, cache = make()
    tokens = list(range(14))
    table = publish_all(pool, cache, cache.chain("", ""), tokens)
    assert matched(cache, tokens) == table[:3]
    assert matched(cache, [*tokens[:8], 99, 98, 97, 96]) == table[:2]
    assert matched(cache, tokens[:7]) == table[:1]
    assert matched(cache, [99, *tokens[1:]]) == []
    # the same block after another beginning is another content
    assert matched(cache, tokens[4:]) == []


@pytest.mark.parametrize(
    "labels", [{"tenant": "b"}, {"salt": "x"}, {"adapter": "lora"}, {"kv_format": "int8"}, {"tenant": "at", "salt": ""}]
)
def test_namespaces_share_nothing(labels: dict[str, str]) -> None:
    pool, cache = make()
    tokens = list(range(8))
    publish_all(pool, cache, cache.chain("a", "t"), tokens)
    assert len(matched(cache, tokens, "a", "t")) == 2
    assert matched(cache, tokens, **{"tenant": "a", "salt": "t", **labels}) == []


def test_the_secret_and_the_model_are_part_of_every_digest() -> None:
    chains = []
    for secret, model in ((b"1", "m"), (b"2", "m"), (b"1", "n"), (b"1", "m")):
        chain = make(secret=secret, model=model)[1].chain("t", "")
        chain.extend([1, 2, 3, 4])
        chains.append(chain.digests[0])
    assert len(set(chains)) == 3
    assert chains[0] == chains[3]


def test_a_chain_hashes_every_block_once() -> None:
    hashed: list[bytes] = []

    def digest(data: bytes) -> bytes:
        hashed.append(data)
        return sha256(data)

    chain = make(digest=digest)[1].chain("", "")
    tokens: list[int] = []
    for token in range(40):
        tokens.append(token)
        chain.extend(tokens)
    assert len(hashed) == 10
    assert len(chain.digests) == 10


def test_colliding_digests_never_lead_to_foreign_blocks() -> None:
    pool, cache = make(digest=lambda data: b"same")
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    chain = cache.chain("a", "")
    chain.extend(tokens)
    first, second = pool.allocate(2)
    assert cache.publish(chain, tokens, 0, first, None) == first
    assert cache.publish(chain, tokens, 1, second, first) is None
    assert matched(cache, tokens, "a") == [first]
    assert matched(cache, [9, 9, 9, 9], "a") == []
    assert matched(cache, tokens, "b") == []
    assert cache.violations() == []


def test_estimates_survive_digests_that_collide() -> None:
    """Collisions make "is cached" true behind a gap, where bisection may look for an entry that is not there."""
    pool, cache = make(digest=lambda data: data[-8:-7])  # a block's last token
    for last_token in (3, 5):
        tokens = [9, 9, 9, last_token]
        pool.free(publish_all(pool, cache, cache.chain("", ""), tokens))
    tokens = [token for block in range(6) for token in (0, 0, 0, block)]
    chain = cache.chain("", "")
    chain.extend(tokens)
    assert cache.estimate(chain, 6) == (6, 0)
    assert cache.match(chain, tokens, 6) == []


def test_equal_blocks_computed_side_by_side_become_one() -> None:
    pool, cache = make()
    tokens = list(range(8))
    table = publish_all(pool, cache, cache.chain("", ""), tokens)
    twin_chain = cache.chain("", "")
    twin_chain.extend(tokens)
    twin = pool.allocate(2)
    assert cache.publish(twin_chain, tokens, 0, twin[0], None) == table[0]
    assert cache.publish(twin_chain, tokens, 1, twin[1], table[0]) == table[1]
    assert len(cache) == 2


def test_clear_forgets_one_tenant_or_one_salt_and_frees_idle_blocks() -> None:
    pool, cache = make()
    tokens = list(range(8))
    for tenant, salt in (("a", ""), ("a", "s"), ("b", "")):
        pool.free(publish_all(pool, cache, cache.chain(tenant, salt), tokens))
    assert cache.clear("a", "s") == 2
    assert matched(cache, tokens, "a", "s") == []
    assert len(matched(cache, tokens, "a")) == 2
    assert cache.clear("a") == 2
    assert cache.clear("a") == 0
    assert pool.counts.cached == 2
    assert cache.stats.evicted_blocks == {"capacity": 0, "manual": 4}


def test_a_running_sequence_cannot_publish_behind_a_cleared_block() -> None:
    pool, cache = make()
    tokens = list(range(12))
    chain = cache.chain("a", "")
    table = publish_all(pool, cache, chain, tokens[:8])
    assert cache.clear("a") == 2
    chain.extend(tokens)
    [block] = pool.allocate(1)
    assert cache.publish(chain, tokens, 2, block, table[1]) is None
    pool.free([*table, block])
    assert pool.counts.free == pool.num_blocks - 1


def test_reset_forgets_everything() -> None:
    pool, cache = make()
    pool.free(publish_all(pool, cache, cache.chain("a", ""), list(range(8))))
    held = publish_all(pool, cache, cache.chain("b", ""), list(range(8)))
    assert cache.reset() == 4
    assert len(cache) == 0
    assert cache.stats.resets == 1
    assert pool.counts.cached == 0
    pool.free(held)
    assert pool.counts.free == pool.num_blocks - 1


def test_a_pinned_prefix_is_not_reclaimed() -> None:
    pool, cache = make(num_blocks=10)
    tokens = list(range(8))
    pool.free(publish_all(pool, cache, cache.chain("", ""), tokens))
    pinned = cache.pin(cache.chain("", ""), tokens)
    pool.free(pool.allocate(7))
    assert matched(cache, tokens) == pinned
    cache.unpin(pinned)
    pool.free(pool.allocate(9))
    assert matched(cache, tokens) == []


def test_statistics_count_requests_and_tokens() -> None:
    _, cache = make()
    cache.record_query(20, 0)
    cache.record_query(20, 16)
    stats = cache.stats
    assert (stats.queries, stats.hits, stats.queried_tokens, stats.hit_tokens) == (2, 1, 40, 16)


@dataclass
class Sequence:
    """A running sequence of the model: what it holds, and what each of its blocks must contain."""

    tenant: str
    tokens: list[int]
    chain: HashChain
    table: list[int]
    num_published: int
    is_publishing: bool = True


class PrefixMachine(RuleBasedStateMachine):
    """Sequences over a tiny alphabet come, grow, publish and go; a dictionary remembers what every block contains.

    The model of the index is a set of (tenant, tokens so far), its model of age a clock per idle block.
    """

    digest_bytes = 32

    @initialize(num_blocks=st.integers(6, 48))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, max_pinned=2)
        self.cache = PrefixCache(
            self.pool, BLOCK_SIZE, secret=b"tests", digest=lambda data: sha256(data)[: self.digest_bytes]
        )
        forget = self.pool._on_evict

        def evicted(block: int) -> None:
            self.check_victim(block)
            forget(block)
            self.forgotten(block)

        self.pool.set_evict_hook(evicted)
        self.sequences: list[Sequence] = []
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}  # block -> tenant, all tokens up to its end
        self.index: dict[tuple[str, tuple[int, ...]], int] = {}
        self.idle_since: dict[int, int] = {}
        self.pins: list[list[int]] = []
        self.clock = 0

    def check_victim(self, block: int) -> None:
        """Least recently used among the idle blocks without a cached successor."""
        inner = {(tenant, tokens[:-BLOCK_SIZE]) for tenant, tokens in self.index}
        leaves = [b for b in self.idle_since if self.contents[b] not in inner]
        assert block in leaves, "an inner block went before its successor"
        assert block == min(leaves, key=self.idle_since.__getitem__), "not the least recently used leaf"

    def forgotten(self, block: int) -> None:
        self.index = {key: b for key, b in self.index.items() if b != block}
        self.idle_since.pop(block, None)

    def after_release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            if not self.pool.is_held(block) and self.pool.is_published(block):
                self.clock += 1
                self.idle_since[block] = self.clock

    @rule(
        tenant=st.sampled_from("ab"),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24),
        shared=st.integers(0, 16),
        source=picks,
    )
    def begin(self, tenant: str, tokens: list[int], shared: int, source: int) -> None:
        if self.sequences:  # often continue something known
            tokens = pick(source, self.sequences).tokens[:shared] + tokens
        chain = self.cache.chain(tenant, "")
        chain.extend(tokens)
        max_blocks = (len(tokens) - 1) // BLOCK_SIZE
        estimated, num_held = self.cache.estimate(chain, max_blocks)
        hits = self.cache.match(chain, tokens, max_blocks)

        # the naive index has every prefix of the match, and not the next one
        keys = [(tenant, tuple(tokens[: (i + 1) * BLOCK_SIZE])) for i in range(max_blocks)]
        expected = []
        for key in keys:
            if key not in self.index:
                break
            expected.append(self.index[key])
        assert hits == expected
        if self.digest_bytes == 32:
            assert estimated == len(hits)
            assert num_held == sum(1 for b in hits if self.pool.is_held(b))
        for block, key in zip(hits, keys, strict=False):
            assert self.contents[block] == key, "a hit with other contents"

        num_new = -(-len(tokens) // BLOCK_SIZE) - len(hits)
        num_idle_hits = sum(1 for b in hits if not self.pool.is_held(b))
        if num_new > self.pool.num_available - num_idle_hits:
            return
        self.pool.share(hits)
        for block in hits:
            self.idle_since.pop(block, None)
        table = hits + self.pool.allocate(num_new)
        self.sequences.append(Sequence(tenant, tokens, chain, table, len(hits)))
        self.write(self.sequences[-1], len(hits))

    def write(self, sequence: Sequence, start: int) -> None:
        """Blocks from `start` on are computed: nobody else may be reading them."""
        for index in range(start, len(sequence.table)):
            block = sequence.table[index]
            assert self.pool.num_references(block) == 1
            assert not self.pool.is_published(block)
            self.contents[block] = (sequence.tenant, tuple(sequence.tokens[: (index + 1) * BLOCK_SIZE]))

    @precondition(lambda self: self.sequences)
    @rule(index=picks, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, index: int, tokens: list[int]) -> None:
        sequence = pick(index, self.sequences)
        num_full = len(sequence.tokens) // BLOCK_SIZE
        num_new = -(-(len(sequence.tokens) + len(tokens)) // BLOCK_SIZE) - len(sequence.table)
        try:
            new = self.pool.allocate(num_new)
        except OutOfBlocks:
            return
        sequence.tokens = sequence.tokens + tokens
        sequence.table += new
        self.write(sequence, num_full)

    @precondition(lambda self: self.sequences)
    @rule(index=picks)
    def publish(self, index: int) -> None:
        sequence = pick(index, self.sequences)
        if not sequence.is_publishing:
            return
        sequence.chain.extend(sequence.tokens)
        for i in range(sequence.num_published, len(sequence.tokens) // BLOCK_SIZE):
            own, parent = sequence.table[i], sequence.table[i - 1] if i else None
            block = self.cache.publish(sequence.chain, sequence.tokens, i, own, parent)
            key = (sequence.tenant, tuple(sequence.tokens[: (i + 1) * BLOCK_SIZE]))
            if block is None:
                sequence.is_publishing = False
                assert self.digest_bytes < 32 or (
                    parent is not None and self.index.get(self.contents[parent]) != parent
                )
                return
            assert block == self.index.setdefault(key, block)
            if block != own:
                self.pool.share([block])
                self.idle_since.pop(block, None)
                self.pool.free([own])
                sequence.table[i] = block
            sequence.num_published = i + 1

    @precondition(lambda self: self.sequences)
    @rule(index=picks)
    def end(self, index: int) -> None:
        sequence = self.sequences.pop(index % len(self.sequences))
        self.pool.free(sequence.table)
        self.after_release(sequence.table)

    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        expected = min(count, len(self.idle_since))
        assert self.pool.evict(count) == expected

    @rule(tenant=st.sampled_from("ab"))
    def clear(self, tenant: str) -> None:
        expected = [block for (owner, _), block in self.index.items() if owner == tenant]
        assert self.cache.clear(tenant) == len(expected)
        for block in expected:
            self.forgotten(block)

    @precondition(lambda self: self.sequences)
    @rule(index=picks)
    def pin(self, index: int) -> None:
        sequence = pick(index, self.sequences)
        try:
            blocks = self.cache.pin(self.cache.chain(sequence.tenant, ""), sequence.tokens[: 2 * BLOCK_SIZE])
        except OutOfBlocks:
            return
        for block in blocks:
            self.idle_since.pop(block, None)
        self.pins.append(blocks)

    @precondition(lambda self: self.pins)
    @rule(index=picks)
    def unpin(self, index: int) -> None:
        blocks = self.pins.pop(index % len(self.pins))
        self.cache.unpin(blocks)
        self.after_release(blocks)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.pool.violations() == []
        assert self.cache.violations() == []
        assert len(self.cache) == len(self.index)
        # evictable plus protected is everything published, and none of it is free
        assert set(self.pool.idle_blocks()) == set(self.idle_since)
        protected = [block for block in self.index.values() if self.pool.is_held(block)]
        assert len(protected) + len(self.idle_since) == len(self.index)

    def teardown(self) -> None:
        for sequence in self.sequences:
            self.pool.free(sequence.table)
        for blocks in self.pins:
            self.cache.unpin(blocks)
        self.cache.reset()
        assert self.pool.counts.free == self.pool.num_blocks - 1, "a block is missing after all is done"


class CollidingPrefixMachine(PrefixMachine):
    """Digests of one byte: most of them collide, no answer may change but by being shorter."""

    digest_bytes = 1


TestPrefix = case_of(PrefixMachine, 500, 100)
TestCollidingPrefix = case_of(CollidingPrefixMachine, 200, 100)
TestCollidingPrefixLong = pytest.mark.slow(case_of(CollidingPrefixMachine, 5_000, 100))
TestPrefixLong = pytest.mark.slow(case_of(PrefixMachine, 20_000, 100))
