"""A draft model from a table, on a cache that really holds tokens: a wrong slot gives wrong guesses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.speculation.draft_rows import ChainPass, Draw, Pick, RowPass
from tests.speculation.toys import Table

EMPTY_SLOT = -1


class FakeDraftRunner:
    """Implements DraftRunner. Its distribution depends on the last `order` tokens of the context in the cache."""

    def __init__(self, table: Table, *, num_blocks: int = 256, block_size: int = 4, order: int = 3) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.max_len = 10_000
        self.num_bytes = 0
        self._table = table
        self._order = order
        self._slots = np.full((num_blocks, block_size), EMPTY_SLOT)
        self.num_computed: list[int] = []  # tokens of each pass, by row

    def compute(self, rows: Sequence[RowPass], copies: Sequence[tuple[int, int]] = ()) -> list[np.ndarray]:
        assert len({target for _, target in copies}) == len(copies), "a block is copied to twice"
        for source, target in copies:
            self._slots[target] = self._slots[source]
        written: set[tuple[int, int]] = set()
        for row in rows:
            assert row.token_ids, "a pass without tokens has no row of logits"
            for position, token in enumerate(row.token_ids, start=row.start):
                place = (row.block_ids[position // self.block_size], position % self.block_size)
                assert place[0] != 0, "the padding block is written"
                assert place not in written, "two rows write to one slot"
                written.add(place)
                self._slots[place] = token
        self.num_computed += [len(row.token_ids) for row in rows]
        return [self._law(row) for row in rows]

    def pick(self, logits: list[np.ndarray], draws: Sequence[Draw], count: int) -> list[Pick]:
        picks = []
        for draw in draws:
            with np.errstate(divide="ignore"):
                log_q = np.log(self._at(logits[draw.row], draw.temperature))
            scores = log_q
            if draw.key is not None:
                scores = log_q + np.random.default_rng(draw.key % 2**63).gumbel(size=len(log_q))
            order = np.argsort(-scores, kind="stable")[:count]
            picks.append(Pick(order, log_q[order].astype(np.float32), scores[order].astype(np.float32)))
        return picks

    def chain(self, chains: Sequence[ChainPass]) -> list[list[tuple[int, float]]]:
        """One chain after the other, by `pick` and `compute`."""
        found = []
        laws = self.compute([RowPass(chain.token_ids, chain.start, chain.block_ids) for chain in chains])
        for chain, first in zip(chains, laws, strict=True):
            steps: list[tuple[int, float]] = []
            law, total, end = first, 0.0, chain.start + len(chain.token_ids)
            for place, key in enumerate(chain.keys):
                if steps:
                    row = RowPass([steps[-1][0]], end + place - 1, chain.block_ids)
                    (law,) = self.compute([row])
                (pick,) = self.pick([law], [Draw(0, chain.temperature, key)], 1)
                steps.append((int(pick.token_ids[0]), float(pick.log_probs[0])))
                total += steps[-1][1]
                if total < chain.min_log_prob:
                    break
            found.append(steps)
        return found

    def laws(self, logits: list[np.ndarray], draws: Sequence[Draw]) -> np.ndarray:
        return np.stack([self._at(logits[draw.row], draw.temperature) for draw in draws]).astype(np.float32)

    def context_law(self, context: Sequence[int]) -> np.ndarray:
        """What the model says after this text."""
        return self._table.law(tuple(int(token) for token in context[-self._order :]))

    def _law(self, row: RowPass) -> np.ndarray:
        end = row.start + len(row.token_ids)
        slots = [(row.block_ids[i // self.block_size], i % self.block_size) for i in range(end)]
        context = [int(self._slots[slot]) for slot in slots]
        assert EMPTY_SLOT not in context, "a slot is read that nothing was written to"
        return self.context_law(context)

    @staticmethod
    def _at(law: np.ndarray, temperature: float) -> np.ndarray:
        if temperature < 1e-5 or temperature == 1.0:
            return law
        scaled = law ** (1.0 / temperature)
        return scaled / scaled.sum()
