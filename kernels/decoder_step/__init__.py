"""All layers of a dense decoder in one native call, with the bits of the single operations called one by one.

Not an operation of its own but a composition, for CPU only: what it computes is defined by the sequence of operations
that the caller would make otherwise, and the caller keeps that path for whatever does not fit here.
Shape letters: T tokens, R rows, C hidden size, H query heads, H_kv key/value heads, D head_dim, I intermediate size,
NB blocks, L layers, BS block size, MB blocks per row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import backend, native
from kernels.act_and_mul import ACTIVATIONS
from kernels.decoder_step.structures import Batch, Embedding, Layer, PackedPart, Pool, Program, linear_of
from kernels.linear.packed import PackedLinear
from kernels.native import DTYPE_CODES, INT, PTR
from kernels.packed_blocks.cpp_impl import Work, packed_structure
from kernels.paged_attention.plan import AttentionPlan


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer: norm -> qkv -> q/k norms -> rotation -> attention -> o, then norm -> gate_up -> activation -> down.

    Norms are fp32 [C] ([D], or [H * D] and [H_kv * D], for q and k), None where the family has none. `next_norm` opens
    the next layer, or is the final one.
    """

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_out_norm: Tensor | None
    mlp_norm: Tensor | None
    mlp_out_norm: Tensor | None
    next_norm: Tensor | None
    cos_sin: Tensor | None  # [positions, rot_dim] fp32, as of kernels.apply_rope; None: nothing rotates
    window: int


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """The whole decoder up to its last norm."""

    embedding: Tensor | PackedLinear  # [V, C] float, or a packed weight whose rows are the embeddings
    first_norm: Tensor | None
    layers: Sequence[LayerWeights]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    norms_whole_projection: bool  # q and k norms over all heads at once
    qkv_clip: float  # 0: off
    attention_scale: float
    attention_soft_cap: float  # 0: off
    residual_multiplier: float
    embedding_multiplier: float


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """What neighbouring rows of a step have in packed blocks besides: as for `kernels.packed_attention`, on the host.

    tokens        of the step, that are theirs
    table         [R', MBp] int32, rows contiguous
    lens          [R'] int32
    cu_seqlens_q  [R' + 1] int32, from 0
    """

    tokens: slice
    table: Tensor
    lens: Tensor
    cu_seqlens_q: Tensor
    format: str
    plan: AttentionPlan

    @property
    def fits(self) -> bool:
        """Whether the native step can take them: where they are so many that they are done in waves, it cannot."""
        return isinstance(self.plan.work, Work) and len(self.plan.work.waves) == 1


class DecoderStep:
    """Prepared once per model; holds its weights. Called from one thread at a time."""

    def __init__(self, weights: DecoderWeights) -> None:
        """Raises ValueError where `obstacle` names something."""
        problem = obstacle(weights)
        if problem is not None:
            raise ValueError(problem)
        self._weights = weights  # the memory that the structures below point to
        first = weights.layers[0]
        self._hidden_size = first.qkv.in_features
        self._layers = (Layer * len(weights.layers))(*(_layer(layer) for layer in weights.layers))
        self._program = Program(
            layers=ctypes.addressof(self._layers),
            first_norm=_address(weights.first_norm),
            embedding=_embedding(weights.embedding),
            num_layers=len(weights.layers),
            hidden_size=self._hidden_size,
            intermediate_size=first.down.in_features,
            num_heads=weights.num_heads,
            num_kv_heads=weights.num_kv_heads,
            head_dim=weights.head_dim,
            activation=ACTIVATIONS.index(weights.activation),
            norms_projection=weights.norms_whole_projection,
            norm_eps=weights.norm_eps,
            attention_scale=weights.attention_scale,
            attention_soft_cap=weights.attention_soft_cap,
            qkv_clip=weights.qkv_clip,
            residual_multiplier=weights.residual_multiplier,
            embedding_multiplier=weights.embedding_multiplier,
        )
        self._batch = Batch()
        self._addresses = (ctypes.addressof(self._program), ctypes.addressof(self._batch))
        self._pools: tuple[Tensor, Tensor, Pool] | None = None
        self._run = native.function("kvasir_decoder_step", PTR, PTR, PTR, restype=INT)

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        cu_seqlens_q: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        paths: Tensor | None = None,
        packed: Sequence[PackedTokens] = (),
    ) -> Tensor:
        """Hidden states [T, C] fp32 after the last norm; the tokens' keys and values are in the caches then.

        token_ids, positions, slots  [T] int64; slot -1 writes nothing
        cu_seqlens_q, seq_lens       [R + 1], [R] int32, on the host: as for kernels.paged_attention
        block_table                  [R, MB] int32, rows contiguous
        k_cache, v_cache             [NB, L, H_kv, BS, D] float, contiguous, of one type
        paths                        [T, W] int32: `AttentionPlan.paths`, where some rows are trees
        packed                       of rows that have packed tokens, all of which `fits`
        All but block_table are contiguous. Positions, slots and block ids are not checked.
        Raises IndexError for a token id outside of the vocabulary, before anything is written.
        """
        num_tokens = token_ids.shape[0]
        hidden = torch.empty(num_tokens, self._hidden_size)
        batch = self._batch
        batch.token_ids = token_ids.data_ptr()
        batch.positions = positions.data_ptr()
        batch.slots = slots.data_ptr()
        batch.cu_seqlens_q = cu_seqlens_q.data_ptr()
        batch.seq_lens = seq_lens.data_ptr()
        batch.block_table = block_table.data_ptr()
        batch.table_stride = block_table.stride(0)
        batch.paths = None if paths is None else paths.data_ptr()
        batch.paths_stride = 0 if paths is None else paths.stride(0)
        batch.num_tokens = num_tokens
        batch.num_rows = seq_lens.shape[0]
        batch.num_threads = native.num_threads()
        batch.hidden = hidden.data_ptr()
        parts = (PackedPart * len(packed))(*(_packed_part(part, k_cache, v_cache) for part in packed))
        batch.parts = ctypes.addressof(parts)
        batch.num_parts = len(packed)
        program, batch_address = self._addresses
        bad = self._run(program, ctypes.addressof(self.pool(k_cache, v_cache)), batch_address)
        if bad >= 0:
            raise IndexError(f"token id {int(token_ids[bad])} is outside of the vocabulary")
        return hidden

    @property
    def program(self) -> int:
        """Address of the structure for other native calls on these weights, good as long as this object lives."""
        return self._addresses[0]

    def pool(self, k_cache: Tensor, v_cache: Tensor) -> Pool:
        """The caches for native calls. Raises ValueError where they do not fit the decoder.

        Made once per pair of pools; a model is nearly always called with the same.
        """
        if self._pools is None or self._pools[0] is not k_cache or self._pools[1] is not v_cache:
            expected = (len(self._weights.layers), self._weights.num_kv_heads)
            for cache in (k_cache, v_cache):
                if (cache.shape[1:3], cache.shape[4]) != (expected, self._weights.head_dim) or (
                    not cache.is_contiguous() or cache.dtype != k_cache.dtype or cache.device.type != "cpu"
                ):
                    raise ValueError(f"a cache is {list(cache.shape)} {cache.dtype}, which does not fit the decoder")
            pool = Pool(
                k=k_cache.data_ptr(),
                v=v_cache.data_ptr(),
                dtype=DTYPE_CODES[k_cache.dtype],
                block_size=k_cache.shape[3],
                stride_block=k_cache.stride(0),
                stride_layer=k_cache.stride(1),
                stride_head=k_cache.stride(2),
            )
            self._pools = (k_cache, v_cache, pool)
        return self._pools[2]


