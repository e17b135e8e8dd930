"""Drafts on the device: their tokens in the batch, the walk that decides how far they are right, what stays of them.

The walk samples the target once per node, with noise that is keyed by seed and output index alone, and goes down while
a child carries the chosen token. So the output is the one that there would be without a draft, whoever guessed.
Source: "WALK" with position-keyed noise; the sibling-order form is in SpecInfer (Miao et al. 2023, arXiv:2305.09781).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

import kernels
from engine.errors import EngineError, SchemaTooComplex
from engine.execution.constraints import RowConstraints
from engine.execution.rows import RowTable, StepTensors
from engine.execution.sampler import SampleOutput, Sampler
from engine.models.batch import KVCache, Model
from engine.scheduling.plan import Chunk
from engine.speculation.base import TapRows
from engine.speculation.options import MAX_ACCEPT
from engine.speculation.verifiers import MOST_ACCEPTING, verify
from engine.types import TokenLogprob

logger = logging.getLogger(__name__)

MAX_TAPPED_BEFORE = 512  # tokens before a draft whose hidden states are shown: a prompt may be long


def write_drafts(chunks: Sequence[Chunk], rows: RowTable) -> None:
    """Puts the guessed tokens behind the known ones, where the batch will read them."""
    for chunk in chunks:
        if chunk.draft is not None:
            rows.write(chunk.row, chunk.start + 1, chunk.draft.tokens)


def lay_out_trees(chunks: Sequence[Chunk], tensors: StepTensors) -> list[int] | None:
    """Sets the positions of trees' nodes, and returns what every token continues: an index among its row's tokens, -1
    for what comes before them. None where all rows are simple sequences.
    """
    if all(chunk.draft is None or chunk.draft.is_chain for chunk in chunks):
        return None
    parents: list[int] = []
    for chunk in chunks:
        first = len(parents)
        if chunk.draft is None:
            parents.extend(range(-1, chunk.num_tokens - 1))
            continue
        parents.append(-1)
        parents.extend([parent + 1 for parent in chunk.draft.parents])
        depths = np.array((0, *chunk.draft.depths))
        tensors.positions[first : first + chunk.num_tokens] = torch.from_numpy(chunk.start + depths)
    return parents


@dataclass(slots=True)
class Walk:
    """How far one chunk has come. Ordinary chunks are walks of one choice.

    node     where the next choice is made: -1 is the chunk's last known token
    tokens   chosen, and forced by the row's constraint; the sampler knows the first num_committed
    error    a code of engine.errors, found where no token had been chosen before
    rule     name of what decides in place of the walk, where the draft was drawn at random; "" is the walk
    """

    chunk: Chunk
    first_logits: int  # index of the root's logits; node i's are behind them in order
    is_stepwise: bool  # each choice needs the ones before it
    node: int = -1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    num_committed: int = 0
    error: str | None = None
    is_over: bool = False
    rule: str = ""

    @property
    def at(self) -> int:
        return self.first_logits + 1 + self.node

    @property
    def output_index(self) -> int:
        return self.chunk.output_index + len(self.tokens)

    @property
    def num_logits(self) -> int:
        return 1 if self.chunk.draft is None else 1 + len(self.chunk.draft)

    def take(self, token_ids: Sequence[int]) -> None:
        """Goes down the draft along tokens that are part of the output now."""
        self.tokens.extend(token_ids)
        draft = self.chunk.draft
        for token_id in token_ids:
            node = -1 if draft is None else draft.child(self.node, token_id)
            if node < 0:
                self.is_over = True
                return
            self.node = node
            self.accepted.append(node)

    def fail(self, error: str) -> None:
        """No token can be chosen here. Where there are some from before, the next step meets the same again."""
        self.is_over = True
        if not self.tokens:
            self.error = error
        elif len(self.accepted) == len(self.tokens):
            self.accepted.pop()


class Walker:
    """Chooses the next tokens of rows, with or without drafts."""

    def __init__(self, model: Model, sampler: Sampler, constraints: RowConstraints, rows: RowTable) -> None:
        self._model = model
        self._sampler = sampler
        self._constraints = constraints
        self._rows = rows

    def logits(self, walks: Sequence[Walk], hidden: Tensor, firsts: Sequence[int]) -> Tensor:
        """[n, V] of all places where the walks may come to; firsts: index of each walk's root in hidden [T, C]."""
        places = [first + i for walk, first in zip(walks, firsts, strict=True) for i in range(walk.num_logits)]
        if len(places) == hidden.shape[0]:
            return self._model.logits(hidden)  # in their order, so these are all
        return self._model.logits(kernels.gather_rows(hidden, torch.tensor(places, device=hidden.device)))

    def start(self, chunks: Sequence[Chunk]) -> list[Walk]:
        walks, first = [], 0
        for chunk in chunks:
            is_stepwise = self._sampler.counts_outputs(chunk.row) or self._constraints.has(chunk.row)
            rule = "" if is_stepwise or not self._sampler.may_be_verified(chunk.row) else _rule_of(chunk)
            walks.append(Walk(chunk, first, is_stepwise, rule=rule))
            first += walks[-1].num_logits
        return walks

    def run(self, walks: Sequence[Walk], logits: Tensor) -> None:
        """Walks all to their ends. logits [n, V] are overwritten in places."""
        walks = [walk for walk in walks if not (walk.rule and self._judge(walk, logits))]
        if not walks:
            return
        self._first_choices(walks, logits)
        going = self._going(walks)
        while going:
            try:
                places = torch.tensor([walk.at for walk in going], device=logits.device)
                rows = [walk.chunk.row for walk in going]
                output_indices = [walk.output_index for walk in going]
                chosen = self._sampler.choose(logits[places], rows, output_indices, self._constraints.bitmask(rows))
            except torch.AcceleratorError:
                raise
            except Exception:
                # what was chosen before is recorded, so this step counts; the next one begins where this failed
                logger.exception("a draft is checked no further")
                for walk in going:
                    walk.fail(EngineError.code)
                return
            for i, walk in enumerate(going):
                self._record(walk, chosen, i)
            self._commit(going)
            going = self._going(going)

    def _judge(self, walk: Walk, logits: Tensor) -> bool:
        """The draft's tokens by the walk's rule. False where that cannot be: the walk will do, or say what is wrong."""
        chunk = walk.chunk
        assert chunk.draft is not None, "rules are for drafts"
        p = self._sampler.probabilities(logits[walk.first_logits :][: walk.num_logits], chunk.row)
        q = chunk.draft.q
        if not bool(p.isfinite().all()) or q is None or q.shape[1] != p.shape[1]:
            return False
        rows = p.cpu().numpy()
        chance = self._sampler.chance(chunk.row, chunk.output_index)
        try:
            verdict = verify(walk.rule, chunk.draft, lambda node: rows[node + 1], chance)
        except Exception:
            logger.exception("a draft cannot be judged by %s; it is walked", walk.rule)
            return False
        walk.tokens = [*(chunk.draft.tokens[node] for node in verdict.path), verdict.token]
        walk.accepted = list(verdict.path)
        walk.is_over = True
        for index, token_id in enumerate(walk.tokens, start=chunk.output_index):
            self._rows.set_token(chunk.row, index, token_id)
        return True

    def _going(self, walks: Sequence[Walk]) -> list[Walk]:
        """Those that are not over. A constraint that begins in the middle of a draft may still have to be built."""
        going = [walk for walk in walks if not walk.is_over]
        waiting = self._constraints.waiting([walk.chunk.row for walk in going])
        for walk in going:
            if walk.chunk.row in waiting:
                walk.fail(EngineError.code)
        return [walk for walk in going if not walk.is_over]

    def _first_choices(self, walks: Sequence[Walk], logits: Tensor) -> None:
        """Everything that can be chosen at once: all nodes of drafts whose choices do not need each other."""
        places: list[int] = []
        rows: list[int] = []
        output_indices: list[int] = []
        firsts = []
        for walk in walks:
            firsts.append(len(places))
            draft = None if walk.is_stepwise else walk.chunk.draft
            places.append(walk.first_logits)
            output_indices.append(walk.chunk.output_index)
            if draft is not None:
                places.extend(range(walk.first_logits + 1, walk.first_logits + walk.num_logits))
                output_indices.extend([walk.chunk.output_index + depth for depth in draft.depths])
            rows.extend([walk.chunk.row] * (len(places) - len(rows)))
        if len(places) < logits.shape[0]:
            logits = logits[torch.tensor(places, device=logits.device)]
        chosen = self._sampler.choose(logits, rows, output_indices, self._constraints.bitmask(rows))
        for walk, first in zip(walks, firsts, strict=True):
            if not walk.is_stepwise and chosen.logprobs is None:
                self._go_down(walk, chosen, first)
                continue
            self._record(walk, chosen, first)
            while not walk.is_over and not walk.is_stepwise:
                self._record(walk, chosen, first + 1 + walk.node)
        self._commit(walks)

    def _go_down(self, walk: Walk, chosen: SampleOutput, first: int) -> None:
        """`_record` again and again, where no choice depends on another and only tokens are asked for."""
        draft, row = walk.chunk.draft, walk.chunk.row
        output_index = walk.output_index
        while not walk.is_over:
            i = first + 1 + walk.node
            token_id = chosen.token_ids[i]
            if chosen.errors[i] is not None:
                walk.fail(str(chosen.errors[i]))
                break
            walk.tokens.append(token_id)
            node = -1 if draft is None else draft.child(walk.node, token_id)
            if node < 0:
                walk.is_over = True
            else:
                walk.node = node
                walk.accepted.append(node)
        self._rows.write(row, self._rows.num_prompt_tokens(row) + output_index, walk.tokens)

    def _record(self, walk: Walk, chosen: SampleOutput, i: int) -> None:
        """Choice i of a call is the walk's next token: writes it, and what its constraint forces, into the row."""
        row, token_id = walk.chunk.row, chosen.token_ids[i]
        error = SchemaTooComplex.code if row in self._constraints.failed else chosen.errors[i]
        if error is not None:
            walk.fail(error)
            return
        if chosen.logprobs is not None and (entry := chosen.logprobs[i]) is not None:
            walk.logprobs.append(entry)
        output_index = walk.output_index
        self._rows.set_token(row, output_index, token_id)
        # what does not fit is not missed: the request is over then
        forced = self._constraints.advance(row, token_id)[: self._rows.num_free(row, output_index)]
        for index, forced_id in enumerate(forced, start=output_index + 1):
            self._rows.set_token(row, index, forced_id)
        walk.take((token_id, *forced))
        if self._constraints.has_ended(row, walk.tokens[-1]):
            walk.is_over = True

    def _commit(self, walks: Sequence[Walk]) -> None:
        """Counts the tokens chosen since the last call as generated, where the next choice depends on them."""
        counting = [walk for walk in walks if walk.is_stepwise and walk.num_committed < len(walk.tokens)]
        while counting:
            self._sampler.commit(
                [walk.chunk.row for walk in counting], [walk.tokens[walk.num_committed] for walk in counting]
            )
            for walk in counting:
                walk.num_committed += 1
            counting = [walk for walk in counting if walk.num_committed < len(walk.tokens)]


