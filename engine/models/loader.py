"""A model folder -> a Model: which implementation, in which precision, on which device."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from engine.errors import ConfigError
from engine.models.batch import Model
from engine.models.config import DecoderConfig
from engine.models.decoder import build_decoder
from engine.models.family import architecture_of
from engine.models.fields import Fields, read_json
from engine.models.generation_config import load_generation_config
from engine.models.hf_config import architectures, parse_config
from engine.models.pooling_config import causal_architecture, has_language_head, pooler_tensors
from engine.models.weights import CheckpointWeights, DummyWeights, Progress, WeightSource
from kernels import backend
from kernels.linear import BF16, QUANTIZED, bf16_instructions, quantized_instructions

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    quantization: str = "none",
    deterministic: bool = False,
    load_format: str = "safetensors",
    kind: str = "auto",
    progress: Progress | None = None,
    max_model_len: int | None = None,
    seed: int = 0,
) -> Model:
    """Load the model in folder `path`.

    dtype: "auto", "float32", "bfloat16" or "float16". On CPU hidden states are always fp32 and "auto" keeps 16-bit
    checkpoints at 16 bits; "bfloat16" also rounds what enters a product (mode "bf16" of kernels.linear). On CUDA it is
    the dtype of weights and hidden states, "auto" that of the checkpoint.
    quantization: "none", "int8" or "int4": how matrices are rounded while loading, on CPU (kernels.linear.quantized).
    deterministic: a row's result does not depend on the other rows. load_format: "safetensors", or "dummy" for random
    weights from `seed` (only config.json is read). kind: "native", "transformers", or "auto" for native where we know
    the architecture. progress(bytes done, bytes in all) is called while reading. max_model_len: longest sequence that
    will be served; default: what the checkpoint declares.
    Raises ConfigError for anything that cannot be honoured.
    """
    folder, device = Path(path), torch.device(device)
    for name, value, known in (
        ("dtype", dtype, ("auto", *_DTYPES)),
        ("quantization", quantization, ("none", *QUANTIZED)),
        ("load_format", load_format, ("safetensors", "dummy")),
        ("kind", kind, ("auto", "native", "transformers")),
    ):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}, known are {', '.join(known)}")
    if not folder.is_dir():
        raise ConfigError(f"model folder {folder.name!r} does not exist")
    if quantization != "none" and device.type != "cpu":
        raise ConfigError(
            f"quantization is {quantization!r}, which runs on CPU only, and the model runs on {device}; leave it out"
        )
    fields = read_json(folder, "config.json")
    causal = causal_architecture(fields)
    if kind == "native" or (kind == "auto" and causal in architectures()):
        config = parse_config(Fields({**fields.raw, "architectures": [causal]}, fields.where))
        config = dataclasses.replace(config, architecture=architecture_of(fields))
        if not has_language_head(fields):
            config = dataclasses.replace(config, tied_embeddings=True)  # a head is never asked for: it costs nothing
        if quantization != "none":
            logger.info("weights become %s as they are read; products use %s", quantization, quantized_instructions())
        weights: WeightSource
        if load_format == "dummy":
            own = _DTYPES.get(config.dtype or "", torch.bfloat16)
            weights = DummyWeights(config, _DTYPES.get(dtype, own), seed, progress)
        else:
            weights = CheckpointWeights(folder, config, _DTYPES.get(dtype), progress, without=pooler_tensors(fields))
        return build_decoder(
            config,
            weights,
            linear_mode=_linear_mode(dtype, weights.dtype, device, deterministic),
            quantization=None if quantization == "none" else quantization,
            device=device,
            max_model_len=_context(config, max_model_len),
            generation=load_generation_config(folder, config.eos_token_ids),
        )
    from engine.models.hf_loader import load_adapter  # loads transformers, which takes seconds

    if quantization != "none":
        raise ConfigError(f"quantization is {quantization!r}, but the transformers adapter has none; leave it out")
    if deterministic:
        raise ConfigError("deterministic mode needs a native decoder; the transformers adapter cannot promise it")
    logger.info("%s runs through the transformers adapter", architecture_of(fields))
    return load_adapter(
        folder,
        fields,
        device=device,
        dtype=_DTYPES.get(dtype),
        dummy=load_format == "dummy",
        progress=progress,
        max_model_len=max_model_len,
        seed=seed,
    )


def _linear_mode(asked: str, dtype: torch.dtype, device: torch.device, deterministic: bool) -> str:
    if deterministic and device.type == "cpu" and backend.select("paged_attention", device) != "cpp":
        raise ConfigError("deterministic mode on CPU needs the native kernels, which are off; is g++ installed?")
    if asked == "bfloat16" and device.type == "cpu":
        logger.info("products take activations rounded to bfloat16 and use %s", bf16_instructions())
        return BF16  # batch-invariant on the native kernels
    if deterministic:
        return "deterministic"
    return "fp32" if dtype == torch.float32 else "auto"


def _context(config: DecoderConfig, max_model_len: int | None) -> int:
    if max_model_len is None:
        return config.max_positions
    limit = max(config.position_limit, config.max_positions)
    if not 1 <= max_model_len <= limit:
        raise ConfigError(f"max_model_len is {max_model_len}, the checkpoint's position embedding ends at {limit}")
    return max_model_len
