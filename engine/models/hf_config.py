"""A Hugging Face config.json -> DecoderConfig. Torch-free."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ConfigError
from engine.models import dense_families, moe_families
from engine.models.config import DecoderConfig
from engine.models.family import Family, architecture_of
from engine.models.fields import Fields, read_json

_FAMILIES: dict[str, Family] = {**dense_families.FAMILIES, **moe_families.FAMILIES}


def load_config(folder: Path) -> DecoderConfig:
    """Reads `config.json` of a model folder. Raises ConfigError when it is broken or not one of `architectures()`."""
    return parse_config(read_json(folder, "config.json"))


def parse_config(fields: Fields) -> DecoderConfig:
    """The decoder that a config.json describes. Raises ConfigError naming what is unsupported and what is known."""
    if "quantization_config" in fields:
        method = fields.section("quantization_config").text("quant_method", "unknown")
        raise ConfigError(
            f"the checkpoint is quantized ({method}), which is not supported; use its float16 or bfloat16 version"
        )
    architecture = architecture_of(fields)
    if architecture not in _FAMILIES:
        raise ConfigError(
            f"architecture {architecture!r} has no native decoder; known: {', '.join(architectures())}. "
            "Other causal language models may run with --load-adapter transformers"
        )
    config = _FAMILIES[architecture](fields)
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"num_attention_heads {config.num_heads} is not a multiple of num_key_value_heads {config.num_kv_heads}"
        )
    return config


def architectures() -> list[str]:
    """Names of the architectures that the native decoder runs."""
    return sorted(_FAMILIES)
