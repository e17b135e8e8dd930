"""Endless batches for one phase: drills at fixed length, chats and plain text in buckets of like length.

A worker process makes them ahead of the training step. The stream depends only on (seed, worker, phase name, first
step). Every row holds one sample, so nothing attends across samples; rows are padded to their bucket.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from engine.mimir import model_path
from engine.mimir.corpus.plain_text import PLAIN_MAKERS
from engine.mimir.corpus.symbols import Drill
from engine.mimir.presets import Phase
from engine.mimir.tasks import FIRST_TRAINING_SEED, SIZED, make_chat

BUCKETS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
SHORTEST_CONTEXT = 48
PAD_ID = 2
Row = tuple[str, list[int], list[bool]]  # task, ids, scored


@dataclass(frozen=True)
class Batch:
    """`ids` and `mask` are [B, T]; `mask` marks tokens whose prediction is scored; `tasks` names each row's task."""

    ids: Tensor
    mask: Tensor
    tasks: list[str]


@dataclass(frozen=True)
class StreamSpec:
    """What a worker needs to build a phase's stream."""

    phase: Phase
    seed: tuple[int, int]
    first_step: int
    tokens_per_step: int
    vocab_size: int


class BatchStream(IterableDataset[Batch]):
    """Iterates over `batches(spec)`; iterable so that a DataLoader can run it in another process."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        return batches(self.spec, 0 if worker is None else worker.id)


def load_batches(spec: StreamSpec, num_workers: int) -> Iterator[Batch]:
    """The phase's batches, made by `num_workers` processes a few steps ahead."""
    ahead = 8 if num_workers else None
    return iter(DataLoader(BatchStream(spec), batch_size=None, num_workers=num_workers, prefetch_factor=ahead))


def batches(spec: StreamSpec, worker: int = 0) -> Iterator[Batch]:
    """Batches of the phase, each from one drill or from the text stream, drawn by weight."""
    rng = np.random.default_rng((*spec.seed, worker, zlib.crc32(spec.phase.name.encode()), spec.first_step))
    texts = TextStream(spec, rng)
    sources: list[Drill | None] = [*spec.phase.drills, None]
    weights = np.array([*spec.phase.drills.values(), sum(spec.phase.texts.values())])
    while True:
        drill = sources[int(rng.choice(len(sources), p=weights / weights.sum()))]
        yield texts.next_batch() if drill is None else drill_batch(drill, rng, spec)


def drill_batch(drill: Drill, rng: np.random.Generator, spec: StreamSpec) -> Batch:
    """One batch of a drill, `tokens_per_step` tokens."""
    ids, mask = drill.rows(rng, max(1, spec.tokens_per_step // drill.length), spec.vocab_size)
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), [drill_name(drill)] * len(ids))


def drill_name(drill: Drill) -> str:
    return f"{drill.kind}-{drill.length}"


class TextStream:
    """Samples of the phase's text tasks, collected by length until a batch is full.

    A phase weighs tasks by their share of tokens; long tasks are therefore drawn less often. Plain text, where every
    token is scored, gets batches of its own so that it does not drown the few scored tokens of the tasks.
    """

    def __init__(self, spec: StreamSpec, rng: np.random.Generator) -> None:
        self.spec, self.rng = spec, rng
        self.tokenizer = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
        self.tasks = sorted(spec.phase.texts)
        self.mean_lengths = dict.fromkeys(self.tasks, 100.0)
        self.waiting: dict[tuple[bool, int], list[Row]] = defaultdict(list)

    def next_batch(self) -> Batch:
        while True:
            task = self._draw_task()
            row = self._plain(task) if task in PLAIN_MAKERS else self._chat(task)
            length = len(row[1])
            self.mean_lengths[task] += 0.02 * (length - self.mean_lengths[task])
            if length > self.spec.phase.max_length * 1.3 or length > BUCKETS[-1]:
                continue
            bucket = next(size for size in BUCKETS if size >= length)
            rows = self.waiting[task in PLAIN_MAKERS, bucket]
            rows.append(row)
            if len(rows) * bucket >= self.spec.tokens_per_step:
                del self.waiting[task in PLAIN_MAKERS, bucket]
                return collate(rows, bucket)

    def _draw_task(self) -> str:
        odds = np.array([self.spec.phase.texts[task] / self.mean_lengths[task] for task in self.tasks])
        return self.tasks[int(self.rng.choice(len(self.tasks), p=odds / odds.sum()))]

    def _chat(self, task: str) -> Row:
        """A conversation as ids, assistant turns scored; context lengths are log-uniform up to `max_length`."""
        low, high = np.log(SHORTEST_CONTEXT), np.log(self.spec.phase.max_length)
        size = int(np.exp(self.rng.uniform(low, high))) if task in SIZED else int(self.rng.integers(40, 160))
        chat = make_chat(task, int(self.rng.integers(FIRST_TRAINING_SEED, 1 << 62)), size)
        ids: list[int] = []
        scored: list[bool] = []
        for text, is_scored in chat.segments():
            piece = self.tokenizer.encode(text).ids
            ids += piece
            scored += [is_scored] * len(piece)
        return task, ids, scored

    def _plain(self, task: str) -> Row:
        text = PLAIN_MAKERS[task](self.rng)
        ids = self.tokenizer.encode(text).ids[: min(256, self.spec.phase.max_length)]
        return task, ids, [True] * len(ids)


def collate(rows: list[Row], length: int) -> Batch:
    """Rows padded to `length`."""
    ids = torch.full((len(rows), length), PAD_ID)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, (_, row_ids, scored) in enumerate(rows):
        ids[index, : len(row_ids)] = torch.tensor(row_ids)
        mask[index, : len(row_ids)] = torch.tensor(scored)
    return Batch(ids, mask, [task for task, _, _ in rows])
