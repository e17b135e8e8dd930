"""Models with random weights made on the device, and engine cores around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loadtest.gpu.record import Run

if TYPE_CHECKING:
    from engine.core import EngineCore
    from engine.models.decoder import Decoder
    from engine.types import EngineRequest

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 128001,
    "bos_token_id": 128000,
}
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_TINY_MOE = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}


def shape_of(run: Run, shape: dict[str, Any], num_layers: int | None = None) -> dict[str, Any]:
    """A config.json; num_layers: fewer than the model has, each as large as its."""
    config = dict(shape)
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    if run.tiny:
        config.update(_TINY)
        if "num_experts" in shape:
            config.update(_TINY_MOE)
    return config


class DeviceWeights:
    """A WeightSource of random matrices that are made where they stay."""

    def __init__(self, config: Any, device: torch.device) -> None:
        from engine.models.layout import checkpoint_layout

        self.dtype = torch.bfloat16
        self._layout = checkpoint_layout(config)
        self._device = device

    def has(self, name: str) -> bool:
        return name in self._layout

    def take(self, name: str) -> Tensor:
        """Norms are one, biases zero, matrices uniform with variance 1 / columns: activations keep their size."""
        shape = self._layout[name].shape
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("_bias") else 1.0, dtype=self.dtype, device=self._device)
        bound = (3.0 / shape[1]) ** 0.5
        return torch.empty(shape, dtype=self.dtype, device=self._device).uniform_(-bound, bound)


def build_model(run: Run, shape: dict[str, Any], max_model_len: int) -> Decoder:
    """The decoder of a config.json."""
    from engine.models.decoder import build_decoder
    from engine.models.fields import Fields
    from engine.models.generation_config import GenerationDefaults
    from engine.models.hf_config import parse_config

    config = parse_config(Fields(shape, "config.json"))
    return build_decoder(
        config,
        DeviceWeights(config, run.device),
        linear_mode="auto",
        device=run.device,
        max_model_len=max_model_len,
        generation=GenerationDefaults(eos_token_ids=config.eos_token_ids),
    )


def build_core(
    run: Run, model: Decoder, *, max_model_len: int, rows: int, pool_tokens: int, **options: Any
) -> EngineCore:
    """A scheduler, cache and runner around a model that may serve several cores, one at a time."""
    from engine.config_load import load
    from engine.launch import wire

    settings: dict[str, Any] = {
        "model": "random",
        "max_model_len": max_model_len,
        "block_size": 16,
        "num_blocks": pool_tokens // 16 + 2,
        "max_num_seqs": rows,
        "max_num_batched_tokens": run.size(8192, 64) + rows,
        "max_waiting_requests": 100_000,
        "max_waiting_pools": 1e6,
        "max_queue_wait_s": 1e6,
        "max_request_s": 1e6,
        "enable_prefix_cache": False,
        "cuda_graphs": "off",
        "overlap": "off",
        **options,
    }
    core, _ = wire(model, load(settings), run.device)
    return core


def requests(
    name: str, count: int, prompt_tokens: int, output_tokens: int, vocab: int, **fields: Any
) -> list[EngineRequest]:
    """Greedy, without an end of their own; the same prompts whatever the name."""
    from engine.types import EngineRequest, SamplingParams

    generator = torch.Generator().manual_seed(prompt_tokens)
    prompts = torch.randint(10, vocab, (count, prompt_tokens), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    return [
        EngineRequest(request_id=f"{name}-{i}", prompt_token_ids=prompt, sampling=sampling, **fields)
        for i, prompt in enumerate(prompts)
    ]


def to_decoding(core: EngineCore, max_steps: int) -> int:
    """Runs steps until nobody waits, or nobody more comes in, and all that run have their prompt behind them. Returns
    how many run. Raises RuntimeError when that takes more steps.
    """
    roster = core.scheduler.roster
    running, unchanged = 0, 0
    for _ in range(max_steps):
        core.advance()
        unchanged = unchanged + 1 if len(roster.running) == running else 0
        running = len(roster.running)
        prompts_done = all(one.num_remaining_tokens <= 2 for one in roster.running)
        if prompts_done and (not roster.num_waiting or unchanged >= 4):
            return running
    raise RuntimeError(f"after {max_steps} steps {running} requests run and {roster.num_waiting} wait")


def finish(core: EngineCore) -> None:
    """Ends all requests."""
    for request_id in list(core.scheduler.roster.families):
        core.abort(request_id)
    while core.has_work:
        core.advance()
