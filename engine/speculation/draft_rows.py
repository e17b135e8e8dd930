"""The wall between drafters that use a language model and its tensors: what to compute, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class RowPass(NamedTuple):
    """Tokens of one sequence to compute, at positions `start` on; the table has room for all of them."""

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]


class Draw(NamedTuple):
    """Candidates after one row of a pass. Without a key, or below the greedy temperature, these are the likeliest."""

    row: int
    temperature: float
    key: int | None  # of the noise, see engine.noise; None: no noise


class Pick(NamedTuple):
    """Candidates of one draw, in the order in which they were drawn: [k] each."""

    token_ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]  # log q of each, at the draw's temperature (greedy: at 1)
    scores: NDArray[np.float32]  # log q and noise, falling


class ChainPass(NamedTuple):
    """Tokens of one sequence to compute, and a chain to draft behind them, one token after the other."""

    token_ids: Sequence[int]
    start: int  # position of the first one
    block_ids: Sequence[int]  # with room for all tokens, the drafted ones included but for the last
    temperature: float
    keys: Sequence[int | None]  # of the noise of each token; as many as tokens are wanted, at least one
    min_log_prob: float  # the chain ends with the token at which its log q falls below


class DraftRunner(Protocol):
    """A small language model with a paged cache of its own. `engine.execution.draft_model` has the real one."""

    block_size: int
    num_blocks: int  # block 0 is padding
    max_len: int  # positions must be below

    def compute(self, rows: Sequence[RowPass], copies: Sequence[tuple[int, int]] = ()) -> Any:
        """Copies blocks (from, to), then computes the rows' tokens. Returns a handle on what follows each row."""

    def pick(self, logits: Any, draws: Sequence[Draw], count: int) -> list[Pick]:
        """`count` candidates of each draw, or fewer where there are not so many tokens."""

    def chain(self, chains: Sequence[ChainPass]) -> list[list[tuple[int, float]]]:
        """Computes the rows' tokens, then chains of best ones: (token, log q) of each. All but a chain's last are in
        the cache afterwards."""

    def laws(self, logits: Any, draws: Sequence[Draw]) -> NDArray[np.float32]:
        """The distribution of each draw, [draws, V]."""

    @property
    def num_bytes(self) -> int: ...
