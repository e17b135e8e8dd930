"""A model folder -> an EncoderModel. Weights are safetensors only; code from the checkpoint never runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.errors import ConfigError
from engine.models.encoder import EncoderModel
from engine.models.family import architecture_of
from engine.models.fields import Fields
from engine.models.hf_files import load_config, load_weights
from engine.models.pooling_config import PoolerConfig
from engine.models.weights import Progress

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_encoder(
    folder: Path,
    fields: Fields,
    pooler: PoolerConfig,
    *,
    device: torch.device,
    dtype: str = "auto",
    dummy: bool = False,
    progress: Progress | None = None,
    max_model_len: int | None = None,
    seed: int = 0,
) -> EncoderModel:
    """Load `folder` with transformers. On CPU it computes in fp32; "auto" is the checkpoint's dtype on CUDA.

    Raises ConfigError when transformers has no class for it, or the weights do not fit.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification
    from transformers.utils import logging as transformers_logging

    if device.type == "cpu" and dtype not in ("auto", "float32"):
        raise ConfigError(f"on CPU encoders compute in float32, dtype is {dtype}; use auto or float32")
    transformers_logging.disable_progress_bar()
    auto_class: Any = AutoModel if pooler.classifier is None else AutoModelForSequenceClassification
    config = load_config(folder, fields, auto_class)
    target: torch.dtype | str = torch.float32 if device.type == "cpu" else _DTYPES.get(dtype, "auto")
    if dummy:
        torch.manual_seed(seed)
        own = getattr(config, "dtype", None) or torch.float32
        hf_model = auto_class.from_config(config, dtype=own if isinstance(target, str) else target)
    else:
        has_head = pooler.method == "head"
        hf_model = load_weights(
            folder, config, auto_class, target, can_lack=lambda name: not has_head and name.startswith("pooler.")
        )
    if progress is not None:
        total = sum(parameter.nbytes for parameter in hf_model.parameters())
        progress(total, total)
    return EncoderModel(
        hf_model.to(device).eval().requires_grad_(False),
        is_classifier=pooler.classifier is not None,
        has_head=pooler.method == "head",
        architecture=architecture_of(fields),
        device=device,
        max_model_len=_context(hf_model, pooler.max_seq_length, max_model_len),
    )


def _context(hf_model: Any, max_seq_length: int | None, asked: int | None) -> int:
    """The longest text: what the checkpoint cuts at, or was asked for; never more than there are positions."""
    limit: int | None = getattr(hf_model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in hf_model.named_modules():
        # RoBERTa and its kin count positions from behind the padding's
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    length = asked or max_seq_length or limit
    if length is None:
        raise ConfigError("the model declares no longest text; set --max-model-len")
    if limit is not None and length > limit:
        if asked is None:
            return limit
        raise ConfigError(f"max_model_len is {asked}; the model has positions for {limit} tokens")
    return length
