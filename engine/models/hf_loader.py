"""A model folder -> the transformers adapter. Weights are safetensors only; code from the checkpoint never runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.models.fields import Fields
from engine.models.generation_config import load_generation_config
from engine.models.hf_adapter import ATTENTION, TransformersModel, attend
from engine.models.hf_files import load_config, load_weights
from engine.models.weights import Progress


def load_adapter(
    folder: Path,
    fields: Fields,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    dummy: bool,
    progress: Progress | None,
    max_model_len: int | None,
    seed: int,
) -> TransformersModel:
    """Load `folder` with transformers. On CPU it computes in fp32; dtype None is the checkpoint's on CUDA.

    Raises ConfigError when transformers has no class for it or its attention cannot be replaced.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if device.type == "cpu" and dtype not in (None, torch.float32):
        raise ConfigError(f"on CPU the transformers adapter computes in float32, dtype is {dtype}; use auto or float32")
    AttentionInterface.register(ATTENTION, attend)
    transformers_logging.disable_progress_bar()
    config = load_config(folder, fields, AutoModelForCausalLM)
    architecture = ", ".join(fields.texts("architectures")) or type(config).__name__
    length = _context(config, max_model_len)
    target: torch.dtype | str = torch.float32 if device.type == "cpu" else dtype or "auto"
    if dummy:
        hf_model = _dummy(config, target, seed)
    else:
        hf_model = load_weights(folder, config, AutoModelForCausalLM, target, attn_implementation="eager")
    if progress is not None:
        total = sum(parameter.nbytes for parameter in hf_model.parameters())
        progress(total, total)
    return TransformersModel(
        hf_model.to(device).eval().requires_grad_(False),
        architecture=architecture,
        device=device,
        max_model_len=length,
        generation=load_generation_config(folder, fields.integers("eos_token_id")),
    )


def _context(config: Any, max_model_len: int | None) -> int:
    """The served length. RoPE that transformers re-decides as a sequence grows is held below that point."""
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    if getattr(text, "attention_chunk_size", None):
        limit = min(limit or text.attention_chunk_size, text.attention_chunk_size)
    rope = getattr(text, "rope_parameters", None) or {}
    for section in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if section.get("rope_type") == "longrope":
            limit = min(limit, section["original_max_position_embeddings"])
    length = max_model_len or limit
    if length is None:
        raise ConfigError("the model declares no longest context; set --max-model-len")
    if limit is not None and length > limit:
        raise ConfigError(f"max_model_len is {length}; through the adapter this model serves at most {limit}")
    return length


def _dummy(config: Any, dtype: torch.dtype | str, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    dtype = getattr(config, "dtype", None) or torch.bfloat16 if isinstance(dtype, str) else dtype
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager", trust_remote_code=False)
