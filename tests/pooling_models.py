"""Tiny random checkpoints that embed and classify, with tokenizers, and an engine around them without a process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedModel

from engine.config import CacheConfig, Config, Limits, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.core import EngineCore
from engine.faults import Faults
from engine.launch import build_core
from engine.prompts import PromptEncoder
from engine.submission import context_limit
from engine.submission_pooling import build_pooling, require_pooling
from engine.text.tokenizer import Tokenizer
from engine.types import (
    EngineRequest,
    ModelInfo,
    PooledOutput,
    PoolingParams,
    PoolingRequest,
    SamplingParams,
    TokenOutput,
)
from tests.fakes_engine import FakeEngine
from tests.models.families import SIZES, randomize_vectors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(124))]
ENCODER_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
DECODER_SIZES = {**SIZES, "pad_token_id": 0}


def sentence(seed: int, length: int) -> str:
    """Random words of the vocabulary."""
    return " ".join(f"w{i}" for i in np.random.RandomState(seed).randint(0, 124, length))


def build(class_name: str, folder: Path, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Saves a random model of a transformers class, with a tokenizer, and returns it in eval mode."""
    model_class = getattr(transformers, class_name)
    sizes = ENCODER_SIZES if class_name.startswith(("Bert", "Roberta", "XLM", "Modern")) else DECODER_SIZES
    if class_name.startswith("Modern"):
        sizes = {**sizes, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    torch.manual_seed(seed)
    model = model_class._from_config(model_class.config_class(**{**sizes, **options}))
    randomize_vectors(model)
    model.eval().save_pretrained(folder)
    raw_tokenizer(is_encoder=sizes is not DECODER_SIZES).save(str(folder / "tokenizer.json"))
    return model


def raw_tokenizer(*, is_encoder: bool = True) -> RawTokenizer:
    """One word is one token; encoders surround texts as BERT does, decoders end them with [SEP]."""
    tokenizer = RawTokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    if is_encoder:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 3)]
        )
    return tokenizer


def sentence_transformers(folder: Path, mode: str, *, dense: int | None = None, normalize: bool = True) -> torch.Tensor:
    """Adds the modules of sentence-transformers. Returns the dense weight [dense, 32] (its bias is 0.1 everywhere)."""
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalize else [])]
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Dense": "2_Dense", "Normalize": f"{len(kinds) - 1}_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": paths[kind], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "weightedmean_tokens")}
    pooling = {"word_embedding_dimension": 32, **flags, "pooling_mode_lasttoken": mode == "lasttoken"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    weight = torch.randn(dense or 1, 32, generator=torch.Generator().manual_seed(5))
    if dense:
        (folder / "2_Dense").mkdir(exist_ok=True)
        tensors = {"linear.weight": weight, "linear.bias": torch.full((dense,), 0.1)}
        save_file(tensors, folder / "2_Dense" / "model.safetensors")
        description = {
            "in_features": 32,
            "out_features": dense,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        (folder / "2_Dense" / "config.json").write_text(json.dumps(description))
    return weight


def config_of(
    folder: Path, *, budget: int = 16, num_blocks: int = 256, deterministic: bool = False, prefix_cache: bool = True,
    **model: Any,
) -> Config:  # fmt: skip
    return Config(
        model=ModelConfig(model=str(folder), **model),
        cache=CacheConfig(block_size=8, num_blocks=num_blocks, enable_prefix_cache=prefix_cache),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget),
        runtime=RuntimeConfig(threads=1, deterministic=deterministic),
    )


def core_of(folder: Path, **options: Any) -> tuple[EngineCore, ModelInfo]:
    return build_core(config_of(folder, **options))


def pooling_request(request_id: str, token_ids: list[int], **params: Any) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling=SamplingParams(max_tokens=1),
        pooling=PoolingParams(**params),
    )


def run(core: EngineCore, requests: list[EngineRequest], *, stagger: int = 0) -> dict[str, list[TokenOutput]]:
    """All outputs by request; with `stagger`, requests arrive that many steps apart."""
    outputs: dict[str, list[TokenOutput]] = {request.request_id: [] for request in requests}
    waiting = list(requests)
    steps = 0
    while waiting or core.has_work:
        while waiting and (not stagger or steps % stagger == 0):
            core.add(waiting.pop(0))
            if stagger:
                break
        for output in core.step():
            outputs[output.request_id].append(output)
        steps += 1
        assert steps < 10_000, "the core makes no progress"
    return outputs


def vector(outputs: list[TokenOutput]) -> np.ndarray:
    """The pooled result; the request must have ended once, with it."""
    assert [output.finish_reason for output in outputs] == ["stop"], outputs
    assert outputs[0].pooled is not None
    return np.frombuffer(outputs[0].pooled, "<f4").reshape(outputs[0].pooled_shape)


class LocalEngine(FakeEngine):
    """The real tokenizer, checks, scheduler and model; only the process and its socket are missing."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.core, info = core_of(folder, **options)
        super().__init__(pooling=info.pooling)
        self._info = info
        self._encoder = PromptEncoder(Tokenizer.from_folder(folder), Limits(), Faults({}))
        self._serial = 0
        self._done: dict[str, TokenOutput] = {}

    async def pool(self, request: PoolingRequest) -> PooledOutput:
        params = require_pooling(request, self._info)
        ids, num_first = await self._encoder.encode_pooling(request, max_tokens=context_limit(self._info))
        self._serial += 1
        name = f"local-{self._serial}"
        params = msgspec.structs.replace(params, num_first_tokens=num_first)
        self.core.add(build_pooling(request, name, ids, params, self._info))
        await asyncio.sleep(0)  # others join the batch
        while name not in self._done:
            self._done |= {output.request_id: output for output in self.core.step()}
        output = self._done.pop(name)
        assert output.pooled is not None
        return PooledOutput(
            data=output.pooled,
            shape=output.pooled_shape,
            num_prompt_tokens=len(ids),
            num_cached_tokens=output.num_cached_tokens or 0,
        )
