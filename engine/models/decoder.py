"""The native decoder: one config-driven model for the Llama-shaped families and their mixture-of-experts kin.

Embedding -> layers -> final norm; logits only for the rows asked for. Knows tensors and block tables, no requests.
Shape letters: T tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

import kernels
from engine.models.batch import ForwardBatch, KVCache, KVSpec
from engine.models.config import DecoderConfig
from engine.models.generation_config import GenerationDefaults
from engine.models.layers import Attention, DecoderLayer, FeedForward, GatedMlp, Linear
from engine.models.lora import DecoderAdapters
from engine.models.moe import Experts, GroupedExperts, MixtureOfExperts, SeparateExperts, stack
from engine.models.native_step import native_step
from engine.models.rope import RopeTable, build_rope_table
from engine.models.watched import run_watched
from engine.models.weights import WeightSource, num_parameters
from kernels.decoder_step import PackedTokens
from kernels.decoder_step.chain import DecoderChain
from kernels.linear import BF16, PackedLinear, pack_linear


class Decoder:
    """Implements engine.models.batch.Model. Build it with `build_decoder`."""

    shows_hidden = True

    def __init__(
        self,
        config: DecoderConfig,
        *,
        embedding: Tensor | PackedLinear,
        layers: list[DecoderLayer],
        first_norm: Tensor | None,
        head: PackedLinear,
        ropes: list[RopeTable],
        linears: Counter[str],
        weight_bytes: int,
        weight_dtype: torch.dtype,
        quantization: str | None,
        device: torch.device,
        max_model_len: int,
        generation: GenerationDefaults,
    ) -> None:
        self.config = config
        windows = tuple(layer.window for layer in config.layers)
        self.spec = KVSpec(
            config.num_layers,
            config.num_kv_heads,
            config.head_dim,
            config.head_dim,
            windows if any(windows) else (),
        )
        self.architecture = config.architecture
        self.vocab_size = config.vocab_size
        self.logits_size = head.out_features
        self.max_model_len = max_model_len
        self.eos_token_ids = generation.eos_token_ids
        self.generation_defaults = generation.sampling
        self.weight_bytes = weight_bytes
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else weight_dtype
        self.dtype_name = str(weight_dtype).removeprefix("torch.") + (f" as {quantization}" if quantization else "")
        self._embedding = embedding  # a table [V, C], or a packed weight that gives back its rows
        self._layers = layers
        self._first_norm = first_norm
        self._head = head
        self._ropes = ropes
        self._linears = linears
        self._adapters: DecoderAdapters | None = None
        self._step = native_step(config, embedding, first_norm, layers)

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Hidden states [T, C] after the final norm; writes keys and values of the batch's tokens into `cache`."""
        packed = _packed_tokens(batch)
        if self._step is not None and batch.adapters is None and packed is not None:
            return self._step(
                batch.token_ids,
                batch.positions,
                batch.slots,
                batch.cu_seqlens_q,
                batch.seq_lens,
                batch.block_table,
                cache.k,
                cache.v,
                batch.attention_plan.paths,
                packed,
            )
        return self._forward_by_operations(batch, cache)

    def _forward_by_operations(self, batch: ForwardBatch, cache: KVCache, num_layers: int | None = None) -> Tensor:
        """`forward` one kernel at a time: the same bits as the native step, for whatever that cannot do.

        num_layers   run the first ones only
        """
        residual = self.embed(batch.token_ids)
        if self.config.embedding_multiplier != 1.0:
            residual.mul_(self.config.embedding_multiplier)
        x = residual
        if self._first_norm is not None:
            x = kernels.rms_norm(residual, self._first_norm, self.config.norm_eps)
        layers = self._layers_of(batch)[:num_layers]
        if batch.watcher is not None:
            norms = [self._first_norm, *[layer.next_norm for layer in layers]]
            return run_watched(layers, norms, self.config.norm_eps, x, residual, batch, cache, batch.watcher)
        for layer in layers:
            x = layer(x, residual, batch, cache)
        return x

    def forward_layers(self, batch: ForwardBatch, cache: KVCache, num_layers: int) -> None:
        """See `Model`."""
        self._forward_by_operations(batch, cache, num_layers)

    def write_kv(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, cache: KVCache) -> None:
        """See `engine.models.batch.KeyWriter`."""
        self._layers[layer].attention.write(k.to(self.dtype), v.to(self.dtype), positions, slots, cache)

    def chain(self, num_logits: int) -> DecoderChain | None:
        """Step, head and choice in one native call, among the first `num_logits` columns; None where that cannot be."""
        if self._step is None or self._head.panels is None:
            return None
        config = self.config
        return DecoderChain(
            self._step,
            self._head,
            num_logits=num_logits,
            divisor=config.logits_divisor,
            soft_cap=config.logits_soft_cap or 0.0,
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, C] as stored, without the family's multiplier."""
        table = self._embedding
        return table.rows(token_ids) if isinstance(table, PackedLinear) else kernels.embedding(token_ids, table)

    def enable_adapters(self, max_adapters: int) -> DecoderAdapters:
        """Makes room for low-rank adapters: from now on `forward` takes batches with `adapters`."""
        self._adapters = DecoderAdapters(self.config, self._layers, max_adapters, device=self.device, dtype=self.dtype)
        return self._adapters

    def _layers_of(self, batch: ForwardBatch) -> list[DecoderLayer]:
        if batch.adapters is None:
            return self._layers
        assert self._adapters is not None, "a batch has adapters, but there is no room for any"
        return self._adapters.layers_for(batch.adapters)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, C] -> [n, V] fp32, scaled and soft-capped as the family does."""
        logits = self._head(hidden).float()
        if self.config.logits_divisor != 1.0:
            logits.div_(self.config.logits_divisor)
        if cap := self.config.logits_soft_cap:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def description(self) -> dict[str, str]:
        """What was loaded, for the start-up report."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self._linears.items()))
        return {
            "architecture": self.architecture,
            "layers": str(self.config.num_layers),
            "parameters": f"{num_parameters(self.config) / 1e6:.1f} M",
            "weights": f"{self.weight_bytes / 2**20:.0f} MiB, {self.dtype_name}",
            "linears": kinds,
            "step": "one native call" if self._step is not None else "operation by operation",
            "rope": "; ".join(dict.fromkeys(rope.choice for rope in self._ropes)),
        }


