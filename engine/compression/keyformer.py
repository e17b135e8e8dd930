"""H2O with noise: tokens that a noisy, ever flatter softmax picks often, and the newest.

Source: Adnan et al. 2024, arXiv:2403.09054; f_k += softmax_k((x_k + zeta_k) / tau_t) with x the scaled logits, zeta
Gumbel(0, 1) noise and tau_t = tau_start + t (tau_end - tau_start) / T for the t-th generated token. The noise stands
for what tokens that are gone would have received.
Decided: the prompt's queries have t = 0. T is the length of the output in the paper, which nobody knows beforehand:
here it is `ramp_tokens`, and tau stays at tau_end afterwards. Noise is drawn per query head, query and key.
Differs: evicts in bursts of `period`; positions stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from engine.compression.base import Evidence
from engine.compression.h2o import H2O
from engine.compression.options import option
from engine.compression.registry import Hook, register


@register("keyformer", needs=(Hook.TEMPERATURES,))
@dataclass(frozen=True, kw_only=True)
class Keyformer(H2O):
    """H2O whose attention is noisy, so that tokens already dropped do not make others look important."""

    default_ratio: ClassVar[float | None] = 0.6

    recent_share: float = option(0.3, float, "share of the budget that is for the newest tokens", at_least=0, at_most=1)
    tau_start: float = option(1.0, float, "temperature during the prompt", at_least=0.01, at_most=100)
    tau_end: float = option(2.0, float, "temperature after ramp_tokens generated tokens", at_least=0.01, at_most=100)
    ramp_tokens: int = option(512, int, "generated tokens over which it changes", at_least=1, at_most=1048576)
    noise: bool = option(True, bool, "false: plain probabilities, as H2O, without temperatures")

    @property
    def evidence(self) -> Evidence:
        return Evidence(kind="noisy" if self.noise else "sum")

    def temperatures(self, positions: Tensor, num_prompt_tokens: int) -> Tensor:
        progress = ((positions - num_prompt_tokens + 1).float() / self.ramp_tokens).clamp(0, 1)
        return self.tau_start + progress * (self.tau_end - self.tau_start)
