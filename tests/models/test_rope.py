"""RoPE tables against transformers, also at positions where rounding of the angles shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.errors import ConfigError
from engine.models import load_model
from engine.models.config import RopeConfig
from engine.models.fields import Fields
from engine.models.rope import build_rope_table
from engine.models.rope_config import parse_rope
from tests.models.families import HALF_DIM, LONG_FACTORS, llama_rope, save
from tests.models.paged_driver import prompt_logits

HEAD_DIM = 2 * HALF_DIM
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 1024, **LONG_FACTORS}
# (settings, positions, max_position_embeddings); transformers decides dynamic and longrope by the last position.
KINDS: list[tuple[dict[str, Any], int, int]] = [
    ({}, 5000, 4096),
    ({"rope_type": "linear", "factor": 3.0}, 5000, 4096),
    ({"rope_type": "dynamic", "factor": 3.0}, 4096, 4096),
    ({"rope_type": "dynamic", "factor": 3.0}, 9001, 4096),
    (LLAMA3, 8192, 8192),
    (YARN, 4096, 4096),
    ({**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0}, 4096, 4096),
    ({**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}, 4096, 4096),
    ({**YARN, "attention_factor": 1.3}, 4096, 4096),
    (LONGROPE, 4096, 4096),
    (LONGROPE, 1024, 4096),
    ({**LONGROPE, "factor": 16.0}, 1500, 4096),
    ({**LONGROPE, "attention_factor": 1.1}, 1500, 4096),
    ({"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5}, 5000, 4096),
]


def llama_fields(settings: dict[str, Any], max_positions: int) -> Fields:
    return Fields(
        {"max_position_embeddings": max_positions, "rope_parameters": {"rope_theta": 500_000.0, **settings}},
        "config.json",
    )


def id_of(kind: tuple[dict[str, Any], int, int]) -> str:
    settings, length, _ = kind
    return "-".join([*(f"{k}={v}" for k, v in settings.items() if not isinstance(v, list)), str(length)])


@pytest.mark.parametrize("kind", KINDS, ids=id_of)
def test_table_equals_transformers(kind: tuple[dict[str, Any], int, int]) -> None:
    settings, length, max_positions = kind
    config = LlamaConfig(
        head_dim=HEAD_DIM,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": 500_000.0, "rope_type": "default", **settings},
    )
    table = build_rope_table(parse_rope(llama_fields(settings, max_positions), HEAD_DIM), length).cos_sin
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    half = table.shape[1] // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{"rope_type": "linear", "factor": 3.0}, LLAMA3, YARN, LONGROPE])
def test_both_spellings_of_the_file_give_the_same_rope(settings: dict[str, Any]) -> None:
    new = llama_fields({**settings, "partial_rotary_factor": 1.0}, 8192)
    old = Fields(
        {
            "max_position_embeddings": 8192,
            "rope_theta": 500_000.0,
            "partial_rotary_factor": 1.0,
            "rope_scaling": {**settings, "type": settings["rope_type"]},
        },
        "config.json",
    )
    del old.raw["rope_scaling"]["rope_type"]
    assert parse_rope(old, HEAD_DIM) == parse_rope(new, HEAD_DIM)


def test_top_level_length_of_pretraining_wins() -> None:
    fields = llama_fields(LONGROPE, 8192)
    phi = Fields({**fields.raw, "original_max_position_embeddings": 77}, "config.json")
    assert parse_rope(phi, HEAD_DIM).original_max_positions == 77


def test_longrope_says_which_factors_it_took_and_why() -> None:
    rope = parse_rope(llama_fields(LONGROPE, 4096), HEAD_DIM)
    assert build_rope_table(rope, 1024).choice == "longrope, short factors because max_model_len 1024 <= 1024"
    assert build_rope_table(rope, 1025).choice == "longrope, long factors because max_model_len 1025 > 1024"


def test_dynamic_scaling_starts_beyond_the_declared_length() -> None:
    rope = RopeConfig(kind="dynamic", theta=10_000.0, rot_dim=HEAD_DIM, max_positions=100, factor=4.0)
    default = RopeConfig(theta=10_000.0, rot_dim=HEAD_DIM, max_positions=100)
    torch.testing.assert_close(build_rope_table(rope, 100).cos_sin, build_rope_table(default, 100).cos_sin)
    assert not torch.allclose(build_rope_table(rope, 200).cos_sin, build_rope_table(default, 200).cos_sin)


@torch.inference_mode()
def test_dynamic_model_beyond_its_declared_length_equals_transformers(tmp_path: Path) -> None:
    """Where the sequence is as long as max_model_len both libraries take the same base."""
    case = llama_rope("dynamic", rope_type="dynamic", factor=4.0)
    case.options["max_position_embeddings"] = 32
    reference = case.build()
    token_ids = torch.randint(3, 128, (80,), generator=torch.Generator().manual_seed(0))
    model = load_model(save(reference, tmp_path), dtype="float32", max_model_len=80)
    expected = reference(token_ids[None], use_cache=False).logits[0]
    actual = prompt_logits(model, token_ids.tolist(), first_chunk=41)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match=r"max_model_len is 129, .* ends at 128"):
        load_model(tmp_path, max_model_len=129)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_type": "spiral"}, "rope type 'spiral' is not supported; known: default, linear"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": "two"}, "factor must be a number"),
        ({"partial_rotary_factor": 0.19}, "3 of 16 dimensions rotate"),
        ({**LONGROPE, "short_factor": [1.0]}, "short_factor must be a list of 8 numbers"),
        ({**LLAMA3, "high_freq_factor": 0.5}, "high_freq_factor must be a number"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rope(llama_fields(settings, 4096), HEAD_DIM)