def _rule_of(chunk: Chunk) -> str:
    """Which rule decides about a draft, "" for the walk."""
    draft = chunk.draft
    if draft is None or draft.kind == "delta" or chunk.verifier == "walk":
        return ""
    if chunk.verifier == MAX_ACCEPT:
        return "block" if draft.is_chain else MOST_ACCEPTING[draft.kind]
    return chunk.verifier


def taps_of(walk: Walk, logits: Tensor, hidden: Tensor, first: int) -> TapRows | None:
    """What drafters want to see of a chunk, to be taken before the logits are processed. first: its root in hidden."""
    taps = walk.chunk.taps
    if taps is None:
        return None
    own = slice(walk.first_logits, walk.first_logits + walk.num_logits)
    topk = None
    if taps.topk:
        best = logits[own].topk(min(taps.topk, logits.shape[1]), dim=1).indices
        topk = best.to("cpu", torch.int32).numpy()
    if not taps.hidden_last:
        return TapRows(topk_ids=topk)
    begin = first - min(walk.chunk.num_tokens - walk.num_logits, MAX_TAPPED_BEFORE)
    last = hidden[begin : first + walk.num_logits].float().cpu().numpy()
    return TapRows(topk_ids=topk, hidden=last[first - begin :], hidden_before=last[: first - begin])


