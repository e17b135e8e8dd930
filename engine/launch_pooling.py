"""The part of `engine.launch` for models that pool: what follows a decoder's hidden states, and whole encoders.

Importing it is cheap; torch and transformers load inside the functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import Config
from engine.errors import ConfigError
from engine.types import ModelInfo

if TYPE_CHECKING:
    import torch

    from engine.core import EngineCore
    from engine.models.encoder import EncoderModel
    from engine.models.pooling import Pooler


HIDDEN_SIZE_NAMES = ("hidden_size", "n_embd", "d_model")


def is_encoder(path: Path) -> bool:
    """Whether the model in a folder reads whole texts and generates none."""
    from engine.models import pooling_config
    from engine.models.fields import read_json

    return pooling_config.is_encoder(read_json(path, "config.json"))


def decoder_pooler(path: Path, config: Config, device: torch.device) -> Pooler | None:
    """What follows the hidden states of a decoder, when its checkpoint or the operator says so. Raises ConfigError."""
    from engine.models.fields import read_json
    from engine.models.pooling import build_pooler
    from engine.models.pooling_config import has_language_head, read_pooler

    fields = read_json(path, "config.json")
    found = read_pooler(path, fields, config.model.pooling, matryoshka=config.model.matryoshka)
    if found is None:
        if not has_language_head(fields):
            raise ConfigError("pooling is 'none', but the checkpoint has no language head to generate with; use auto")
        return None
    text = fields.section("text_config") if "text_config" in fields else fields
    name = next((name for name in HIDDEN_SIZE_NAMES if name in text), HIDDEN_SIZE_NAMES[0])
    return build_pooler(path, found, text.integer(name), device, has_score=True)


def build_encoder(
    path: Path, config: Config, device: torch.device, report: Callable[[int, int], None]
) -> tuple[EngineCore, ModelInfo]:
    """A model that reads whole texts through transformers. Raises ConfigError."""
    from engine.models.encoder_loader import load_encoder
    from engine.models.fields import read_json
    from engine.models.pooling import build_pooler
    from engine.models.pooling_config import read_pooler, resolved

    if config.model.quantization != "none":
        raise ConfigError(f"quantization is {config.model.quantization!r}, which encoders do not have; leave it out")
    fields = read_json(path, "config.json")
    found = read_pooler(path, fields, config.model.pooling, matryoshka=config.model.matryoshka)
    if found is None:
        raise ConfigError("pooling is 'none', but the model is an encoder and generates no text; use auto")
    model = load_encoder(
        path,
        fields,
        found,
        device=device,
        dtype=config.model.dtype,
        dummy=config.runtime.load_format == "dummy",
        progress=report,
        max_model_len=config.model.max_model_len,
        seed=config.runtime.seed,
    )
    pooler = build_pooler(path, resolved(found, model.is_causal), model.hidden_size, device, has_score=False)
    return wire_encoder(model, pooler, config)


def wire_encoder(model: EncoderModel, pooler: Pooler, config: Config) -> tuple[EngineCore, ModelInfo]:
    """Puts an encoder under the scheduler. Its cache blocks are numbers without memory: enough for every row."""
    from engine.core import EngineCore
    from engine.execution.encoder_runner import EncoderRunner
    from engine.scheduling.scheduler import Scheduler

    block_size = config.cache.block_size
    num_blocks = config.scheduler.max_num_seqs * -(-model.max_model_len // block_size) + 1
    num_batched = max(config.scheduler.max_num_batched_tokens, model.max_model_len)
    scheduler = Scheduler(
        dataclasses.replace(config.scheduler, max_num_batched_tokens=num_batched),
        dataclasses.replace(config.cache, enable_prefix_cache=False),
        num_blocks=num_blocks,
        max_model_len=model.max_model_len,
        model_name=config.model.model,
        whole_prompts=True,
    )
    info = ModelInfo(
        architecture=model.architecture,
        dtype=model.dtype_name,
        device=str(model.device),
        vocab_size=model.vocab_size,
        logits_size=model.vocab_size,
        max_model_len=model.max_model_len,
        num_layers=model.num_layers,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=0,
        weight_bytes=model.weight_bytes,
        eos_token_ids=[],
        can_generate=False,
        pooling=pooler.info,
    )
    return EngineCore(scheduler, EncoderRunner(model, pooler, runs_alone=config.runtime.deterministic)), info
