"""Ends a row's thinking at its budget. Follows from the row's outputs alone: a preempted row goes on alike."""

from __future__ import annotations

from collections.abc import Sequence

from engine.types import ThinkingBudget


class ThinkingLimit:
    """Follows one row's outputs and says which token must come next, if one must."""

    def __init__(self, budget: ThinkingBudget, output_ids: Sequence[int]) -> None:
        """output_ids: what the row has generated before."""
        self._budget = budget
        self._num_matched = 0  # of the ids that open the thinking
        self._is_open = not budget.start_ids
        self._is_over = False
        self._num_thought = 0
        self._num_forced = 0
        for token_id in output_ids:
            self.append(token_id)

    @property
    def forced_id(self) -> int | None:
        if self._is_over or not self._is_open or self._num_thought < self._budget.max_tokens:
            return None
        return self._budget.forced_ids[self._num_forced]

    @property
    def may_end(self) -> bool:
        """Whether the output may end here."""
        return self._is_over or not self._is_open or not self._budget.must_answer

    def append(self, token_id: int) -> None:
        """The row's next output."""
        if self._is_over:
            return
        if self.forced_id is not None:
            self._num_forced += 1
            self._is_over = self._num_forced == len(self._budget.forced_ids)
        elif not self._is_open:
            self._open(token_id)
        elif token_id == self._budget.end_id:
            self._is_over = True
        else:
            self._num_thought += 1

    def _open(self, token_id: int) -> None:
        start = self._budget.start_ids
        if token_id != start[self._num_matched]:
            self._num_matched = 0
        if token_id == start[self._num_matched]:
            self._num_matched += 1
            self._is_open = self._num_matched == len(start)