def keep_accepted(walks: Sequence[Walk], rows: RowTable, cache: KVCache) -> None:
    """Moves the accepted nodes' keys and values to the slots behind their rows' roots; the others are forgotten."""
    sources: list[int] = []
    targets: list[int] = []
    for walk in walks:
        chunk = walk.chunk
        if chunk.draft is None:
            continue
        behind_root = chunk.start + 1 - rows.num_dropped(chunk.row)
        for place, node in enumerate(walk.accepted):
            if node != place:
                sources.append(rows.slot(chunk.row, behind_root + node))
                targets.append(rows.slot(chunk.row, behind_root + place))
        rows.truncate(chunk.row, behind_root + len(walk.accepted))
    if sources:
        kernels.move_slots(_flat(cache.k), _flat(cache.v), _addresses(sources, cache), _addresses(targets, cache))


def forget_draft(chunk: Chunk, rows: RowTable) -> None:
    """Nothing was chosen in the step: all of it is run again."""
    rows.truncate(chunk.row, chunk.start - rows.num_dropped(chunk.row))


def _addresses(slots: Sequence[int], cache: KVCache) -> Tensor:
    """[L * H_kv, n] int64: where each layer and head has the slots, in the pools seen as rows."""
    _, num_layers, num_heads, block_size, _ = cache.k.shape
    lanes = torch.arange(num_layers * num_heads).unsqueeze(1)
    blocks, offsets = torch.tensor(slots).div(block_size, rounding_mode="floor"), torch.tensor(slots) % block_size
    return ((blocks * lanes.shape[0] + lanes) * block_size + offsets).to(cache.k.device)


def _flat(pool: Tensor) -> Tensor:
    """A pool [NB, L, H_kv, BS, D] as rows [NB * L * H_kv * BS, D]."""
    return pool.view(-1, pool.shape[-1])
