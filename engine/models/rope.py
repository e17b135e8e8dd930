"""Tables of rotary position embeddings: RoFormer (arXiv:2104.09864) and the ways to stretch it.

linear (arXiv:2306.15595), dynamic NTK, llama3 (Llama 3.1), yarn (arXiv:2309.00071), longrope (arXiv:2402.13753). Angles
are computed in fp32 in the order of transformers, so that tables agree with it bit for bit also at large positions.

A paged cache holds rotated keys that outlive a request's growth, so nothing here may change with the length of a
sequence, where transformers re-decides at every step. Two kinds depend on that length and are decided once, by the
server's max_model_len: longrope takes its long factors when max_model_len exceeds the length of pre-training, else the
short ones; dynamic takes the base that transformers uses for a sequence of max_model_len tokens. Serve with a smaller
max_model_len to get the short form. `RopeTable.choice` says what was decided.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.config import RopeConfig


@dataclass(frozen=True)
class RopeTable:
    """cos_sin [P, rot_dim] fp32: row p is cos of the rot_dim / 2 angles of position p, then their sin, scaled."""

    cos_sin: Tensor
    choice: str  # for the start-up report


def build_rope_table(rope: RopeConfig, max_model_len: int, device: torch.device | str = "cpu") -> RopeTable:
    """The table for positions 0 .. max_model_len - 1."""
    inv_freq, scale, choice = inverse_frequencies(rope, max_model_len)
    angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inv_freq  # [P, rot_dim / 2]
    cos_sin = torch.empty(max_model_len, rope.rot_dim)
    torch.cos(angles, out=cos_sin[:, : rope.rot_dim // 2])
    torch.sin(angles, out=cos_sin[:, rope.rot_dim // 2 :])
    if scale != 1.0:
        cos_sin *= scale
    return RopeTable(cos_sin.to(device), choice)


def inverse_frequencies(rope: RopeConfig, max_model_len: int) -> tuple[Tensor, float, str]:
    """Angle per position [rot_dim / 2] fp32, factor on cos and sin, and what was decided in words."""
    exponents = torch.arange(0, rope.rot_dim, 2, dtype=torch.float32) / rope.rot_dim
    match rope.kind:
        case "default":
            return 1.0 / rope.theta**exponents, 1.0, "default"
        case "linear":
            assert rope.factor is not None
            return (1.0 / rope.theta**exponents) / rope.factor, 1.0, f"linear, factor {rope.factor:g}"
        case "dynamic":
            return _dynamic(rope, exponents, max_model_len)
        case "llama3":
            assert rope.factor is not None
            return _llama3(rope, exponents, rope.factor), 1.0, f"llama3, factor {rope.factor:g}"
        case "yarn":
            return _yarn(rope, exponents)
        case "longrope":
            return _longrope(rope, exponents, max_model_len)


def _dynamic(rope: RopeConfig, exponents: Tensor, max_model_len: int) -> tuple[Tensor, float, str]:
    assert rope.factor is not None
    length = max(max_model_len, rope.max_positions)
    stretch = rope.factor * length / rope.max_positions - (rope.factor - 1)
    base = rope.theta * stretch ** (rope.rot_dim / (rope.rot_dim - 2))
    return 1.0 / base**exponents, 1.0, f"dynamic, base {base:.0f} for {length} tokens"


def _llama3(rope: RopeConfig, exponents: Tensor, factor: float) -> Tensor:
    """Divide long wavelengths by the factor, keep short ones, blend between."""
    inv_freq = 1.0 / rope.theta**exponents
    wavelength = 2 * math.pi / inv_freq
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = (rope.original_max_positions / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > rope.original_max_positions / low, inv_freq / factor, blended)
    return torch.where(wavelength < rope.original_max_positions / high, inv_freq, scaled)


def _yarn(rope: RopeConfig, exponents: Tensor) -> tuple[Tensor, float, str]:
    """Interpolate dimensions that turn less than beta_slow times, keep those above beta_fast, ramp between."""
    factor = rope.factor or rope.max_positions / rope.original_max_positions
    wavelength = rope.theta**exponents  # over 2 pi
    low, high = _yarn_bound(rope, rope.beta_fast), _yarn_bound(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rot_dim - 1)
    ramp = (torch.arange(rope.rot_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    inv_freq = 1.0 / (factor * wavelength) * (1 - keep) + 1.0 / wavelength * keep
    scale = rope.attention_factor
    if scale is None and rope.mscale and rope.mscale_all_dim:
        scale = _yarn_scale(factor, rope.mscale) / _yarn_scale(factor, rope.mscale_all_dim)
    elif scale is None:
        scale = _yarn_scale(factor, 1.0)
    return inv_freq, scale, f"yarn, factor {factor:g}"


def _yarn_bound(rope: RopeConfig, rotations: float) -> float:
    """Dimension that turns `rotations` times over the length of pre-training (YaRN, section 3.2)."""
    turns = math.log(rope.original_max_positions / (rotations * 2 * math.pi))
    return rope.rot_dim * turns / (2 * math.log(rope.theta))


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: RopeConfig, exponents: Tensor, max_model_len: int) -> tuple[Tensor, float, str]:
    original = rope.original_max_positions
    is_long = max_model_len > original
    factors = torch.tensor(rope.long_factor if is_long else rope.short_factor, dtype=torch.float32)
    factor = rope.factor or rope.max_positions / original
    scale = rope.attention_factor
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    name, relation = ("long", ">") if is_long else ("short", "<=")
    choice = f"longrope, {name} factors because max_model_len {max_model_len} {relation} {original}"
    return 1.0 / (factors * rope.theta**exponents), scale, choice