def _packed_tokens(batch: ForwardBatch) -> Sequence[PackedTokens] | None:
    """What rows have in packed blocks, where attention is as usual otherwise and nobody looks on; else None."""
    if batch.writes is not None or batch.watcher is not None:
        return None
    return () if batch.attention is None else batch.attention.packed()


def build_decoder(
    config: DecoderConfig, weights: WeightSource, *, linear_mode: str, device: torch.device, max_model_len: int,
    generation: GenerationDefaults, quantization: str | None = None,
) -> Decoder:  # fmt: skip
    """Takes every weight from `weights` once, packs it and lets the source go.

    linear_mode: of kernels.linear.pack_linear. max_model_len: positions that the RoPE tables cover. quantization: the
    mode of the layers' matrices instead of linear_mode; the head then has 8 bits, and routers stay as they are.
    """
    return _Builder(config, weights, linear_mode, device, max_model_len, quantization).build(generation)


class _Builder:
    def __init__(
        self,
        config: DecoderConfig,
        weights: WeightSource,
        linear_mode: str,
        device: torch.device,
        max_model_len: int,
        quantization: str | None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.linear_mode = linear_mode
        self.quantization = quantization
        self.layer_mode = quantization or linear_mode
        self.router_mode = "auto" if linear_mode == BF16 else linear_mode  # a wrong expert costs more than its bytes
        self.head_mode = "int8" if quantization else linear_mode  # 4 bits in the head cost most of the quality
        self.device = device
        self.max_model_len = max_model_len
        self.ropes = [build_rope_table(rope, max_model_len, device) for rope in config.ropes]
        self.linears: Counter[str] = Counter()
        self.weight_bytes = sum(rope.cos_sin.nbytes for rope in self.ropes)

    def build(self, generation: GenerationDefaults) -> Decoder:
        config = self.config
        embedding, tied_head = self._embedding()
        parts = [self._layer_parts(layer) for layer in range(config.num_layers)]
        first_norms = [norms.get("attention_norm") for _, _, norms in parts]
        next_norms = [*first_norms[1:], self._norm("final_norm")]
        return Decoder(
            config,
            embedding=embedding,
            layers=[
                DecoderLayer(config, attention=attention, feed_forward=feed_forward, norms=norms, next_norm=next_norm)
                for (attention, feed_forward, norms), next_norm in zip(parts, next_norms, strict=True)
            ],
            first_norm=first_norms[0],
            head=tied_head or self._linear("head", self.head_mode),
            ropes=self.ropes,
            linears=self.linears,
            weight_bytes=self.weight_bytes,
            weight_dtype=self.weights.dtype,
            quantization=self.quantization,
            device=self.device,
            max_model_len=self.max_model_len,
            generation=generation,
        )

    def _embedding(self) -> tuple[Tensor | PackedLinear, PackedLinear | None]:
        """What is looked up, and the head when both are one matrix: where it gives back rows, no table is kept."""
        table = self.weights.take("embedding").to(self.device)
        head = self._pack(table, None, self.head_mode) if self.config.tied_embeddings else None
        if head is not None and head.holds_rows:
            return head, head
        self.weight_bytes += table.nbytes
        return table, head

    def _layer_parts(self, layer: int) -> tuple[Attention, FeedForward, dict[str, Tensor]]:
        at = f"layers.{layer}"
        names = ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")
        norms = {name: self._norm(f"{at}.{name}") for name in names if self.weights.has(f"{at}.{name}")}
        is_moe = self.config.layers[layer].is_moe
        return self._attention(layer), self._moe(at) if is_moe else self._mlp(at), norms

    def _attention(self, layer: int) -> Attention:
        at, rope = f"layers.{layer}", self.config.layers[layer].rope
        qkv = self._linear(f"{at}.qkv")
        norms = None
        if self.config.qk_norm != "none":
            norms = self._norm(f"{at}.q_norm"), self._norm(f"{at}.k_norm")
        return Attention(
            self.config,
            layer,
            qkv=qkv,
            o=self._linear(f"{at}.o"),
            norms=norms,
            cos_sin=None if rope is None else self.ropes[rope].cos_sin,
        )

    def _mlp(self, at: str) -> GatedMlp:
        return GatedMlp(self.config.activation, gate_up=self._linear(f"{at}.gate_up"), down=self._linear(f"{at}.down"))

    def _moe(self, at: str) -> MixtureOfExperts:
        assert self.config.moe is not None
        shared: FeedForward | None = None
        shared_gate: Linear | None = None
        router = self._linear(f"{at}.router", self.router_mode)
        experts = self._experts(at, self.config.moe.num_experts)
        if self.config.moe.shared_intermediate_size:
            shared = self._mlp(f"{at}.shared")
            shared_gate = self._linear(f"{at}.shared.gate", self.router_mode)
        return MixtureOfExperts(self.config.moe, router=router, experts=experts, shared=shared, shared_gate=shared_gate)

    def _experts(self, at: str, count: int) -> Experts:
        if self.device.type == "cpu" or self.layer_mode == "deterministic":
            return SeparateExperts([self._mlp(f"{at}.experts.{expert}") for expert in range(count)])
        return self._grouped_experts(at, count)

    def _grouped_experts(self, at: str, count: int) -> GroupedExperts:
        gate_up, down = (
            stack((self.weights.take(f"{at}.experts.{expert}.{name}") for expert in range(count)), count, self.device)
            for name in ("gate_up", "down")
        )
        experts = GroupedExperts(gate_up, down, self.config.activation)
        self.linears[f"grouped_experts_{str(down.dtype).removeprefix('torch.')}"] += 1
        self.weight_bytes += experts.nbytes
        return experts

    def _norm(self, name: str) -> Tensor:
        weight = self._vector(name) + self.config.norm_offset
        self.weight_bytes += weight.nbytes
        return weight

    def _vector(self, name: str) -> Tensor:
        return self.weights.take(name).to(self.device, torch.float32)

    def _linear(self, name: str, mode: str | None = None) -> PackedLinear:
        bias = self._vector(f"{name}_bias") if self.weights.has(f"{name}_bias") else None
        return self._pack(self.weights.take(name), bias, mode or self.layer_mode)

    def _pack(self, weight: Tensor, bias: Tensor | None, mode: str) -> PackedLinear:
        linear = pack_linear(weight.to(self.device), bias, mode=mode)
        self.linears[linear.kind] += 1
        self.weight_bytes += linear.nbytes
        return linear
