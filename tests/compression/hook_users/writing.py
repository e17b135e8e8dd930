"""Systems that look at what is written, or say in which form it stays: small, through the interface alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import kernels
from engine import noise
from engine.compression.base import CacheShape, CompactionView, Evidence, Keep, Part, QueryView, Rewrite, VirtualPart
from engine.compression.options import Options, option
from engine.compression.scoring import KeepsEverything, indices, random_words, ranks
from engine.compression.writing import Codec, PromptView, SideSpec, WriteView, class_plan
from engine.scheduling.compression import CachePlan, Realisation
from kernels.hadamard import hadamard


class Exact:
    """Nothing is coded: as many bytes as before."""

    def group_bytes(self, shape: CacheShape) -> tuple[int, int]:
        return shape.block_size * shape.head_dim * 4, shape.block_size * shape.head_dim_v * 4

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x.contiguous().flatten(3).view(torch.uint8) for x in (keys, values))  # type: ignore[return-value]

    def decode(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x.contiguous().view(torch.float32).unflatten(2, (8, -1)) for x in (keys, values))  # type: ignore[return-value]


def quantised(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (one per byte: a miniature), scale and zero of what shares them along dim."""
    zero, top = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((top - zero) / (2**bits - 1)).clamp_min(1e-12)
    return ((x - zero) / scale).round().to(torch.uint8), scale, zero


def packed(*parts: Tensor) -> Tensor:
    """Tensors of which the first three dims agree, as bytes."""
    return torch.cat([part.contiguous().flatten(3).view(torch.uint8) for part in parts], dim=3)


