"""The wall between scheduler and runner: what to compute, and what came out.

The runner keeps one persistent row of state per running request (token ids, block table, sampling state).
A plan therefore carries only what changed since the last step; nothing in it grows with the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from engine.scheduling.compression import ResolvedPolicy
from engine.speculation.base import TapRows, Taps
from engine.speculation.tree import DraftTree
from engine.types import CompiledConstraint, PoolingParams, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request takes batch row `row`, for the first time or again after preemption."""

    row: int  # 0 <= row < max_num_seqs
    request_id: str
    choice: int
    token_ids: Sequence[int]  # prompt, then outputs generated before a preemption
    num_prompt_tokens: int
    sampling: SamplingParams
    block_ids: tuple[int, ...]  # already holding the first `num_computed` tokens
    num_computed: int
    constraint: CompiledConstraint | None = None
    pooling: PoolingParams | None = None  # the row samples nothing: its last prompt chunk has a pooled result
    adapter: int = 0  # index of its low-rank adapter, 0 for none
    policy: ResolvedPolicy | None = None  # how its cache is kept
    packed: tuple[int, ...] = ()  # full packed blocks that hold the first `num_computed` tokens; no others are there


class Compaction(msgspec.Struct, frozen=True, gc=False):
    """The cache of a row shrinks after its chunk, when that ends as planned (it has neither an error nor waits)."""

    kept: tuple[int, ...]  # slots: one number for all, or one per layer, or per (layer, kv head), layer by layer
    # Where the survivors go, and the row's tables from then on: one of blocks, or one per group of parts of blocks. The
    # first blocks of its own, or new ones.
    tables: tuple[tuple[int, ...], ...]
    # New packed blocks of the row. What is older than the slots kept goes there, behind what is packed already, and the
    # table keeps the other blocks.
    packed: tuple[int, ...] = ()
    num_packed: int | None = None  # so many packed blocks stay and the others go; nothing else changes


# A chunk and its result are made for every row in every step: structs, because they cost a tenth of a frozen dataclass.
class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Tokens [start, start + num_tokens) of one row run through the model in this step.

    With a draft, the row's last token at `start` is followed by the draft's nodes: node i takes the cache slot after
    the i-th, and the position that its depth says.
    """

    row: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...]  # appended to the row's block table before the forward
    is_sampling: bool  # the chunk ends at the row's last token: choose the next one
    output_index: int  # index of the token to choose, counted from the first output
    compaction: Compaction | None = None
    new_parts: tuple[tuple[int, int], ...] = ()  # (group, part of a block): appended to the tables of groups
    filters: bool = False  # a first pass over a prompt that is shortened: the row generates nothing yet
    policy: ResolvedPolicy | None = None  # of the row from this chunk on, where it is another than that of its NewRow
    packed_edits: tuple[tuple[int, int], ...] = ()  # (index, block): read this packed block there, it holds the same
    new_side: tuple[int, ...] = ()  # blocks appended to those with the row's side data before the forward
    is_provided: bool = False  # the policy supplies keys and values of these tokens: the model does not run
    draft: DraftTree | None = None  # guessed tokens to check: num_tokens is 1 and the nodes
    verifier: str = "walk"  # the rule that decides how far the draft is right, see engine.speculation.verifiers
    taps: Taps | None = None  # what drafters want to see of it

    @property
    def is_decode(self) -> bool:
        """Whether it computes one token that is known, and chooses what follows."""
        return self.is_sampling and (self.num_tokens == 1 or self.draft is not None)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Order of application: freed rows, new rows, table edits, block copies, then the chunks as one batch.

    When the forward raises, parts of the plan are executed again (`engine.isolation`), so applying the same entry
    twice must be harmless. New rows, edits and copies always belong to a row that has a chunk in the same plan.
    """

    chunks: tuple[Chunk, ...] = ()
    new_rows: tuple[NewRow, ...] = ()
    freed_rows: tuple[int, ...] = ()
    # (row, index in its block table, block): from now on read this block there, it holds the same tokens. Follows when
    # two requests computed the same block side by side: the second lets go of its own copy.
    table_edits: tuple[tuple[int, int, int], ...] = ()
    block_copies: tuple[tuple[int, int], ...] = ()  # (source block, destination block), whole blocks

    @property
    def num_tokens(self) -> int:
        return sum([chunk.num_tokens for chunk in self.chunks])

    @property
    def kind(self) -> str:
        """prefill, decode or mixed: a label for metrics; nothing is decided by it."""
        decodes = len([chunk for chunk in self.chunks if chunk.is_decode])
        if decodes == len(self.chunks):
            return "decode"
        return "mixed" if decodes else "prefill"


class ChunkResult(msgspec.Struct, frozen=True):
    """What one chunk produced, in the order of `StepPlan.chunks`."""

    # The tokens of the accepted nodes, the chosen one, those that its constraint forces: none unless it is sampling.
    token_ids: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()  # nodes of the draft, a path from the root: their keys and values are in the cache
    is_deferred: bool = False  # no token yet, the row's constraint is still being built: run its last token again
    logprobs: tuple[TokenLogprob, ...] | None = None  # one per chosen token, when asked for
    # When asked for: of prompt positions start + 1 .. start + num_tokens (as far as the prompt goes), each from the
    # logits of the position before it. The scheduler puts the None of position 0 in front.
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None  # "numerical_error": a hidden state or logit of the chunk is not finite
    filtered: tuple[int, ...] = ()  # with the last prompt chunk of a row that filters: places of the tokens that stay
    kept_blocks: tuple[int, ...] = ()  # where whole blocks, or packed ones, leave: the places of those that stay
    kept: tuple[int, ...] = ()  # where the plan says at most: the slots that remain, as in `Compaction.kept`
    num_merged: int = 0  # tokens that the chunk's compaction merged into others, on average over the kv heads
    pooled: tuple[bytes, tuple[int, ...]] | None = None  # float32 data and shape, with the last chunk of a pooling row
    taps: TapRows | None = None  # what the chunk asked for


@dataclass(frozen=True, slots=True)
class StepResult:
    chunks: tuple[ChunkResult, ...] = ()
    sampler_s: float = 0.0
