"""Executes the plans of a model that reads whole texts: no rows to remember, no cache, no tokens to choose."""

from __future__ import annotations

import torch

from engine.errors import EngineDead
from engine.execution.pooling import joined, part_of, result_of
from engine.models.encoder import EncoderModel, EncoderOutput, EncoderText, batches
from engine.models.pooling import Pooler
from engine.scheduling.plan import ChunkResult, NewRow, StepPlan, StepResult


class EncoderRunner:
    """`engine.isolation.Runner` over one encoder. Every chunk is a whole prompt that arrives in the same plan."""

    def __init__(self, model: EncoderModel, pooler: Pooler, *, runs_alone: bool) -> None:
        """runs_alone: one text at a time, so that a result does not depend on what else is there."""
        self.model = model
        self._pooler = pooler
        self._runs_alone = runs_alone or not model.can_batch

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """One result per chunk. Raises EngineDead when the device refuses all further work."""
        rows = {new.row: new for new in plan.new_rows}
        news = [rows[chunk.row] for chunk in plan.chunks]
        lengths = [len(new.token_ids) for new in news]
        groups = [[index] for index in range(len(news))] if self._runs_alone else batches(lengths)
        results: dict[int, ChunkResult] = {}
        try:
            for group in groups:
                results |= zip(group, self._run([news[index] for index in group]), strict=True)
        except torch.AcceleratorError as error:  # sticky, unlike running out of memory, which is another class
            raise EngineDead(f"the device failed and cannot be used again: {error}") from error
        return StepResult(chunks=tuple(results[index] for index in range(len(news))))

    def _run(self, news: list[NewRow]) -> list[ChunkResult]:
        texts = [EncoderText(new.token_ids, new.pooling.num_first_tokens if new.pooling else 0) for new in news]
        output = self.model.forward(texts)
        return [self._pool(output, index, new) for index, new in enumerate(news)]

    def _pool(self, output: EncoderOutput, index: int, new: NewRow) -> ChunkResult:
        params = new.pooling
        assert params is not None, "a model that cannot generate gets pooling requests only"
        if params.task == "classify" or (params.task == "embed" and params.method == "head"):
            assert output.head is not None
            head = output.head[index : index + 1]
            if params.task == "classify":
                head = self._pooler.activate(head, params)
            return result_of(self._pooler, head, params)
        assert output.hidden is not None
        num_tokens = len(new.token_ids)
        part = part_of(output.hidden[index, :num_tokens], params, 0)
        return result_of(self._pooler, joined([part], params, num_tokens), params)
