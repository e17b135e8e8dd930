"""RoPE settings of a config.json, in the form of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`)."""

from __future__ import annotations

from typing import Any, get_args

from engine.errors import ConfigError
from engine.models.config import RopeConfig, RopeKind
from engine.models.fields import Fields

_OTHER_NAMES = {"su": "longrope"}  # early Phi-3 checkpoints
_PRETRAINED_LENGTH = ("llama3", "yarn", "longrope")  # kinds that refer to the length of pre-training


def parse_rope(
    fields: Fields, head_dim: int, *, theta: float = 10_000.0, other_names: dict[str, str] | None = None
) -> RopeConfig:
    """The one RoPE of a model whose layers share it. `theta` is the family's base where the file names none."""
    section = fields.section("rope_parameters" if "rope_parameters" in fields else "rope_scaling")
    return parse_rope_section(section, fields, head_dim, theta=theta, other_names=other_names)


def parse_rope_section(
    section: Fields, fields: Fields, head_dim: int, *, theta: float, other_names: dict[str, str] | None = None
) -> RopeConfig:
    """RoPE from `section`; what it lacks comes from the top level of the file (`fields`)."""
    kind = section.text("rope_type", section.text("type", "default"))
    kind = {**_OTHER_NAMES, **(other_names or {})}.get(kind, kind)
    if kind not in get_args(RopeKind):
        known = ", ".join(get_args(RopeKind))
        raise ConfigError(f"{section.where}: rope type {kind!r} is not supported; known: {known}")
    share = section.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0), high=1.0)
    max_positions = fields.integer("max_position_embeddings")
    rope: dict[str, Any] = {
        "kind": kind,
        "theta": section.number("rope_theta", fields.number("rope_theta", theta, low=1.001), low=1.001),
        "rot_dim": int(head_dim * share),
        "max_positions": max_positions,
        "factor": section.number("factor", low=1.0) if "factor" in section else None,
    }
    if rope["rot_dim"] < 2 or rope["rot_dim"] % 2:
        raise ConfigError(f"{section.where}: {rope['rot_dim']} of {head_dim} dimensions rotate, need an even number")
    if kind == "dynamic" and rope["rot_dim"] < 4:
        raise ConfigError(f"{section.where}: dynamic scaling needs at least 4 rotating dimensions")
    if kind in ("linear", "dynamic", "llama3") and rope["factor"] is None:
        raise ConfigError(f"{section.where}: factor is missing, {kind} scaling needs it")
    if kind in _PRETRAINED_LENGTH:
        # A top-level value wins: Phi-3 keeps it there.
        in_section = section.integer("original_max_position_embeddings", max_positions, low=2)
        rope["original_max_positions"] = fields.integer("original_max_position_embeddings", in_section, low=2)
    if kind == "llama3":
        rope["low_freq_factor"] = section.number("low_freq_factor", low=1e-6)
        rope["high_freq_factor"] = section.number("high_freq_factor", low=rope["low_freq_factor"] + 1e-6)
    if kind == "yarn":
        rope |= {
            "beta_fast": section.number("beta_fast", 32.0) or 32.0,
            "beta_slow": section.number("beta_slow", 1.0) or 1.0,
            "mscale": section.number("mscale", 0.0),
            "mscale_all_dim": section.number("mscale_all_dim", 0.0),
            "truncate": section.flag("truncate", True),
        }
    if kind in ("yarn", "longrope") and "attention_factor" in section:
        rope["attention_factor"] = section.number("attention_factor")
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            rope[name] = section.numbers(name)
            if len(rope[name]) != rope["rot_dim"] // 2:
                raise section.error(name, f"a list of {rope['rot_dim'] // 2} numbers")
    return RopeConfig(**rope)