class Balanced:
    """MiKV: keys times a balancer per channel, then codes per token. The balancer stands with its group."""

    most_query: ClassVar[float] = 4.0  # calibrated: the largest query per channel

    def group_bytes(self, shape: CacheShape) -> tuple[int, int]:
        size, dim = shape.block_size, shape.head_dim
        return size * dim + 4 * (2 * size + dim), size * shape.head_dim_v + 8 * size

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        balancer = (self.most_query / keys.abs().amax(3, keepdim=True).clamp_min(1e-6)).sqrt()
        return packed(*quantised(keys * balancer, -1, 4), balancer), packed(*quantised(values, -1, 4))

    def decode(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        k, rest = _unpacked(keys)
        dim = k.shape[3]
        return k / rest[:, :, -dim:].unsqueeze(2), _unpacked(values)[0]


def _unpacked(coded: Tensor, size: int = 8) -> tuple[Tensor, Tensor]:
    """[g, H_kv, bytes] of codes per token -> [g, H_kv, BS, D], and all floats behind the codes."""
    dim = 32
    codes = coded[..., : size * dim].float().unflatten(2, (size, dim))
    rest = coded[..., size * dim :].contiguous().view(torch.float32)
    return codes * rest[..., :size].unsqueeze(3) + rest[..., size : 2 * size].unsqueeze(3), rest


class Oscar:
    """OScaR: Hadamard, then each token divided by its norm, then two bits per channel of a group."""

    def group_bytes(self, shape: CacheShape) -> tuple[int, int]:
        size, dim = shape.block_size, shape.head_dim
        return size * dim // 4 + 2 * (2 * dim + size), size * shape.head_dim_v // 4 + 4 * size

    def encode(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        norm = keys.pow(2).sum((2, 4), keepdim=True).sqrt().expand(-1, -1, keys.shape[2], -1, 1).half()  # of all heads
        turned = hadamard(keys / norm.float().clamp_min(1e-6)), hadamard(values)
        coded = []
        for x, dim, more in ((turned[0], 3, [norm]), (turned[1], -1, [])):
            codes, scale, zero = quantised(x, dim, 2)
            quads = (codes.flatten(3).unflatten(3, (-1, 4)) << torch.arange(0, 8, 2)).sum(4).to(torch.uint8)
            coded.append(packed(quads, scale.half(), zero.half(), *more))
        return coded[0], coded[1]

    def decode(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        size, dim, found = 8, 32, []
        for x, shape in ((keys, (1, dim)), (values, (size, 1))):
            codes = (x[..., : size * dim // 4].unsqueeze(3) >> torch.arange(0, 8, 2)) & 3
            rest = x[..., size * dim // 4 :].contiguous().view(torch.float16).float()
            count = shape[0] * shape[1]
            scale, zero = (part.unflatten(2, shape) for part in (rest[..., :count], rest[..., count : 2 * count]))
            found.append(hadamard(codes.float().flatten(2).unflatten(2, (size, dim)) * scale + zero, scale=1 / dim))
            norm = rest[..., -size:].unsqueeze(3)
            found[0] = found[0] * norm if len(found) == 1 else found[0]
        return found[0], found[1]


class Classed(Options):
    """What the ones with classes share: the best of `scores` stay, the next join class 1, and so on."""

    codecs: ClassVar[Mapping[str, Codec]] = {"exact": Exact(), "balanced": Balanced(), "oscar": Oscar()}

    def divided(self, view: CompactionView, scores: Tensor) -> Keep:
        places = ranks(scores)
        cls = torch.zeros_like(places, dtype=torch.uint8)
        num_kept = first = int(view.num_kept[0, 0])
        for number, count in enumerate(view.num_packed, start=1):
            cls[(places >= first) & (places < first + count)] = number
            first += count
        return Keep(indices(places < num_kept, num_kept), cls=cls)


@dataclass(frozen=True, kw_only=True)
class MiKV(Classed):
    """H2O, and what it would evict stays in few bits."""

    budget: int = option(16, int, "tokens that stay as they are", at_least=1, at_most=4096)
    low: str = option("balanced", str, "how the others are packed", choices=("balanced", "exact", "kivi2", "int8"))

    evidence = Evidence()

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return class_plan(
            self, num_prompt_tokens, shape, num_unpacked=self.budget, shares={self.low: 1.0}, period=16,
            num_queries=num_prompt_tokens,
        )  # fmt: skip

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return torch.ones(1, len(positions))

    def keep(self, view: CompactionView) -> Keep:
        newest = view.positions >= view.num_tokens - self.budget // 2
        return self.divided(view, view.scores[0].masked_fill(newest, torch.inf))


@dataclass(frozen=True, kw_only=True)
class ZipCache(Classed):
    """Salient tokens in four bits, the others in two, by normalised attention of probes; again every 16 tokens."""

    high: str = option("kivi4", str, "how salient tokens are packed", choices=("kivi4", "exact"))
    low: str = option("kivi2", str, "how the others are", choices=("kivi2", "exact"))

    evidence = Evidence(resets=True)

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        shares = {self.high: 0.6, self.low: 0.4} if self.high != self.low else {self.high: 1.0}
        plan = class_plan(self, num_prompt_tokens, shape, num_unpacked=1, shares=shares, period=16)
        return replace(plan, num_queries=num_prompt_tokens)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        at_random = torch.tensor(
            [noise.row_key(0, 0, at, noise.Purpose.EVIDENCE) % 20 == 0 for at in positions.tolist()]
        )
        return (at_random | (positions >= next_point - 8)).float().unsqueeze(0)

    def keep(self, view: CompactionView) -> Keep:
        seen_by = (view.num_tokens - view.positions).clamp_min(1)
        newest = ranks(view.positions.float()) < view.num_kept.unsqueeze(2)
        return self.divided(view, (view.scores[0] / seen_by).masked_fill(newest, torch.inf))


@dataclass(frozen=True, kw_only=True)
class OScaR(Classed):
    """Older tokens in OScaR's form."""

    form: str = option("oscar", str, "how they are packed", choices=("oscar", "exact"))

    evidence = None

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return class_plan(self, num_prompt_tokens, shape, num_unpacked=8, shares={self.form: 1.0}, period=8)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return torch.zeros(1, len(positions))

    def keep(self, view: CompactionView) -> Keep:
        return self.divided(view, view.positions.float())


def enough(scores: Tensor, tau: float) -> int:
    """ZipVL: the fewest of scores [n] that together have that share of all."""
    reached = scores.double().sort(descending=True).values.cumsum(0)
    return int((reached < tau * reached[-1] * (1 - 1e-12)).sum()) + 1 if tau < 1 else len(scores)


@dataclass(frozen=True, kw_only=True)
class ZipVL(Options):
    """Of each layer, once, as many tokens as have the share `tau` of the attention of probes."""

    tau: float = option(0.9, float, "share of attention that stays", above=0, at_most=1)

    evidence = Evidence()

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        kept = (num_prompt_tokens,) * shape.num_layers
        plan = CachePlan(self.name, Realisation.LAYERS, num_prompt_tokens, 0, kept, num_queries=num_prompt_tokens)
        return replace(plan, is_adaptive=True)

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return (positions >= num_prompt_tokens - 8).float().unsqueeze(0)

    def keep(self, view: CompactionView) -> Keep:
        scores = view.scores[0].sum(1)  # [L, n]: alike for all heads of a layer
        counts = torch.tensor([enough(layer, self.tau) for layer in scores])
        chosen = (ranks(scores) < counts.unsqueeze(1)).unsqueeze(1).expand(view.positions.shape)
        return Keep(indices(chosen, int(counts.max())))


@dataclass(frozen=True, kw_only=True)
class KVPrediction(KeepsEverything, Options):
    """Keys and values of all of the prompt but its last token come from an auxiliary model, here the model's own first
    layers, and maps, here the identity.
    """

    num_layers: int = option(64, int, "layers of the auxiliary model", at_least=1, at_most=64)

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        return replace(super().plan(num_prompt_tokens, shape), num_provided=num_prompt_tokens - 1, is_private=True)

    def provide(self, view: PromptView) -> Sequence[tuple[Tensor, Tensor]]:
        layers = view.probe(min(self.num_layers, self.model_layers))
        return [
            tuple(x[view.start :] for x in layers[i * len(layers) // self.model_layers])
            for i in range(self.model_layers)
        ]  # type: ignore[misc]

    model_layers: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True)
class ShadowKV(KeepsEverything, Options):
    """The prompt's keys are rebuilt from few directions of their unrotated forms; generated tokens are as they are."""

    rank: int = option(64, int, "directions of all kv heads together", at_least=1, at_most=4096)

    needs_unrotated: ClassVar[bool] = True
    cos_sin: ClassVar[Tensor]  # the model's rotation

    @property
    def side(self) -> SideSpec:
        return SideSpec(32)

    def on_kv(self, view: WriteView) -> Tensor:
        assert view.unrotated is not None
        return view.unrotated

    def rewrite(self, view: QueryView) -> Rewrite:
        n, own = view.num_prompt_tokens, int(view.num_slots[-1])
        if view.layer not in view.memory:
            view.memory[view.layer] = self._rebuilt(view, n)
        keys, values = view.memory[view.layer], view.values(view.layer)[:, :n]
        zeros = torch.zeros(1, *keys.shape[:2])
        prompt = VirtualPart(keys.unsqueeze(0), values.unsqueeze(0), zeros)
        return Rewrite([prompt, Part(torch.arange(n, own).view(1, 1, -1))])

    def _rebuilt(self, view: QueryView, n: int) -> Tensor:
        assert view.side is not None
        unrotated = view.side(view.layer)[:, :n].transpose(0, 1)  # [n, H_kv, D]
        u, s, v = torch.linalg.svd(unrotated.flatten(1), full_matrices=False)
        low = ((u[:, : self.rank] * s[: self.rank]) @ v[: self.rank]).view_as(unrotated).contiguous()
        kernels.apply_rope(low.clone(), low, torch.arange(n), self.cos_sin)
        return low.transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class Labels(Options):
    """Keys are noted in fewer bits and with their positions, and random tokens are dropped: what is noted must be
    that of the tokens that are left.
    """

    budget: int = option(24, int, "tokens kept", at_least=1, at_most=4096)

    evidence = None
    seen: ClassVar[list[bool]] = []

    @property
    def side(self) -> SideSpec:
        return SideSpec(33, torch.float16)

    def on_kv(self, view: WriteView) -> Tensor:
        where = view.positions.view(-1, 1, 1).expand(-1, view.keys.shape[1], 1)
        return torch.cat([view.keys.half(), where.half()], dim=2)

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        first = max(num_prompt_tokens, self.budget)
        return CachePlan(self.name, Realisation.SLOTS, first, 8, (self.budget,))

    def query_weights(self, positions: Tensor, num_prompt_tokens: int, next_point: int) -> Tensor:
        return torch.zeros(1, len(positions))

    def keep(self, view: CompactionView) -> Keep:
        assert view.side is not None
        for layer in range(view.positions.shape[0]):
            noted = view.side(layer)
            same = torch.equal(noted[..., :32], view.keys(layer).half())
            self.seen.append(same and torch.equal(noted[..., 32].long(), view.positions[layer]))
        shape = tuple(view.positions.shape[:2])
        words = random_words(view.seed, shape, view.positions.shape[2], noise.Purpose.EVICTION, view.positions.device)  # type: ignore[arg-type]
        return Keep(indices(ranks(words.float()) < view.num_kept.unsqueeze(2), self.budget))
