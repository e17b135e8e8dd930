"""What dense_families and moe_families share: the Llama-shaped base and the patterns of windows. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import ConfigError
from engine.models.config import Activation, DecoderConfig, LayerConfig, RopeConfig
from engine.models.fields import Fields
from engine.models.rope_config import parse_rope

Family = Callable[[Fields], DecoderConfig]  # config.json -> DecoderConfig of one architecture

MAX_LAYERS = 1024
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def architecture_of(fields: Fields) -> str:
    """First entry of `architectures`. Raises ConfigError when there is none."""
    names = fields.texts("architectures")
    if not names:
        raise ConfigError(f"{fields.where}: architectures is missing or empty, so the model class is unknown")
    return names[0]


def base(
    fields: Fields,
    *,
    head_dim: int | None = None,
    eps: float = 1e-6,
    theta: float = 10_000.0,
    tied: bool = False,
    window: int = 0,
    activation: str | None = None,
    rope_names: dict[str, str] | None = None,
    **differences: Any,
) -> DecoderConfig:
    """A Llama-shaped config with `differences`; `window` is that of every layer, `head_dim` the family's default."""
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads", high=65536)
    head_dim = fields.integer("head_dim", head_dim or max(1, hidden_size // num_heads), high=65536)
    num_layers = layer_count(fields)
    values: dict[str, Any] = {
        "architecture": architecture_of(fields),
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": fields.integer("num_key_value_heads", num_heads, high=65536),
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
        "activation": _activation(fields, activation or fields.text("hidden_act", "silu")),
        "norm_eps": fields.number("rms_norm_eps", eps, high=1.0),
        "tied_embeddings": fields.flag("tie_word_embeddings", tied),
        "layers": tuple(LayerConfig(window=window) for _ in range(num_layers)),
        "dtype": fields.text("dtype", fields.text("torch_dtype", "")) or None,
        "eos_token_ids": fields.integers("eos_token_id"),
    }
    if "ropes" not in differences:
        differences["ropes"] = (parse_rope(fields, head_dim, theta=theta, other_names=rope_names),)
    config = DecoderConfig(max_positions=_max_positions(fields, differences["ropes"]), **values | differences)
    if len(config.layers) != num_layers:
        raise ConfigError(
            f"{fields.where}: {len(config.layers)} layers are described, num_hidden_layers is {num_layers}"
        )
    return config


def layer_count(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", high=MAX_LAYERS)


def _activation(fields: Fields, name: str) -> Activation:
    if name not in _ACTIVATIONS:
        raise ConfigError(f"{fields.where}: activation {name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _max_positions(fields: Fields, ropes: Sequence[RopeConfig]) -> int:
    """YaRN checkpoints may declare the length of pre-training; they are made for `factor` times that."""
    stretched = (int(r.original_max_positions * (r.factor or 1.0)) for r in ropes if r.kind == "yarn")
    return max(fields.integer("max_position_embeddings"), *stretched, 0)


def window_of(fields: Fields, default: int = 0) -> int:
    """`sliding_window`; an explicit null is none, an absent key the family's default."""
    if "sliding_window" in fields.raw and fields.raw["sliding_window"] is None:
        return 0
    return fields.integer("sliding_window", default, low=0)


def sliding_layers(fields: Fields, pattern: Callable[[int], bool]) -> list[bool]:
    """Which layers have a sliding window: `layer_types` where the file has it, else `pattern(layer)`."""
    names = fields.texts("layer_types")
    if not names:
        return [pattern(layer) for layer in range(layer_count(fields))]
    for name in names:
        if name not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"{fields.where}: layer type {name!r} is not supported")
    return [name == "sliding_attention" for name in names]


def windowed_layers(fields: Fields, window: int, pattern: Callable[[int], bool]) -> tuple[LayerConfig, ...]:
    return tuple(LayerConfig(window=window if slides else 0) for slides in sliding_layers(fields, pattern))
