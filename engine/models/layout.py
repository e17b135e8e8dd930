"""Where each weight of our decoder comes from: our name -> checkpoint tensors, stacked along their first dimension.

The only file that knows the names inside Hugging Face checkpoints. Torch-free. Shapes are [rows, columns] as stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.models.config import DecoderConfig, MoEConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """One weight: checkpoint tensors (name, shape) on top of each other. They agree in all dimensions but the first."""

    parts: tuple[tuple[str, Shape], ...]

    @property
    def shape(self) -> Shape:
        first = self.parts[0][1]
        return (sum(shape[0] for _, shape in self.parts), *first[1:])


Layout = dict[str, Stack]


def checkpoint_layout(config: DecoderConfig) -> Layout:
    """Every weight of the decoder in the order in which it is built."""
    embedding = ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    layout = {"embedding": Stack((embedding,))}
    for layer in range(config.num_layers):
        for name, stack in _layer(config, layer):
            layout[f"layers.{layer}.{name}"] = stack
    layout["final_norm"] = Stack((("model.norm.weight", (config.hidden_size,)),))
    if not config.tied_embeddings:
        layout["head"] = Stack((("lm_head.weight", (config.vocab_size, config.hidden_size)),))
    return layout


def is_redundant(name: str, config: DecoderConfig) -> bool:
    """True for tensors that some checkpoints carry and nobody needs: computed RoPE tables, a copy of a tied head."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tied_embeddings and name == "lm_head.weight")


def _layer(config: DecoderConfig, layer: int) -> Iterator[tuple[str, Stack]]:
    prefix = f"model.layers.{layer}"
    for name, checkpoint_name in _norm_names(config).items():
        yield name, Stack(((f"{prefix}.{checkpoint_name}.weight", (config.hidden_size,)),))
    yield from _attention(config, f"{prefix}.self_attn")
    if config.layers[layer].is_moe:
        assert config.moe is not None
        yield from _moe(config.moe, config.hidden_size, f"{prefix}.{config.moe.block_name}")
    else:
        yield from _mlp(config, f"{prefix}.mlp")


def _norm_names(config: DecoderConfig) -> dict[str, str]:
    """The same checkpoint name means different norms in different families."""
    match config.norm_style:
        case "pre":
            return {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        case "post":
            return {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
        case "sandwich":
            return {
                "attention_norm": "input_layernorm",
                "attention_out_norm": "post_attention_layernorm",
                "mlp_norm": "pre_feedforward_layernorm",
                "mlp_out_norm": "post_feedforward_layernorm",
            }


def _attention(config: DecoderConfig, prefix: str) -> Iterator[tuple[str, Stack]]:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.fused_qkv:
        sizes = {"qkv_proj": q_size + 2 * kv_size}
    else:
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
    yield from _linear("qkv", prefix, sizes, config.hidden_size, config.qkv_bias)
    if config.qk_norm != "none":
        full = config.qk_norm == "full"
        yield "q_norm", Stack(((f"{prefix}.q_norm.weight", (q_size if full else config.head_dim,)),))
        yield "k_norm", Stack(((f"{prefix}.k_norm.weight", (kv_size if full else config.head_dim,)),))
    yield from _linear("o", prefix, {"o_proj": config.hidden_size}, q_size, config.o_bias)


def _mlp(config: DecoderConfig, prefix: str) -> Iterator[tuple[str, Stack]]:
    inner = config.intermediate_size
    sizes = {"gate_up_proj": 2 * inner} if config.fused_gate_up else {"gate_proj": inner, "up_proj": inner}
    yield from _linear("gate_up", prefix, sizes, config.hidden_size, config.mlp_bias)
    yield from _linear("down", prefix, {"down_proj": config.hidden_size}, inner, config.mlp_bias)


def _moe(moe: MoEConfig, hidden_size: int, prefix: str) -> Iterator[tuple[str, Stack]]:
    yield from _linear("router", prefix, {"gate": moe.num_experts}, hidden_size, False)
    gate, up, down = moe.projection_names
    for expert in range(moe.num_experts):
        inner, at = moe.intermediate_size, f"{prefix}.experts.{expert}"
        yield from _linear(f"experts.{expert}.gate_up", at, {gate: inner, up: inner}, hidden_size, False)
        yield from _linear(f"experts.{expert}.down", at, {down: hidden_size}, inner, False)
    if moe.shared_intermediate_size:
        inner, at = moe.shared_intermediate_size, f"{prefix}.shared_expert"
        yield from _linear("shared.gate_up", at, {"gate_proj": inner, "up_proj": inner}, hidden_size, False)
        yield from _linear("shared.down", at, {"down_proj": hidden_size}, inner, False)
        yield from _linear("shared.gate", prefix, {"shared_expert_gate": 1}, hidden_size, False)


def _linear(name: str, prefix: str, sizes: dict[str, int], width: int, bias: bool) -> Iterator[tuple[str, Stack]]:
    """Matrices [size, width] of one fused linear, and its bias as `<name>_bias`."""
    yield name, Stack(tuple((f"{prefix}.{part}.weight", (size, width)) for part, size in sizes.items()))
    if bias:
        yield f"{name}_bias", Stack(tuple((f"{prefix}.{part}.bias", (size,)) for part, size in sizes.items()))
