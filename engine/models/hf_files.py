"""What every model that runs through transformers is read with: its configuration and its weights, from a folder.

Weights are safetensors only, and code that a checkpoint brings never runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.models.fields import Fields
from engine.models.safetensors_file import read_checkpoint

# Read when transformers is imported: without it our package `kernels` would be taken for the one of the hub.
os.environ["USE_HUB_KERNELS"] = "0"


def load_config(folder: Path, fields: Fields, auto_class: Any) -> Any:
    """The transformers configuration of a model that `auto_class` can build. Raises ConfigError."""
    from transformers import AutoConfig

    kind = fields.text("model_type", "")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        remote = " (the checkpoint brings its own code, which is never run)" if "auto_map" in fields else ""
        raise ConfigError(f"transformers cannot load model type {kind!r}{remote}: {error}") from None
    if config.is_encoder_decoder:
        raise ConfigError(f"{kind} is an encoder-decoder model, which is not supported")
    if type(config) not in auto_class._model_mapping:
        raise ConfigError(f"transformers has no {auto_class.__name__} for {kind!r}")
    if "quantization_config" in fields:
        raise ConfigError("the checkpoint is quantized, which is not supported; use its float16 or bfloat16 version")
    return config


def load_weights(
    folder: Path,
    config: Any,
    auto_class: Any,
    dtype: torch.dtype | str,
    *,
    can_lack: Callable[[str], bool] = lambda name: False,
    **options: Any,
) -> Any:
    """The model with its weights. Raises ConfigError for damaged, missing or misshapen ones.

    can_lack  of a tensor's name: whether the model is complete without it
    options   passed on to `from_pretrained`
    """
    read_checkpoint(folder)  # refuses damaged files and pickles in our words
    try:
        hf_model, info = auto_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(f"transformers cannot load the weights: {error}") from None
    missing = sorted(name for name in info["missing_keys"] if not can_lack(name))
    if missing:
        raise ConfigError(f"the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    if info["mismatched_keys"]:
        raise ConfigError(f"{len(info['mismatched_keys'])} tensors have another shape than config.json says")
    return hf_model
