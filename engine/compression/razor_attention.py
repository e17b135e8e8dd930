"""Retrieval heads keep everything; the others keep the first tokens, the newest, and one mean of what they dropped.

Source: Tang et al. 2024, arXiv:2407.15891. A head that drops N_d tokens gets a virtual key, the mean of their keys,
with the mean of their values and the logit q.k/sqrt(d) + ln N_d, as if it stood for each of them. Retrieval heads are
found offline on repeated random tokens: a query head's echo score is its attention to earlier copies of the same token,
its induction score that to the tokens after them; the best 14 % of kv heads by induction and 1 % by echo, over all
layers, are retrieval heads.
Decided: scores are summed over all earlier copies and averaged over queries. The window of the other heads is
max(min_recent, prompt / divisor), fixed at the prompt's end; as it slides, in bursts of `period`, what leaves it joins
the mean. Keys are averaged as they are stored, with RoPE.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.compression.base import CacheShape, CompactionView
from engine.compression.options import MOST_TOKENS, Options, option
from engine.compression.registry import Hook, register
from engine.compression.scoring import ScoringPolicy, first_tokens
from engine.errors import ConfigError
from engine.scheduling.compression import CachePlan, Realisation

EVERYTHING = 1 << 30  # slots kept by a retrieval head: more than any context has

Heads = tuple[tuple[int, int], ...]  # (layer, kv head)


@register("razor_attention", needs=(Hook.COMPENSATION,))
@dataclass(frozen=True, kw_only=True)
class RazorAttention(ScoringPolicy, Options):
    """Heads that retrieve keep everything, the others the first tokens, the newest and one mean of the rest."""

    num_sink: int = option(4, int, "first tokens, always kept", at_least=0, at_most=4096)
    min_recent: int = option(
        4000, int, "newest tokens kept by the other heads, at least", at_least=1, at_most=MOST_TOKENS
    )
    divisor: float = option(5.0, float, "and at least the prompt's length divided by this", at_least=1, at_most=1000)
    period: int = option(16, int, "new tokens between two compactions", at_least=1, at_most=65536)
    retrieval_heads: Heads | None = field(default=None)

    def bind(self, retrieval_heads: Heads) -> RazorAttention:
        """With the head classes of the model that is served, from its calibration artefact."""
        return replace(self, retrieval_heads=tuple(sorted(set(retrieval_heads))))

    def plan(self, num_prompt_tokens: int, shape: CacheShape) -> CachePlan:
        """Raises ConfigError without head classes, and for those of another model."""
        heads = self._checked(shape)
        local = self.num_sink + max(self.min_recent, math.ceil(num_prompt_tokens / self.divisor))
        kept = tuple(
            EVERYTHING if (layer, head) in heads else local
            for layer in range(shape.num_layers)
            for head in range(shape.num_kv_heads)
        )
        first_point: int | None = num_prompt_tokens if num_prompt_tokens > local else local + self.period
        if min(kept) == EVERYTHING:
            first_point = None
        return CachePlan(self.name, Realisation.HEADS, first_point, self.period, kept)

    def importance(self, view: CompactionView) -> Tensor:
        return view.positions.float()

    def protected(self, view: CompactionView) -> Tensor:
        return first_tokens(view, (view.num_kept - 1).clamp(max=self.num_sink))

    def _checked(self, shape: CacheShape) -> frozenset[tuple[int, int]]:
        if self.retrieval_heads is None:
            raise ConfigError("razor_attention needs the head classes of this model: make them with `kvasir calibrate`")
        for layer, head in self.retrieval_heads:
            if not (0 <= layer < shape.num_layers and 0 <= head < shape.num_kv_heads):
                raise ConfigError(
                    f"head classes name layer {layer}, kv head {head}; this model has {shape.num_layers} layers of "
                    f"{shape.num_kv_heads}: calibrate it anew"
                )
        return frozenset(self.retrieval_heads)


@dataclass(frozen=True)
class Compensation:
    """What stands for the dropped tokens of each kv head of a layer: sums [H_kv, D] float32 and their number [H_kv]."""

    keys: Tensor
    values: Tensor
    count: Tensor

    @classmethod
    def none(cls, num_kv_heads: int, head_dim: int, head_dim_v: int, device: torch.device) -> Compensation:
        zeros = torch.zeros(num_kv_heads, head_dim, device=device)
        return cls(zeros, zeros.new_zeros(num_kv_heads, head_dim_v), zeros.new_zeros(num_kv_heads))

    def add(self, keys: Tensor, values: Tensor, dropped: Tensor) -> Compensation:
        """With more tokens: keys [H_kv, n, D], values [H_kv, n, Dv], dropped [H_kv, n] bool."""
        taken = dropped.to(keys.dtype).unsqueeze(-1)
        return Compensation(
            self.keys + (keys * taken).sum(1), self.values + (values * taken).sum(1), self.count + taken.sum((1, 2))
        )

    def virtual(self) -> tuple[Tensor, Tensor, Tensor]:
        """The virtual key [H_kv, D], its value [H_kv, Dv] and what its logit gains, [H_kv]: -inf where nothing went."""
        count = self.count.clamp(min=1).unsqueeze(-1)
        return self.keys / count, self.values / count, self.count.log()


def echo_and_induction(probabilities: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """How much each head looks at earlier copies of its token, and at what came after them: two [H] float32.

    probabilities  [H, S, S], causal, of a beginning-of-text token and then the same `length` tokens again and again
    Raises ValueError when there is no second copy.
    """
    num_tokens = probabilities.shape[-1]
    query = torch.arange(1 + length, num_tokens, device=probabilities.device).unsqueeze(1)
    key = torch.arange(num_tokens, device=probabilities.device).unsqueeze(0)
    if len(query) == 0:
        raise ValueError(f"{num_tokens} tokens hold no second copy of {length} tokens")
    # the copies of query i are i - length, i - 2 length, ...; position 0 is not part of the repetition
    is_copy = (key >= 1) & (key < query) & ((query - key) % length == 0)
    is_next = (key >= 2) & (key <= query - length + 1) & ((query - key + 1) % length == 0)
    rows = probabilities[:, 1 + length :].float()
    return (rows * is_copy).sum(-1).mean(-1), (rows * is_next).sum(-1).mean(-1)


def retrieval_heads(
    echo: Tensor, induction: Tensor, num_kv_heads: int, *, induction_share: float = 0.14, echo_share: float = 0.01
) -> Heads:
    """The kv heads (layer, head) that keep everything, by the scores [L, H] of their query heads.

    A group is as good as its best query head. Shares are of all kv heads, rounded up; ties: the later head.
    """
    num_layers = echo.shape[0]
    chosen: set[tuple[int, int]] = set()
    for scores, part in ((induction, induction_share), (echo, echo_share)):
        best = scores.unflatten(1, (num_kv_heads, -1)).amax(-1).flatten()
        order = best.argsort(descending=True, stable=True)
        for flat in order[: math.ceil(part * num_layers * num_kv_heads)].tolist():
            chosen.add(divmod(flat, num_kv_heads))
    return tuple(sorted(chosen))
