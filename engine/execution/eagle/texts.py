"""What a head learns from: texts that the target itself wrote, and its hidden states for every token of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from random import Random

import torch
from torch import Tensor

import kernels
from engine.core import EngineCore
from engine.execution import kv_cache
from engine.models.batch import ForwardBatch, Model
from engine.types import EngineRequest, SamplingParams

TEMPERATURES = (0.0, 0.0, 0.7, 1.0)  # of the texts in turn: how clients ask
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Text:
    """A prompt and what the target said to it."""

    token_ids: list[int]
    num_prompt_tokens: int
    is_greedy: bool


def write_texts(
    core: EngineCore,
    prompts: Iterator[Sequence[int]],
    *,
    num_tokens: int,
    max_output: int,
    max_length: int,
    num_rows: int,
    seconds: float,
    seed: int,
    report: Callable[[int], object],
) -> list[Text]:
    """Texts of about `num_tokens` chosen tokens in all, or as many as the time allows; at least one.

    prompts     endless or not; those without room for an answer below `max_length` are left out
    num_rows    texts that are written side by side
    max_output  most tokens of one answer; report is called with the tokens chosen since the last call
    """
    random, ends = Random(seed), time.monotonic() + seconds
    fitting = (prompt for prompt in prompts if 1 <= len(prompt) <= max_length - 2)
    open_texts: dict[str, tuple[list[int], int, float]] = {}
    found: list[Text] = []
    names, num_done = count(), 0
    while True:
        if num_done < num_tokens and (time.monotonic() < ends or not found):
            for prompt in islice(fitting, max(0, num_rows - len(open_texts))):
                number = next(names)
                temperature = TEMPERATURES[number % len(TEMPERATURES)]
                open_texts[str(number)] = (list(prompt), len(prompt), temperature)
                sampling = SamplingParams(
                    temperature=temperature,
                    seed=random.getrandbits(63),
                    max_tokens=min(max_output, max_length - len(prompt)),
                )
                core.add(EngineRequest(request_id=str(number), prompt_token_ids=list(prompt), sampling=sampling))
        if not open_texts:
            return found
        num_new = 0
        for output in core.step():
            token_ids, num_prompt, temperature = open_texts[output.request_id]
            token_ids.extend(output.token_ids)
            num_new += len(output.token_ids)
            if output.finish_reason is not None:
                del open_texts[output.request_id]
                found.append(Text(token_ids, num_prompt, temperature == 0.0))
        num_done += num_new
        report(num_new)


class FeatureReader:
    """Hidden states of whole texts, through the model's own paged passes."""

    def __init__(self, model: Model, num_texts: int, max_length: int) -> None:
        """num_texts, max_length: most of one call."""
        self._model = model
        num_blocks = num_texts * -(-max_length // BLOCK_SIZE) + 1
        self._cache = kv_cache.allocate(model.spec, num_blocks, BLOCK_SIZE, model.dtype, model.device)

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """[n, C] float32 of each text, behind the model's last norm."""
        lengths = [len(text) for text in texts]
        num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
        table = torch.zeros(len(texts), max(num_blocks), dtype=torch.int32)
        first = 1
        for row, wanted in enumerate(num_blocks):
            table[row, :wanted] = torch.arange(first, first + wanted)
            first += wanted
        positions = [torch.arange(length) for length in lengths]
        slots = [
            table[row, place // BLOCK_SIZE].long() * BLOCK_SIZE + place % BLOCK_SIZE
            for row, place in enumerate(positions)
        ]
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        seq_lens, device = torch.tensor(lengths, dtype=torch.int32), self._model.device
        batch = ForwardBatch(
            token_ids=torch.tensor([token for text in texts for token in text], device=device),
            positions=torch.cat(positions).to(device),
            slots=torch.cat(slots).to(device),
            cu_seqlens_q=starts.to(device),
            seq_lens=seq_lens.to(device),
            block_table=table.to(device),
            max_seqlen_q=max(lengths),
            attention_plan=kernels.plan_attention(
                starts, seq_lens, num_kv_heads=self._model.spec.num_kv_heads, device=device
            ),
        )
        return list(self._model.forward(batch, self._cache).float().split(lengths))
