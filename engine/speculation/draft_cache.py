"""The drafter's own cache: which tokens of each request are in it, and in which blocks. Integers only.

A draft's first path is computed in the request's own blocks, right behind its text; every further path gets copies of
the blocks from the text's last one on. When the true tokens are known, the path that guessed most of them stays and the
rest is cut off: nothing is computed twice, whatever was accepted. A token that was drafted last is not in the cache, so
after a draft that was accepted whole the next pass has two tokens: that one, and the one which the target added.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from engine.scheduling.block_pool import BlockPool, OutOfBlocks


@dataclass(slots=True)
class Branch:
    """One path behind the text."""

    block_ids: list[int]  # the whole table, text included
    tokens: list[int]  # of the path, as far as they are in the cache


@dataclass(slots=True)
class CachedText:
    """A request's text as far as it is in the cache, and the paths of the draft that is out."""

    num_tokens: int = 0
    main: Branch = field(default_factory=lambda: Branch([], []))
    others: list[Branch] = field(default_factory=list)

    @property
    def branches(self) -> list[Branch]:
        return [self.main, *self.others]


class DraftCache:
    """Blocks of one drafter's model, for all its requests. What has to make room can be computed again."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._texts: OrderedDict[str, CachedText] = OrderedDict()  # least recently used first

    @property
    def num_texts(self) -> int:
        return len(self._texts)

    def get(self, key: str) -> CachedText:
        """What there is of a request, possibly nothing."""
        text = self._texts.setdefault(key, CachedText())
        self._texts.move_to_end(key)
        return text

    def find(self, key: str) -> CachedText | None:
        """What there is of a request, None when it has never been there or had to make room."""
        return self._texts.get(key)

    def drop(self, key: str) -> None:
        """Gives back every block of a request. Knows how to do without one."""
        text = self._texts.pop(key, None)
        if text is not None:
            self._settle_on(text, text.main, 0)
            self.pool.free(text.main.block_ids)

    def settle(self, text: CachedText, following: Sequence[int]) -> None:
        """The tokens behind the text are known: keep the path that guessed most of them, as far as it did."""
        best, num_right = text.main, 0
        for branch in text.branches:
            count = _common(branch.tokens, following)
            if count > num_right:
                best, num_right = branch, count
        self._settle_on(text, best, num_right)

    def cut(self, text: CachedText, num_tokens: int) -> None:
        """Keeps the first tokens of a text without drafts."""
        assert not text.others, "a draft is out"
        text.num_tokens = min(text.num_tokens, num_tokens)
        self._trim(text)

    def reserve(self, text: CachedText, branch: Branch, num_tokens: int, busy: Collection[str]) -> bool:
        """Room for so many tokens of a path, text included; False, and no change, when there is none.

        busy: requests that may not be pushed out for it, this one among them.
        """
        wanted = -(-num_tokens // self.block_size) - len(branch.block_ids)
        if wanted <= 0:
            return True
        found = self._allocate(wanted, busy)
        branch.block_ids += found
        return len(found) == wanted

    def fork(self, text: CachedText, branch: Branch, busy: Collection[str]) -> list[tuple[int, int]] | None:
        """A further path with the tokens of `branch`, the last of `text.others`. Returns blocks to copy, None: no room.

        Call it before tokens are added to `branch`.
        """
        first = text.num_tokens // self.block_size
        used = -(-(text.num_tokens + len(branch.tokens)) // self.block_size)
        found = self._allocate(used - first, busy)
        if len(found) < used - first:
            return None
        text.others.append(Branch([*branch.block_ids[:first], *found], list(branch.tokens)))
        return list(zip(branch.block_ids[first:used], found, strict=True))

    def _allocate(self, count: int, busy: Collection[str]) -> list[int]:
        while count > self.pool.num_available:
            idle = next((key for key in self._texts if key not in busy), None)
            if idle is None:
                return []
            self.drop(idle)
        try:
            return self.pool.allocate(count)
        except OutOfBlocks:
            return []

    def _settle_on(self, text: CachedText, best: Branch, num_right: int) -> None:
        first = text.num_tokens // self.block_size  # the first block that every path has for itself
        for branch in text.branches:
            if branch is not best:
                self.pool.free(branch.block_ids[first:])
        text.main, text.others = Branch(best.block_ids, []), []
        text.num_tokens += num_right
        self._trim(text)

    def _trim(self, text: CachedText) -> None:
        count = -(-text.num_tokens // self.block_size)
        self.pool.free(text.main.block_ids[count:])
        del text.main.block_ids[count:]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
