"""What follows the hidden states of a prompt: dense layers, length one, class scores. Knows no steps and no rows.

Shape letters: N results, C hidden size, E embedding size, K labels. All arithmetic is float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import ConfigError
from engine.models.pooling_config import SCORE, DenseConfig, PoolerConfig
from engine.models.safetensors_file import TensorEntry, read_checkpoint
from engine.models.weights import read_tensor
from engine.types import PoolingInfo, PoolingParams, PoolingTask


class Pooler:
    """The layers behind the pooling of one model, and what they make of a request."""

    def __init__(self, config: PoolerConfig, hidden_size: int, denses: list[Dense], score: Tensor | None) -> None:
        """score: [K, C] of a decoder's classifier; None: no classifier, or one that the encoder itself computes."""
        self.config = config
        self._denses = denses
        self._score = score
        self.embedding_size = denses[-1].weight.shape[0] if denses else hidden_size

    @property
    def tasks(self) -> list[PoolingTask]:
        found: list[PoolingTask] = [] if self.config.method is None else ["embed", "token_embed"]
        return [*found, "classify"] if self.config.classifier is not None else found

    @property
    def info(self) -> PoolingInfo:
        """For the front end."""
        config, classifier = self.config, self.config.classifier
        return PoolingInfo(
            tasks=self.tasks,
            method=config.method or "last",
            normalize=config.normalize,
            embedding_size=self.embedding_size,
            matryoshka=config.matryoshka,
            matryoshka_dimensions=list(config.matryoshka_dimensions),
            labels=list(classifier.labels) if classifier else [],
            activation=classifier.activation if classifier else "identity",
            prompts=dict(config.prompts),
            default_prompt=config.default_prompt,
            source=config.source,
        )

    def finish(self, pooled: Tensor, params: PoolingParams) -> Tensor:
        """[N, C] float32 -> [N, E] embeddings or [N, K] scores; for token_embed the N tokens as they are, or scaled."""
        if params.task == "classify":
            return self.activate(functional.linear(pooled, self._score), params) if self._score is not None else pooled
        if params.task == "embed":
            for dense in self._denses:
                pooled = dense(pooled)
        if params.dimensions is not None:
            pooled = pooled[:, : params.dimensions]
        return functional.normalize(pooled, dim=1) if params.activate else pooled

    def activate(self, logits: Tensor, params: PoolingParams) -> Tensor:
        """Class scores [N, K] of logits [N, K]."""
        classifier = self.config.classifier
        if classifier is None or not params.activate:
            return logits
        match classifier.activation:
            case "sigmoid":
                return logits.sigmoid()
            case "softmax":
                return logits.softmax(dim=1)
            case "identity":
                return logits


class Dense:
    """y = activation(x W^T + b)."""

    def __init__(self, config: DenseConfig, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self._bias = bias
        self._has_tanh = config.activation == "tanh"

    def __call__(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight, self._bias)
        return y.tanh() if self._has_tanh else y


def build_pooler(
    folder: Path, config: PoolerConfig, hidden_size: int, device: torch.device, *, has_score: bool
) -> Pooler:
    """Reads the dense layers and, with has_score, the head of a classifying decoder.

    Raises ConfigError for weights that do not fit.
    """
    denses, size = [], hidden_size
    for dense in config.denses:
        denses.append(_read_dense(folder / dense.folder, dense, size, device))
        size = dense.out_size
    too_large = [cut for cut in config.matryoshka_dimensions if cut > size]
    if too_large:
        raise ConfigError(f"config.json: matryoshka_dimensions has {too_large[0]}, the embedding has {size} numbers")
    score = None
    if has_score and config.classifier is not None:
        score = _read(read_checkpoint(folder), SCORE, (len(config.classifier.labels), hidden_size), device)
    return Pooler(config, hidden_size, denses, score)


def _read_dense(folder: Path, config: DenseConfig, in_size: int, device: torch.device) -> Dense:
    if config.in_size != in_size:
        raise ConfigError(f"{config.folder}/config.json: in_features is {config.in_size}, what it gets has {in_size}")
    entries = read_checkpoint(folder)
    weight = _read(entries, "linear.weight", (config.out_size, config.in_size), device)
    bias = _read(entries, "linear.bias", (config.out_size,), device) if config.has_bias else None
    return Dense(config, weight, bias)


def _read(entries: dict[str, TensorEntry], name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if name not in entries:
        raise ConfigError(f"the pooler's tensor {name!r} is missing")
    if entries[name].shape != shape:
        raise ConfigError(f"the pooler's tensor {name!r} is {list(entries[name].shape)} instead of {list(shape)}")
    return read_tensor(entries[name]).to(device, torch.float32)