def obstacle(weights: DecoderWeights) -> str | None:
    """Why these weights cannot run as one native call, or None when they can."""
    embedding = weights.embedding
    if embedding.device.type != "cpu" if isinstance(embedding, Tensor) else embedding.panels is None:
        return "the embedding is not in the native library's hands"
    if backend.select("linear", "cpu") != "cpp":
        return "the native kernels are off"
    for layer in weights.layers:
        linears = (layer.qkv, layer.o, layer.gate_up, layer.down)
        kinds = {linear.kind for linear in linears if linear.panels is None}
        if kinds:
            return f"weights are packed as {', '.join(sorted(kinds))}"
        if layer.gate_up.out_features != 2 * layer.down.in_features:
            return "the MLP is not gated"
        sizes = [linear.in_features for linear in linears] + [layer.down.in_features]
        first = weights.layers[0]
        if sizes[0] != first.qkv.in_features or sizes[-1] != first.down.in_features:
            return "layers differ in size"
    return None


def _packed_part(part: PackedTokens, k_cache: Tensor, v_cache: Tensor) -> PackedPart:
    tokens, rotated = packed_structure(k_cache, v_cache, part.format)
    (wave,) = part.plan.work.waves
    return PackedPart(
        tokens=tokens,
        table=part.table.data_ptr(),
        lens=part.lens.data_ptr(),
        cu_seqlens_q=part.cu_seqlens_q.data_ptr(),
        items=wave.items.data_ptr(),
        merges=wave.merges.data_ptr(),
        first_token=part.tokens.start,
        num_tokens=part.tokens.stop - part.tokens.start,
        table_stride=part.table.stride(0),
        num_items=len(wave.items),
        num_merges=len(wave.merges),
        num_partials=wave.num_partials,
        rotated=rotated,
    )


def _layer(layer: LayerWeights) -> Layer:
    return Layer(
        qkv=linear_of(layer.qkv),
        o=linear_of(layer.o),
        gate_up=linear_of(layer.gate_up),
        down=linear_of(layer.down),
        q_norm=_address(layer.q_norm),
        k_norm=_address(layer.k_norm),
        attention_out_norm=_address(layer.attention_out_norm),
        mlp_norm=_address(layer.mlp_norm),
        mlp_out_norm=_address(layer.mlp_out_norm),
        next_norm=_address(layer.next_norm),
        cos_sin=_address(layer.cos_sin),
        rot_dim=0 if layer.cos_sin is None else layer.cos_sin.shape[1],
        window=layer.window,
    )


def _embedding(table: Tensor | PackedLinear) -> Embedding:
    if isinstance(table, Tensor):
        code = DTYPE_CODES[table.dtype]
        return Embedding(rows=table.data_ptr(), dtype=code, stride=table.stride(0), vocab_size=table.shape[0])
    packed = linear_of(table)
    return Embedding(rows=packed.weights, dtype=packed.dtype, is_packed=True, vocab_size=packed.columns)


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.dtype == torch.float32, "norms and rotations are kept in fp32"
    assert tensor.is_contiguous()
    return tensor.data_ptr()
