"""Finds blocks that already hold a given beginning: chained SHA-256 over block tokens -> block id.

Knows tokens and block ids, never requests. Only full, computed, finite blocks may be published here that their tokens
determine: dense ones, and packed ones in a namespace of their format, where a block holds more tokens.
A key covers everything that the contents depend on: all tokens so far, tenant, salt, model, adapter and KV format,
under a secret of this process, so that nobody can compute keys outside it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from engine.scheduling.block_pool import BlockPool

Digest = Callable[[bytes], bytes]

# Why a sequence did not find all of its beginning: it is shorter than a block; its prompt is computed whole for its
# log-probabilities or hidden states; the same tokens are there under another salt, or for another adapter, of the same
# tenant; they were there and were reclaimed or cleared; they were never there. Without a cache: "disabled".
MISS_REASONS = ("too_short", "whole_prompt", "salt", "adapter", "evicted", "cold")
MAX_REMEMBERED = 65536  # digests of forgotten blocks


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass(frozen=True, slots=True)
class Namespace:
    """Sequences of different namespaces never share a block. A client's salt adds to its tenant, never replaces it."""

    tenant: str
    cache_salt: str
    adapter: str
    kv_format: str
    root: bytes = field(repr=False)  # parent digest of first blocks


class HashChain:
    """The digests of one sequence's full blocks, extended as tokens come: each block is hashed once."""

    __slots__ = ("_block_size", "_digest", "digests", "namespace")

    def __init__(self, namespace: Namespace, block_size: int, digest: Digest) -> None:
        self.namespace = namespace
        self.digests: list[bytes] = []
        self._block_size = block_size
        self._digest = digest

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    def extend(self, token_ids: Sequence[int]) -> None:
        """Adds the full blocks of `token_ids` (the whole sequence, only read where it is new)."""
        digests = self.digests
        for index in range(len(digests), len(token_ids) // self._block_size):
            parent = digests[-1] if digests else self.namespace.root
            digests.append(self._digest(parent + self.block_bytes(token_ids, index)))

    def fork(self, num_blocks: int) -> HashChain:
        """A chain of its own for a sequence with the same first `num_blocks` blocks."""
        chain = HashChain(self.namespace, self._block_size, self._digest)
        chain.digests = self.digests[:num_blocks]
        return chain

    def block_bytes(self, token_ids: Sequence[int], index: int) -> bytes:
        return array("q", token_ids[index * self._block_size : (index + 1) * self._block_size]).tobytes()


@dataclass(frozen=True, slots=True)
class _Entry:
    block_id: int
    parent: int | None  # the block before it, None for a first block
    digest: bytes
    tokens: bytes
    namespace: Namespace


@dataclass(slots=True)
class PrefixStats:
    """Counters of the prefix cache: they only grow."""

    queries: int = 0  # sequences looked up
    hits: int = 0  # of them, those that found at least one block
    queried_tokens: int = 0
    hit_tokens: int = 0
    resets: int = 0
    misses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MISS_REASONS, 0))  # sequences, by why
    evicted_blocks: dict[str, int] = field(default_factory=lambda: {"capacity": 0, "manual": 0})


