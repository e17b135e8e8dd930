"""Trains a head on texts that its target wrote, and measures how often it is right.

Loss: cross-entropy to the target's own distribution, and smooth L1 to its hidden states, at every depth of the unrolled
draft (EAGLE, arXiv:2401.15077, equations 4 to 6, with the weights turned round: what is accepted is tokens).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.execution.eagle.files import HeadShape
from engine.execution.eagle.module import HeadModule
from engine.execution.eagle.texts import FeatureReader, Text
from engine.models.batch import Model

EVALUATED_DEPTHS = 4
CLIP_NORM = 1.0
TEXTS_PER_READ = 16
WARM_UP = 0.03  # of the training
WHOLE_SHARE = 0.3  # of the contexts that begin with their text
SHORT_CONTEXT = 32  # entries of the prompt in the others, at most


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """
    depth           tokens that the drafts of the training unroll
    batch_tokens    of one step
    max_length      of a text; what is longer is cut
    learning_rate   of matrices (Muon), at its highest; norms (AdamW) have a tenth of it
    temperature     of the two distributions that are compared: below 1 what is likeliest counts for more
    feature_weight  of the distance to the true features, beside the cross-entropy
    depth_decay     weight of a depth, relative to the one before
    noise           uniform, added to features, relative to their mean size
    """

    depth: int = 3
    batch_tokens: int = 4096
    max_length: int = 256
    learning_rate: float = 6e-3
    temperature: float = 0.5
    feature_weight: float = 0.5
    depth_decay: float = 0.8
    noise: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class TargetEnds:
    """What a head shares with its target: embedding and output head, [V, C] float32, and how logits are scaled."""

    embedding: Tensor
    head: Tensor
    logits_divisor: float = 1.0
    logits_soft_cap: float = 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.head)
        if self.logits_divisor != 1.0:
            logits = logits / self.logits_divisor
        return logits if not self.logits_soft_cap else self.logits_soft_cap * torch.tanh(logits / self.logits_soft_cap)


@dataclass(frozen=True)
class Sample:
    """A text whose context begins at one of its tokens."""

    text: Text
    begin: int

    @property
    def num_entries(self) -> int:
        return len(self.text.token_ids) - 1 - self.begin


@dataclass(frozen=True)
class Batch:
    """Texts side by side. Shape letters: B texts, T entries, C width.

    embeddings, features  [B, T, C]: of the token behind each place, and of the place
    wanted                [B, T, C]: features that the entries are to predict
    scored                [B] first entry whose guess counts
    lengths               [B]: entries from there on are padding
    next_ids              [B, T] token that the target chose behind what the entry predicts, -1 where the text ends
    """

    embeddings: Tensor
    features: Tensor
    wanted: Tensor
    scored: Tensor
    lengths: Tensor
    next_ids: Tensor

    def counts(self, level: int) -> Tensor:
        """[B, T] bool: entries whose guess at this level would be one of a real draft."""
        place = torch.arange(self.features.shape[1], device=self.features.device)
        return (place >= self.scored[:, None] + level) & (place < self.lengths[:, None])


class Trainer:
    """One head in training."""

    def __init__(
        self, model: Model, ends: TargetEnds, shape: HeadShape, options: TrainingOptions, texts: Sequence[Text]
    ) -> None:
        """texts: at least one, of at least three tokens."""
        torch.manual_seed(options.seed)
        self.options = options
        self._ends = ends
        self._random = Random(options.seed)
        self._texts = [cut for text in texts if (cut := _cut(text, options.max_length)) is not None]
        self._texts_per_read = max(TEXTS_PER_READ, options.batch_tokens // options.max_length)
        self._reader = FeatureReader(model, self._texts_per_read, options.max_length)
        self._noise = torch.Generator(device=model.device).manual_seed(options.seed)
        self.module = HeadModule(shape, options.max_length).to(model.device)
        first = self._batch([Sample(text, 0) for text in self._texts[:8]])
        counted = first.counts(0)
        self.module.adopt_sizes(first.embeddings[counted], first.features[counted])
        self._size = float(first.features[counted].pow(2).mean().sqrt())
        self._optimizers = _optimizers(self.module, options)

    def run(self, seconds: float, max_steps: int | None, report: Callable[[float, float], None]) -> Iterator[float]:
        """Steps until the time or the steps are over: yields the loss of each. report(share done, loss) in between."""
        started, step = time.monotonic(), 0
        while True:
            for samples in self._epoch():
                done = (time.monotonic() - started) / seconds if seconds > 0 else 1.0
                if max_steps is not None:
                    done = max(done, step / max_steps)
                if done >= 1.0:
                    return
                loss = self._step(self._batch(samples), done)
                step += 1
                report(min(1.0, done), loss)
                yield loss

    def _epoch(self) -> Iterator[list[Sample]]:
        """All texts in groups of like size, in random order."""
        samples = [Sample(text, self._begin(text)) for text in self._texts]
        self._random.shuffle(samples)
        groups: list[list[Sample]] = [[]]
        for sample in sorted(samples, key=lambda sample: sample.num_entries):
            if (len(groups[-1]) + 1) * sample.num_entries > self.options.batch_tokens:
                groups.append([])
            groups[-1].append(sample)
        groups = [group for group in groups if group]
        self._random.shuffle(groups)
        yield from groups

    def _begin(self, text: Text) -> int:
        """Where a context begins: at the text's beginning, or close to the end of its prompt, which costs less."""
        if self._random.random() < WHOLE_SHARE:
            return 0
        return max(0, text.num_prompt_tokens - 1 - self._random.randint(0, SHORT_CONTEXT))

    def _step(self, batch: Batch, done: float) -> float:
        scale = min(1.0, done / WARM_UP + 1e-3) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), CLIP_NORM)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the depths, weighted."""
        options = self.options
        spread = torch.rand(batch.features.shape, generator=self._noise, device=batch.features.device) * 2 - 1
        features = batch.features + spread * (options.noise * self._size)
        levels = self.module(batch.embeddings, features, options.depth)
        total, weights = batch.features.new_zeros(()), 0.0
        with torch.no_grad():
            everything = batch.counts(0)
            places = torch.full(everything.shape, -1, device=everything.device)
            places[everything] = torch.arange(int(everything.sum()), device=everything.device)
            law = (self._ends.logits(batch.wanted[everything]) / options.temperature).softmax(-1)  # [N, V]
        for level, predicted in enumerate(levels):
            counted = batch.counts(level)
            if not bool(counted.any()):
                continue
            found, true = predicted[counted], batch.wanted[counted]
            own_law = law if level == 0 else law[places[counted]]
            entropy = F.cross_entropy(self._ends.logits(found) / options.temperature, own_law)
            distance = F.smooth_l1_loss(found / self._size, true / self._size)
            weight = options.depth_decay**level
            total = total + weight * (entropy + options.feature_weight * distance)
            weights += weight
        return total / weights

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        embedding = self._ends.embedding
        device, width = embedding.device, embedding.shape[1]
        features = [feature.clone() for feature in self._read(samples)]
        size = (len(samples), max(sample.num_entries for sample in samples))
        inputs, wanted = (torch.zeros(*size, width, device=device) for _ in range(2))
        ids, next_ids = torch.zeros(size, dtype=torch.int64, device=device), torch.full(size, -1, device=device)
        for row, (sample, feature) in enumerate(zip(samples, features, strict=True)):
            count = sample.num_entries
            own = torch.tensor(sample.text.token_ids[sample.begin :], device=device)
            inputs[row, :count], wanted[row, :count] = feature[:-1], feature[1:]
            ids[row, :count] = own[1:]
            next_ids[row, : count - 1] = own[2:]
        return Batch(
            embeddings=F.embedding(ids, embedding),
            features=inputs,
            wanted=wanted,
            scored=torch.tensor([s.text.num_prompt_tokens - 1 - s.begin for s in samples], device=device),
            lengths=torch.tensor([s.num_entries for s in samples], device=device),
            next_ids=next_ids,
        )

    def _read(self, samples: Sequence[Sample]) -> Iterator[Tensor]:
        """The target's hidden states, [entries + 1, C] of each sample."""
        for first in range(0, len(samples), self._texts_per_read):
            group = samples[first : first + self._texts_per_read]
            for sample, feature in zip(group, self._reader.read([s.text.token_ids for s in group]), strict=True):
                yield feature[sample.begin :]

    @torch.no_grad()
    def acceptance(self, texts: Sequence[Text], depths: int = EVALUATED_DEPTHS) -> list[float]:
        """Share of greedy guesses that are right at each depth, of those drafts that were right so far.

        texts: greedy ones, not trained on. A draft behind every chosen token of them is looked at.
        """
        reached, right = [0] * depths, [0] * depths
        cuts = [cut for text in texts if text.is_greedy and (cut := _cut(text, self.options.max_length)) is not None]
        for first in range(0, len(cuts), self._texts_per_read):
            batch = self._batch([Sample(text, 0) for text in cuts[first : first + self._texts_per_read]])
            alive = None
            for level, predicted in enumerate(self.module(batch.embeddings, batch.features, depths)):
                known = batch.counts(level) & (batch.next_ids >= 0)
                if alive is not None:
                    known &= F.pad(alive, (1, 0))[:, :-1]
                hits = known.clone()
                hits[known] = self._ends.logits(predicted[known]).argmax(-1) == batch.next_ids[known]
                reached[level] += int(known.sum())
                right[level] += int(hits.sum())
                alive = hits
        return [hit / max(1, count) for hit, count in zip(right, reached, strict=True)]


def _optimizers(module: HeadModule, options: TrainingOptions) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the norms. Not compared with AdamW for both."""
    matrices = [weight for weight in module.parameters() if weight.ndim == 2]
    vectors = [weight for weight in module.parameters() if weight.ndim != 2]
    rates = (options.learning_rate, 0.1 * options.learning_rate)
    found: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rates[0], weight_decay=0.0, momentum=0.95),
        torch.optim.AdamW(vectors, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer, rate in zip(found, rates, strict=True):
        for group in optimizer.param_groups:
            group["full_rate"] = rate
    return found


def _cut(text: Text, max_length: int) -> Text | None:
    """The end of the prompt and the beginning of the answer, as much of both as fits; None where nothing is scored."""
    skipped = max(0, min(len(text.token_ids) - max_length, text.num_prompt_tokens - max_length // 2))
    token_ids = text.token_ids[skipped : skipped + max_length]
    num_prompt = text.num_prompt_tokens - skipped
    return Text(token_ids, num_prompt, text.is_greedy) if len(token_ids) >= num_prompt + 2 else None
