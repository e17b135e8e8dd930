"""A model folder -> the transformers adapter. Weights are safetensors only; code from the checkpoint never runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.models.fields import Fields
from engine.models.generation_config import load_generation_config
from engine.models.hf_adapter import ATTENTION, TransformersModel, attend
from engine.models.safetensors_file import read_checkpoint
from engine.models.weights import Progress

# Read when transformers is imported: without it our package `kernels` would be taken for the one of the hub.
os.environ["USE_HUB_KERNELS"] = "0"


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
    from transformers import AttentionInterface
    from transformers.utils import logging as transformers_logging

    if device.type == "cpu" and dtype not in (None, torch.float32):
        raise ConfigError(f"on CPU the transformers adapter computes in float32, dtype is {dtype}; use auto or float32")
    AttentionInterface.register(ATTENTION, attend)
    transformers_logging.disable_progress_bar()
    config = _load_config(folder, fields)
    architecture = ", ".join(fields.texts("architectures")) or type(config).__name__
    length = _context(config, max_model_len)
    target: torch.dtype | str = torch.float32 if device.type == "cpu" else dtype or "auto"
    hf_model = _dummy(config, target, seed) if dummy else _read(folder, config, target)
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


def _load_config(folder: Path, fields: Fields) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = fields.text("model_type", "")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        remote = " (the checkpoint brings its own code, which is never run)" if "auto_map" in fields else ""
        raise ConfigError(f"transformers cannot load model type {kind!r}{remote}: {error}") from None
    if config.is_encoder_decoder:
        raise ConfigError(f"{kind} is an encoder-decoder model, only decoder-only models can be served")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"transformers has no causal language model for {kind!r}")
    if "quantization_config" in fields:
        raise ConfigError("the checkpoint is quantized, which is not supported; use its float16 or bfloat16 version")
    return config


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


def _read(folder: Path, config: Any, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForCausalLM

    auto_class: Any = AutoModelForCausalLM
    read_checkpoint(folder)  # refuses damaged files and pickles in our words
    try:
        hf_model, info = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(f"transformers cannot load the weights: {error}") from None
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise ConfigError(f"the checkpoint lacks {len(names)} tensors: {', '.join(names[:5])}")
    return hf_model


def _dummy(config: Any, dtype: torch.dtype | str, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    dtype = getattr(config, "dtype", None) or torch.bfloat16 if isinstance(dtype, str) else dtype
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager", trust_remote_code=False)