class PrefixCache:
    """Index over the published blocks of a `BlockPool`.

    The index is closed under prefixes: a block's predecessor leaves it no earlier than the block (see `BlockPool`),
    so "is cached" and "is held" are true up to some depth of a chain and false beyond: both are found by bisection.
    """

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        *,
        model: str = "",
        secret: bytes | None = None,
        digest: Digest = sha256,
    ) -> None:
        """secret: seeds all digests, random by default. digest: replaceable so that tests can force collisions."""
        self.block_size = block_size
        self.stats = PrefixStats()
        self._pool = pool
        self._model = model
        self._secret = os.urandom(32) if secret is None else secret
        self._digest = digest
        self._entries: dict[bytes, _Entry] = {}
        self._by_block: dict[int, _Entry] = {}
        self._firsts: dict[tuple[str, bytes], set[Namespace]] = {}  # tenant and tokens of first blocks -> where cached
        self._forgotten: OrderedDict[bytes, None] = OrderedDict()
        pool.set_evict_hook(lambda block_id: self._forget(block_id, "capacity"))

    def __len__(self) -> int:
        return len(self._entries)

    def chain(
        self, tenant: str, cache_salt: str, *, adapter: str = "", kv_format: str = "dense", block_size: int = 0
    ) -> HashChain:
        """An empty chain in the namespace of these labels. block_size: tokens in a block, 0 for the pool's number."""
        labels = (self._model, adapter, kv_format, tenant, cache_salt)
        message = b"".join(len(part).to_bytes(8, "little") + part for part in (label.encode() for label in labels))
        root = hmac.digest(self._secret, message, "sha256")
        namespace = Namespace(tenant, cache_salt, adapter, kv_format, root)
        return HashChain(namespace, block_size or self.block_size, self._digest)

    def estimate(self, chain: HashChain, max_blocks: int) -> tuple[int, int]:
        """How many first blocks of the chain are cached, and how many of those are held by somebody.

        In O(log) probes, by digests alone: `match` has the last word, and finds as many unless digests collide.
        """
        digests = chain.digests
        num_probed = min(max_blocks, len(digests))
        num_cached = bisect_left(range(num_probed), True, key=lambda i: digests[i] not in self._entries)
        num_held = bisect_left(range(num_cached), True, key=lambda i: not self._is_held(digests[i]))
        return num_cached, num_held

    def match(self, chain: HashChain, token_ids: Sequence[int], max_blocks: int) -> list[int]:
        """Ids of the longest cached run of first blocks, tokens compared; the caller takes references at once."""
        block_ids: list[int] = []
        parent: int | None = None
        for index in range(min(max_blocks, len(chain.digests))):
            entry = self._entries.get(chain.digests[index])
            if entry is None or not self._is_same(entry, chain, token_ids, index, parent):
                break
            parent = entry.block_id
            block_ids.append(parent)
        return block_ids

    def why_missing(self, chain: HashChain, token_ids: Sequence[int], num_hits: int) -> str:
        """Why block number `num_hits` of the chain, the first that `match` did not find, is not here.

        Looks at blocks of the same tenant only: nobody learns what others have cached.
        """
        if chain.digests[num_hits] in self._forgotten:
            return "evicted"
        if num_hits == 0:
            others = self._firsts.get((chain.namespace.tenant, chain.block_bytes(token_ids, 0)), ())
            if any(other.adapter != chain.namespace.adapter for other in others):
                return "adapter"
            if any(other.cache_salt != chain.namespace.cache_salt for other in others):
                return "salt"
        return "cold"

    def record_query(self, num_queried_tokens: int, num_hit_tokens: int) -> None:
        self.stats.queries += 1
        self.stats.hits += num_hit_tokens > 0
        self.stats.queried_tokens += num_queried_tokens
        self.stats.hit_tokens += num_hit_tokens

    def publish(
        self, chain: HashChain, token_ids: Sequence[int], index: int, block_id: int, parent: int | None
    ) -> int | None:
        """Offers the block that holds block number `index` of the chain, after block `parent`, which the caller holds.

        Returns the id to use from now on: the block's own, or that of an equal block that is already here. None when
        it cannot enter: its predecessor has been cleared meanwhile, or another content has the same digest.
        """
        digest = chain.digests[index]
        if parent is not None:
            base = self._by_block.get(parent)
            if base is None or base.digest != chain.digests[index - 1]:
                return None
        entry = self._entries.get(digest)
        if entry is not None:
            return entry.block_id if self._is_same(entry, chain, token_ids, index, parent) else None
        entry = _Entry(block_id, parent, digest, chain.block_bytes(token_ids, index), chain.namespace)
        self._pool.publish(block_id)
        self._entries[digest] = entry
        self._by_block[block_id] = entry
        self._forgotten.pop(digest, None)
        if parent is None:
            self._firsts.setdefault((entry.namespace.tenant, entry.tokens), set()).add(entry.namespace)
        return block_id

    def pin(self, chain: HashChain, token_ids: Sequence[int]) -> list[int]:
        """Keeps the cached beginning of a sequence from being reclaimed. Returns the blocks, for `unpin`.

        Raises OutOfBlocks when the pool's bound on pins would be exceeded; nothing is pinned then.
        """
        chain.extend(token_ids)
        block_ids = self.match(chain, token_ids, len(chain.digests))
        self._pool.pin(block_ids)
        return block_ids

    def unpin(self, block_ids: Sequence[int]) -> None:
        self._pool.unpin(block_ids)

    def clear(self, tenant: str, cache_salt: str | None = None) -> int:
        """Forgets a tenant's blocks, or those of one of its salts. Returns how many. Running requests keep theirs.

        Takes time with the size of the index: an administrator's action, not part of a step.
        """
        return self._forget_all(
            lambda namespace: namespace.tenant == tenant and cache_salt in (None, namespace.cache_salt)
        )

    def below(self, chain: HashChain, token_ids: Sequence[int]) -> list[int]:
        """Blocks that hold the last full block of this beginning, and everything cached after it.

        Empty unless the whole beginning is cached. Takes time with the size of the index.
        """
        chain.extend(token_ids)
        block_ids = self.match(chain, token_ids, len(chain.digests))
        if not block_ids or len(block_ids) < len(chain.digests):
            return []
        is_below: dict[int, bool] = {block_ids[-1]: True}
        for start in self._by_block:
            path: list[int] = []
            block_id: int | None = start
            while block_id is not None and block_id not in is_below:
                path.append(block_id)
                block_id = self._by_block[block_id].parent
            is_below.update(dict.fromkeys(path, block_id is not None and is_below[block_id]))
        return [block_id for block_id, is_meant in is_below.items() if is_meant]

    def forget(self, block_ids: Collection[int]) -> int:
        """Forgets these blocks, which must be `below` something. Returns how many. Running requests keep theirs."""
        for block_id in block_ids:
            self._forget(block_id, "manual")
            self._pool.unpublish(block_id)
        return len(block_ids)

    def namespaces(self) -> Iterator[Namespace]:
        """Of every cached block."""
        return (entry.namespace for entry in self._by_block.values())

    def reset(self) -> int:
        """Forgets everything. Returns how many blocks that were."""
        self.stats.resets += 1
        return self._forget_all(lambda namespace: True)

    def violations(self) -> list[str]:
        """What is wrong with the index: empty when all is well. Looks at every entry."""
        problems = []
        if len(self._entries) != len(self._by_block):
            problems.append(f"{len(self._entries)} digests for {len(self._by_block)} blocks")
        order = {block_id: i for i, block_id in enumerate(self._pool.idle_blocks())}
        if not order.keys() <= self._by_block.keys():
            problems.append("a block is kept for reuse but not in the index")
        for digest, entry in self._entries.items():
            block_id, parent = entry.block_id, entry.parent
            if entry.digest != digest or self._by_block.get(block_id) is not entry:
                problems.append(f"block {block_id} is indexed inconsistently")
            if not self._pool.is_published(block_id):
                problems.append(f"block {block_id} is indexed but not published")
            base = self._by_block.get(parent) if parent is not None else None
            if parent is None:
                expected = entry.namespace.root
            elif base is None or base.namespace != entry.namespace:
                problems.append(f"block {block_id} outlived the block before it")
                continue
            else:
                expected = base.digest
                if self._pool.is_held(block_id) and not self._pool.is_held(base.block_id):
                    problems.append(f"block {block_id} is held, the block before it is not")
                if base.block_id in order and order.get(block_id, -1) > order[base.block_id]:
                    problems.append(f"block {base.block_id} would be reclaimed before its successor {block_id}")
            if self._digest(expected + entry.tokens) != digest:
                problems.append(f"block {block_id} is indexed under another content's digest")
        return problems

    def _is_held(self, digest: bytes) -> bool:
        entry = self._entries.get(digest)
        return entry is not None and self._pool.is_held(entry.block_id)

    def _is_same(
        self, entry: _Entry, chain: HashChain, token_ids: Sequence[int], index: int, parent: int | None
    ) -> bool:
        """Digests agree; do the contents? By induction over `parent` this compares all tokens so far."""
        return (
            entry.parent == parent
            and entry.namespace == chain.namespace
            and entry.tokens == chain.block_bytes(token_ids, index)
        )

    def _forget(self, block_id: int, reason: str) -> None:
        entry = self._by_block.pop(block_id)
        del self._entries[entry.digest]
        self._forgotten[entry.digest] = None
        if len(self._forgotten) > MAX_REMEMBERED:
            self._forgotten.popitem(last=False)
        if entry.parent is None:
            key = (entry.namespace.tenant, entry.tokens)
            self._firsts[key].discard(entry.namespace)
            if not self._firsts[key]:
                del self._firsts[key]
        self.stats.evicted_blocks[reason] += 1

    def _forget_all(self, is_meant: Callable[[Namespace], bool]) -> int:
        block_ids = [entry.block_id for entry in self._by_block.values() if is_meant(entry.namespace)]
        for block_id in block_ids:
            self._forget(block_id, "manual")
            self._pool.unpublish(block_id)
        return len(block_ids)
