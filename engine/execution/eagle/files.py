"""A drafting head on disk: weights in safetensors, its shape and the model it belongs to in JSON beside them.

Nothing is ever unpickled. A head is useless for any other weights than those it was trained on, so the file carries
their digest and is refused for others.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import ConfigError
from engine.models.config import DecoderConfig, LayerConfig, RopeConfig

CONFIG_FILE, WEIGHTS_FILE = "eagle.json", "eagle.safetensors"
VERSION = 1
MAX_POSITIONS = 4096  # of a head's own context, which begins where it has first seen a hidden state
ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Sizes of the layer; by default those of one layer of the target."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = ROPE_THETA
    max_positions: int = MAX_POSITIONS

    @staticmethod
    def like(target: DecoderConfig) -> HeadShape:
        """The shape of a layer of the target; a mixture of experts gives the size of one expert."""
        return HeadShape(
            hidden_size=target.hidden_size,
            intermediate_size=target.intermediate_size,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            activation=target.activation,
            norm_eps=target.norm_eps,
            max_positions=min(MAX_POSITIONS, target.max_positions),
        )

    @property
    def rope(self) -> RopeConfig:
        return RopeConfig(theta=self.rope_theta, rot_dim=self.head_dim, max_positions=self.max_positions)

    def decoder(self, num_rows: int) -> DecoderConfig:
        """As a decoder of one layer, whose table of embeddings has so many rows."""
        return DecoderConfig(
            architecture="EagleHead",
            vocab_size=num_rows,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_positions=self.max_positions,
            layers=(LayerConfig(),),
            ropes=(self.rope,),
            activation=self.activation,  # type: ignore[arg-type]
            norm_eps=self.norm_eps,
            attention_scale=self.head_dim**-0.5,
        )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight."""
        width, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "fc.weight": (width, 2 * width),
            "attention_norm.weight": (width,),
            "qkv.weight": (q + 2 * kv, width),
            "o.weight": (width, q),
            "mlp_norm.weight": (width,),
            "gate_up.weight": (2 * inner, width),
            "down.weight": (width, inner),
            "norm.weight": (width,),
        }


@dataclass(frozen=True)
class Head:
    """
    target      digest of the model's folder, see engine.compression.artefacts.model_digest
    weights     by the names of HeadShape.tensors
    acceptance  share of right guesses at depth 1, 2, ... of those where all before were right, for people
    """

    target: str
    shape: HeadShape
    weights: dict[str, Tensor]
    acceptance: tuple[float, ...] = ()
    training: dict[str, float] = field(default_factory=dict)  # what it took, for people


def write(head: Head, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Creates the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "version": VERSION,
        "target": head.target,
        "shape": asdict(head.shape),
        "acceptance": [round(rate, 4) for rate in head.acceptance],
        "training": head.training,
    }
    weights = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in head.weights.items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).chmod(0o644)  # the writer leaves it private
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(folder: Path, target: str | None = None) -> Head:
    """target: the digest that the head must be for; None: any. Raises ConfigError that says what to do."""
    path = folder / CONFIG_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ConfigError(f"{path} has version {content['version']!r}, this server reads {VERSION}: train it again")
        head = Head(
            target=str(content["target"]),
            shape=_shape(content["shape"]),
            weights={},
            acceptance=tuple(float(rate) for rate in content["acceptance"]),
            training=dict(content["training"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no file of `kvasir train-drafter`: {type(error).__name__}: {error}") from error
    if target is not None and head.target != target:
        raise ConfigError(f"{path} is for other weights than the model's: run `kvasir train-drafter` for this model")
    try:
        head.weights.update(load_file(folder / WEIGHTS_FILE))
    except Exception as error:
        raise ConfigError(f"{folder / WEIGHTS_FILE} cannot be read: {error}; train the head again") from error
    found = {name: tuple(weight.shape) for name, weight in head.weights.items()}
    if found != head.shape.tensors():
        wrong = sorted(set(found.items()) ^ set(head.shape.tensors().items()))[0][0]
        raise ConfigError(f"{folder / WEIGHTS_FILE} does not fit {path.name}, first {wrong!r}; train the head again")
    return head


def _shape(content: dict[str, Any]) -> HeadShape:
    """Raises ValueError for a number that no head has, so that nothing absurd is allocated."""
    shape = HeadShape(**content)
    for name in (entry.name for entry in fields(HeadShape) if entry.type == "int"):
        value = getattr(shape, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
            raise ValueError(f"{name} is {value!r}")
    if shape.activation not in ("silu", "gelu", "gelu_tanh") or shape.head_dim % 2 or shape.rope_theta <= 1.0:
        raise ValueError(f"shape is {content}")
    return shape
