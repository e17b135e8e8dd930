"""Tiny random checkpoints of every supported family, built with transformers; each case turns its family's features on.

Weights are large (and norms and biases random), so that every feature moves the logits and near-ties are rare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint. `max_shard_size` splits it; `max_model_len` is what Kvasir is told."""

    name: str
    family: str  # transformers' class names without Config and ForCausalLM
    options: dict[str, Any] = field(default_factory=dict)
    config_class: str = ""
    max_shard_size: str = "1GB"
    max_model_len: int | None = None

    def build(self, *, seed: int = 0) -> PreTrainedModel:
        """The model in fp32, in eval mode."""
        config_class = getattr(transformers, self.config_class or f"{self.family}Config")
        config = config_class(**{**SIZES, **self.options})
        torch.manual_seed(seed)
        model = getattr(transformers, f"{self.family}ForCausalLM")._from_config(config, attn_implementation="eager")
        randomize_vectors(model)
        return model.eval()


def randomize_vectors(model: PreTrainedModel) -> None:
    """Noise on norms, biases and sinks, which start as ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))


def save(model: PreTrainedModel, folder: Path, *, max_shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def llama_rope(name: str, max_model_len: int | None = None, **rope: Any) -> Case:
    return Case(
        f"llama_{name}",
        "Llama",
        {"rope_parameters": {"rope_theta": 10_000.0, **rope}},
        max_model_len=max_model_len,
    )


HALF_DIM = 8  # of the heads of 16
LONG_FACTORS = {
    "short_factor": [1.0 + 0.1 * i for i in range(HALF_DIM)],
    "long_factor": [2.0 + 0.7 * i for i in range(HALF_DIM)],
}
# Sequences in the tests have at most 90 tokens; dynamic and longrope must be decided as transformers decides there.
CASES = [
    Case("llama", "Llama", {"attention_bias": True, "mlp_bias": True}, max_shard_size="50KB"),
    Case("llama_tied_head_dim", "Llama", {"tie_word_embeddings": True, "head_dim": 24, "num_key_value_heads": 1}),
    llama_rope("linear", rope_type="linear", factor=4.0),
    llama_rope("dynamic", rope_type="dynamic", factor=4.0),
    llama_rope(
        "llama3",
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    llama_rope("yarn", rope_type="yarn", factor=4.0, original_max_position_embeddings=64),
    llama_rope("longrope_long", rope_type="longrope", original_max_position_embeddings=16, **LONG_FACTORS),
    llama_rope(
        "longrope_short", 128, rope_type="longrope", original_max_position_embeddings=128, factor=2.0, **LONG_FACTORS
    ),
    Case("mistral", "Mistral", {"sliding_window": 9}),
    Case("qwen2", "Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    Case("qwen3", "Qwen3", {"head_dim": 16, "attention_bias": True}),
    Case("phi3", "Phi3", {"sliding_window": 11, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    Case(
        "phi3_longrope",
        "Phi3",
        {"original_max_position_embeddings": 16, "rope_parameters": {"rope_type": "longrope", **LONG_FACTORS}},
    ),
    Case(
        "gemma2",
        "Gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    Case(
        "gemma3",
        "Gemma3",
        {
            "head_dim": 16,
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
        config_class="Gemma3TextConfig",
    ),
    Case("smollm3", "SmolLM3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    Case("olmo2", "Olmo2"),
    Case(
        "granite",
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    Case("mixtral", "Mixtral", {"num_local_experts": 5, "sliding_window": 9}),
    Case(
        "qwen2_moe",
        "Qwen2Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 4,
        },
    ),
    Case(
        "qwen3_moe",
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        max_shard_size="100KB",
    ),
    Case("olmoe", "Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 2.0}),
]
