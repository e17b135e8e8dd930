"""Constraints of the rows that have one: a matcher each, which tokens it allows, which ones it forces. Knows rows only.

Matchers are built, moved on and asked for masks in threads, with the interpreter lock released: the mask for the next
token is on its way as soon as the last one is known, while the scheduler plans and the model runs. llguidance does the
matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from torch import Tensor

from engine.constraints.cache import LRUCache
from engine.constraints.vocabulary import Vocabulary
from engine.resources import num_cores
from engine.types import CompiledConstraint, SamplingParams

MAX_PROTOTYPES = 64
# Most matchers are built in less; a row whose matcher takes longer sits out steps instead of holding them up.
PATIENCE_S = 0.005
MAX_THREADS = 4
ALL_ALLOWED = -1


@dataclass(slots=True)
class _Row:
    """
    building      ends when the matcher is there; the matcher is None until then
    awaited       text that must come before the constraint applies; empty once it does
    tail          the end of the output that may hold the beginning of `awaited`
    pending       tokens of the output that the matcher has not seen
    is_current    the row's mask is that of its next token
    """

    building: Future[LLMatcher]
    awaited: bytes
    can_jump: bool  # forced tokens may be appended
    ignores_eos: bool  # the output goes on as long as anything else is allowed
    matcher: LLMatcher | None = None
    tail: bytes = b""
    pending: list[int] = field(default_factory=list)
    is_current: bool = False


class RowConstraints:
    """Matchers and masks of up to `max_rows` rows. All methods belong to the thread of the step loop.

    failed   rows whose grammar became too complex to follow; what `bitmask` gives for them means nothing
    """

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        logits_size: int,
        max_rows: int,
        device: torch.device,
        *,
        jumps: bool = True,
    ) -> None:
        """
        vocabulary   None: this model cannot have constrained rows
        jumps        whether tokens are appended that a grammar leaves no choice about
        """
        self._vocabulary = vocabulary
        self._eos_token_ids = () if vocabulary is None else vocabulary.eos_token_ids
        self._device = device
        self._jumps = jumps
        self.failed: set[int] = set()
        self._rows: dict[int, _Row] = {}
        self._unbuilt: set[int] = set()  # rows whose matcher is not there
        self._prototypes: LRUCache[LLMatcher] = LRUCache(MAX_PROTOTYPES, MAX_PROTOTYPES)
        self._max_rows = max_rows
        self._mask_words = -(-logits_size // 32)
        self._eos_mask = np.zeros(self._mask_words, dtype=np.uint32)
        for token_id in self._eos_token_ids:
            self._eos_mask[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._eos_words = np.flatnonzero(self._eos_mask)
        self._masks = torch.zeros(0)  # [max_rows, mask_words] int32 once there is a constrained row
        self._executor: LLExecutor | None = None
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._follower = ThreadPoolExecutor(1, thread_name_prefix="mask")
        self._following: Future[None] | None = None
        self._left: set[int] = set()  # rows that were removed while the follower may still write about them

    def add_row(
        self, row: int, constraint: CompiledConstraint, output_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """The row is constrained from now on; output_ids is what it generated before, for instance a preemption."""
        self.remove_row(row)
        assert self._vocabulary is not None, "the front end lets no constraint through to this model"
        if self._executor is None:
            self._masks = self._new_masks()
            self._executor = LLExecutor(max(1, min(num_cores() // 2, MAX_THREADS)))
        # Log-probabilities are of what the model computed, and a bias must be able to forbid what the grammar forces.
        can_jump = self._jumps and params.logprobs is None and not params.logit_bias and not params.allowed_token_ids
        state = _Row(Future(), constraint.after.encode(), can_jump, params.ignore_eos)
        num_free = 0  # tokens before the constraint applied
        while state.awaited and num_free < len(output_ids):
            self._await(state, output_ids[num_free])
            num_free += 1
        state.building = self._builder.submit(self._build, constraint.grammar, list(output_ids[num_free:]))
        self._rows[row] = state
        self._unbuilt.add(row)

    def remove_row(self, row: int) -> None:
        if self._rows.pop(row, None) is not None:
            self._unbuilt.discard(row)
            self._left.add(row)

    def has(self, row: int) -> bool:
        return row in self._rows

    def has_ended(self, row: int, token_id: int) -> bool:
        """Whether the token ends a constrained row: nothing may follow it."""
        return row in self._rows and token_id in self._eos_token_ids

    @property
    def are_built(self) -> bool:
        """No row has to wait for its matcher, or still may have to."""
        return not self._unbuilt

    def waiting(self, rows: Sequence[int]) -> set[int]:
        """Those of the rows that cannot choose yet. Gives their matchers a moment, which mostly is enough."""
        if not self._unbuilt:
            return set()
        building = {row: self._rows[row] for row in rows if row in self._unbuilt and not self._rows[row].awaited}
        wait([state.building for state in building.values()], timeout=PATIENCE_S)
        for row, state in building.items():
            if state.building.done():
                state.matcher = state.building.result()
                self._unbuilt.discard(row)
        return self._unbuilt.intersection(building)

    def bitmask(self, rows: Sequence[int]) -> Tensor | None:
        """[N, ceil(V / 32)] int32 on the device: what each of the rows may choose next. None: everything.

        Those of the rows that are constrained must not be `waiting`.
        """
        if self._left:
            self._wait()
        if not self._rows or not any(row in self._rows for row in rows):
            return None
        self.follow(rows)
        self._wait()
        return self._masks[list(rows)].to(self._device, non_blocking=True)

    def advance(self, row: int, token_id: int) -> Sequence[int]:
        """The row has chosen a token. Returns those that must follow it; from now on they count as generated.

        An end-of-sequence token is the last of them where the grammar allows nothing more.
        """
        return self.advance_all((row,), (token_id,))[0]

    def advance_all(self, rows: Sequence[int], token_ids: Sequence[int]) -> list[Sequence[int]]:
        """`advance` of distinct rows that have chosen a token each (negative: none): what must follow each of them."""
        found: list[Sequence[int]] = [()] * len(rows)
        for i, row in enumerate(rows):
            state, token_id = self._rows.get(row), token_ids[i]
            if state is None or token_id < 0 or row in self.failed:
                continue
            if state.awaited:
                self._await(state, token_id)
                continue
            state.is_current = False
            state.pending.append(token_id)
            if state.can_jump and token_id not in self._eos_token_ids:
                found[i] = state.pending = self._forced_after(state)
        return found

    def follow(self, rows: Sequence[int]) -> None:
        """Starts to move these rows' matchers on and to fill their masks; `bitmask` waits for the end."""
        todo = [
            (state, row)
            for row in rows
            if (state := self._rows.get(row)) is not None
            and not (state.is_current or state.awaited or state.matcher is None)
        ]
        if not todo:
            return
        self._wait()
        for state, _ in todo:
            state.is_current = True
        self._following = self._follower.submit(self._follow, todo)

    def _forced_after(self, state: _Row) -> list[int]:
        """The next tokens as far as there is no choice, with the end of the output if it is reached by then.

        Asked between two steps: a few microseconds where nothing is forced, and where something is, less than the row's
        share of the forward pass that is saved. In this thread, because to hand it to another one takes longer.
        """
        matcher = state.matcher
        assert matcher is not None, "only rows that have one choose"
        matcher.consume_tokens(state.pending)
        if matcher.is_stopped():
            return [] if matcher.is_error() else list(self._eos_token_ids[:1])
        return matcher.compute_ff_tokens()

    def _await(self, state: _Row, token_id: int) -> None:
        """One more token before the constraint applies, or the one that ends the wait."""
        assert self._vocabulary is not None
        text = state.tail + self._vocabulary.token_bytes(token_id)
        if state.awaited in text:
            state.awaited = state.tail = b""
        else:
            state.tail = text[-len(state.awaited) :]

    # ---- in the builder's thread

    def _build(self, grammar: str, output_ids: list[int]) -> LLMatcher:
        assert self._vocabulary is not None
        prototype = self._prototypes.get(grammar)
        if prototype is None:
            prototype = self._vocabulary.matcher(grammar)
            self._prototypes.put(grammar, prototype, 1)
        matcher = prototype.deep_copy()
        matcher.consume_tokens(output_ids)
        return matcher

    # ---- in the follower's thread, which alone touches these rows until it is waited for

    def _follow(self, todo: list[tuple[_Row, int]]) -> None:
        assert self._executor is not None
        masks: list[tuple[LLMatcher, int]] = []
        behind: list[tuple[LLMatcher, list[int]]] = []
        for state, row in todo:
            assert state.matcher is not None, "only rows that have one are followed"
            masks.append((state.matcher, row))
            if state.pending:
                behind.append((state.matcher, state.pending))
                state.pending = []
        # one token of every row after the other: unlike a matcher's own call, this one lets the interpreter go
        for i in range(max([len(pending) for _, pending in behind], default=0)):
            self._executor.consume_token_par([(matcher, ids[i]) for matcher, ids in behind if i < len(ids)])
        self._executor.unsafe_compute_mask_ptr(
            masks, self._masks.data_ptr(), self._mask_words * self._masks.element_size(), self._max_rows
        )
        self.failed.update([row for matcher, row in masks if matcher.is_error()])
        if endless := [row for state, row in todo if state.ignores_eos]:
            self._withhold_eos(endless)

    def _withhold_eos(self, rows: Sequence[int]) -> None:
        """Takes the end-of-sequence tokens out of those masks that hold others."""
        masks = self._masks.numpy().view(np.uint32)
        allowing = (masks[rows][:, self._eos_words] & self._eos_mask[self._eos_words]).any(axis=1)
        for i in np.flatnonzero(allowing).tolist():  # few of them: mostly something is still to come
            without = masks[rows[i]] & ~self._eos_mask
            if without.any():
                masks[rows[i]] = without

    def _wait(self) -> None:
        if self._following is not None:
            following, self._following = self._following, None
            following.result()
        for row in self._left:
            self.failed.discard(row)
            self._masks[row] = ALL_ALLOWED
        self._left.clear()

    @torch.inference_mode(False)  # or the follower's thread, which is outside of that mode, could not write them
    def _new_masks(self) -> Tensor:
        return torch.full(
            (self._max_rows, self._mask_words),
            ALL_ALLOWED,
            dtype=torch.int32,
            pin_memory=self._device.type == "cuda",
        )
