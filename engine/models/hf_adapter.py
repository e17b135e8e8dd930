"""Runs any other causal language model of transformers on our paged cache, through its attention interface.

The model's layers call `attend` with [1, heads, T, D] tensors of a ragged batch; it writes keys and values to the
cache and calls the paged kernel. Everything else (embedding, positions, feed-forward, head) is transformers' own code.
Nothing is assumed to work: at load the adapted model must reproduce the plain one on two interleaved sequences, which
finds models that mix tokens outside attention (state-space layers) or bias their scores (ALiBi).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from engine.errors import ConfigError
from engine.models.batch import ForwardBatch, KVCache, KVSpec
from engine.models.generation_config import GenerationDefaults
from engine.models.hf_check import CHECK_IDS, run_interleaved

ATTENTION = "kvasir_paged"
_STEP = "kvasir_step"  # attribute that leads from an attention module to the running step
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of the largest logit


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asked of attention while the model was probed."""

    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    window: int


class Step:
    """The batch and cache that attention works on; shared by all attention modules of one model."""

    def __init__(self) -> None:
        self.batch: ForwardBatch | None = None
        self.cache: KVCache | None = None
        self.calls: dict[int, list[AttentionCall]] = {}  # by layer, filled while there is no batch

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, soft_cap: float,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """q [T, H, D], k, v [T, H_kv, D] -> [T, H, Dv]; without a batch it only notes the call."""
        if self.batch is None or self.cache is None:
            call = AttentionCall(k.shape[1], k.shape[2], v.shape[2], window)
            self.calls.setdefault(layer, []).append(call)
            return q.new_zeros(*q.shape[:2], v.shape[2])
        if self.batch.attention is not None:
            return self.batch.attention.attend(
                layer, q, k, v, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
            )
        k_cache, v_cache = self.cache.layer(layer)
        kernels.kv_write(k, v, k_cache, v_cache, self.batch.slots)
        return kernels.paged_attention(
            q,
            k_cache,
            v_cache,
            self.batch.block_table,
            self.batch.seq_lens,
            self.batch.cu_seqlens_q,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            plan=self.batch.attention_plan,
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, Dv]."""
    if position_bias is not None or attention_mask is not None:
        raise ConfigError("the model adds a bias or a mask of its own to attention scores, which is not supported")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ConfigError("the model's attention is not causal: it cannot generate text token by token")
    step: Step = getattr(module, _STEP)
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = step.attend(
        layer,
        *(part[0].transpose(0, 1).contiguous() for part in (query, key, value)),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        soft_cap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return out[None], None


class TransformersModel:
    """Implements engine.models.batch.Model around a transformers model. Build it with hf_loader.load_adapter."""

    shows_hidden = False

    def __init__(
        self, hf_model: Any, *, architecture: str, device: torch.device, max_model_len: int,
        generation: GenerationDefaults,
    ) -> None:  # fmt: skip
        self._step = Step()
        for module in hf_model.modules():
            setattr(module, _STEP, self._step)
        self._hf_model = hf_model
        self._decoder = hf_model.get_decoder()
        if self._decoder is hf_model:
            raise ConfigError(f"{architecture} does not tell its decoder from its head, which the adapter needs")
        self._head = _Head(hf_model, self._decoder)
        self.architecture = architecture
        self.device = device
        self.dtype = next(hf_model.parameters()).dtype
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.vocab_size = hf_model.get_input_embeddings().weight.shape[0]
        self.max_model_len = max_model_len
        self.weight_bytes = sum(parameter.nbytes for parameter in hf_model.parameters())
        self.eos_token_ids = generation.eos_token_ids
        self.generation_defaults = generation.sampling
        reference = [self._plain_logits(ids) for ids in CHECK_IDS]
        self.logits_size = reference[0].shape[1]
        self.spec = self._probe()
        self._check(reference)

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Hidden states [T, C] before the head; writes keys and values of the batch's tokens into `cache`."""
        self._step.batch, self._step.cache = batch, cache
        try:
            return self._run(batch.token_ids, batch.positions)
        finally:
            self._step.batch = self._step.cache = None

    def forward_layers(self, batch: ForwardBatch, cache: KVCache, num_layers: int) -> None:
        """See `Model`: a foreign model runs all of its layers."""
        self.forward(batch, cache)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, C] -> [n, V] fp32, through the model's own head with its scales and caps."""
        return self._head(hidden).float()

    def description(self) -> dict[str, str]:
        """What was loaded, for the start-up report."""
        return {
            "architecture": f"{self.architecture} (transformers adapter)",
            "layers": str(self.spec.num_layers),
            "parameters": f"{self._hf_model.num_parameters() / 1e6:.1f} M",
            "weights": f"{self.weight_bytes / 2**20:.0f} MiB, {self.dtype_name}",
        }

    def _run(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        out = self._decoder(input_ids=token_ids[None], position_ids=positions[None], use_cache=False)
        self._head.output_type = type(out)
        return out.last_hidden_state[0]

    @torch.no_grad()
    def _plain_logits(self, token_ids: list[int]) -> Tensor:
        """What transformers computes on its own, before its attention is replaced."""
        ids = torch.tensor([token_ids], device=self.device) % self.vocab_size
        return self._hf_model(input_ids=ids, use_cache=False).logits[0].float()

    @torch.no_grad()
    def _probe(self) -> KVSpec:
        """Replaces attention and finds out what every layer stores. Raises ConfigError when it is not one shape."""
        self._hf_model.set_attn_implementation(ATTENTION)
        ids = torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            self._run(ids, ids)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.architecture} does not run with its attention replaced: {error}") from error
        calls = self._step.calls
        num_layers = self._hf_model.config.get_text_config().num_hidden_layers
        if sorted(calls) != list(range(num_layers)) or any(len(c) != 1 for c in calls.values()):
            raise ConfigError(
                f"{self.architecture} cannot run on a paged cache: attention was found in {len(calls)} of its "
                f"{num_layers} layers (state-space and linear-attention layers, encoders and models with their own "
                "attention code are not supported)"
            )
        shapes = {(c.num_kv_heads, c.head_dim, c.head_dim_v) for (c,) in calls.values()}
        if len(shapes) != 1:
            raise ConfigError(f"{self.architecture}: layers with different key/value shapes are not supported")
        config = self._hf_model.config.get_text_config()
        window_used = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
        if window_used and not any(c.window for (c,) in calls.values()):
            raise ConfigError(f"{self.architecture} has a sliding window that it does not tell its attention")
        windows = tuple(calls[layer][0].window for layer in range(num_layers))
        return KVSpec(num_layers, *shapes.pop(), windows if any(windows) else ())

    def _check(self, reference: list[Tensor]) -> None:
        """Two sequences, interleaved and in chunks, must give the logits of each alone."""
        actual = [self.logits(hidden) for hidden in run_interleaved(self)]
        for expected, got in zip(reference, actual, strict=True):
            bound = _CHECK_TOLERANCE[self.dtype] * float(expected.abs().max())
            error = float((got - expected).abs().max())
            if not error <= bound:
                raise ConfigError(
                    f"{self.architecture} does not give the same logits on a paged cache (error {error:.2g}, bound "
                    f"{bound:.2g}): it mixes tokens outside of attention or biases attention in a way we do not know"
                )


class _Head:
    """The model from its final hidden states on: its own forward, with the decoder's answer given."""

    def __init__(self, hf_model: Any, decoder: Any) -> None:
        self._hf_model = hf_model
        self._decoder = decoder
        self.output_type: type[Any] = dict  # what the decoder returns

    def __call__(self, hidden: Tensor) -> Tensor:  # [n, C] -> [n, V]
        answer = self.output_type(last_hidden_state=hidden[None])
        ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        self._decoder.forward = lambda *_, **__: answer  # hides the class's method on this one object
        try:
            return self._hf_model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self._decoder.forward
