"""config.json -> DecoderConfig: family defaults, old spellings, and files that lie."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.models.config import DecoderConfig
from engine.models.fields import Fields, read_json
from engine.models.hf_config import architectures, load_config, parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def parse(architecture: str = "LlamaForCausalLM", **changes: Any) -> DecoderConfig:
    raw = {**LLAMA, "architectures": [architecture], **changes}
    return parse_config(Fields(raw, "config.json"))


def windows(config: DecoderConfig) -> list[int]:
    return [layer.window for layer in config.layers]


def test_every_family_of_the_design_is_known() -> None:
    families = "Llama Mistral Qwen2 Qwen3 Phi3 Gemma2 Gemma3 SmolLM3 Olmo2 Granite Mixtral Qwen2Moe Qwen3Moe Olmoe"
    assert set(architectures()) == {f"{name}ForCausalLM" for name in families.split()}


@pytest.mark.parametrize("architecture", architectures())
def test_the_smallest_file_of_each_family_parses(architecture: str) -> None:
    config = parse(architecture)
    assert config.num_layers == 4
    assert config.max_positions == 256


def test_absent_keys_take_the_defaults_of_the_family() -> None:
    assert parse().tied_embeddings is False
    assert parse().head_dim == 16
    assert parse().ropes[0].theta == 10_000.0
    assert parse("Qwen3ForCausalLM").head_dim == 128
    assert parse("Gemma2ForCausalLM").tied_embeddings is True
    assert parse("SmolLM3ForCausalLM").ropes[0].theta == 2_000_000.0
    assert parse("MixtralForCausalLM").ropes[0].theta == 1_000_000.0


def test_mistral_slides_by_default_and_null_turns_it_off() -> None:
    assert windows(parse("MistralForCausalLM")) == [4096] * 4
    assert windows(parse("MistralForCausalLM", sliding_window=None)) == [0] * 4


def test_qwen_slides_only_when_asked_and_from_max_window_layers_on() -> None:
    assert windows(parse("Qwen2ForCausalLM", sliding_window=8, max_window_layers=1)) == [0] * 4
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert windows(parse("Qwen2ForCausalLM", max_window_layers=1, **used)) == [0, 8, 8, 8]
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert windows(parse("Qwen2ForCausalLM", layer_types=types, **used)) == [8, 0, 0, 8]
    assert windows(parse("Qwen2MoeForCausalLM", max_window_layers=3, **used)) == [8, 0, 8, 0]


def test_gemma3_old_file_equals_new_file() -> None:
    old = parse(
        "Gemma3ForCausalLM",
        sliding_window=8,
        sliding_window_pattern=2,
        rope_theta=1e6,
        rope_local_base_freq=5e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = parse(
        "Gemma3ForCausalLM",
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
    )
    assert old == new
    assert [old.ropes[layer.rope or 0].theta for layer in old.layers] == [5e3, 1e6, 5e3, 1e6]


def test_phi3_calls_longrope_su_or_yarn_in_early_files() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for name in ("su", "yarn", "longrope"):
        config = parse("Phi3ForCausalLM", original_max_position_embeddings=64, rope_scaling={"type": name, **factors})
        assert config.ropes[0].kind == "longrope"
        assert config.ropes[0].original_max_positions == 64


def test_yarn_declares_the_stretched_context_where_the_file_has_the_short_one() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert parse(rope_scaling=rope).max_positions == 1024


def test_one_or_several_end_ids() -> None:
    assert parse(eos_token_id=7).eos_token_ids == (7,)
    assert parse(eos_token_id=[7, 9]).eos_token_ids == (7, 9)
    assert parse(eos_token_id=None).eos_token_ids == ()


def test_sparse_layers_follow_step_and_exceptions() -> None:
    config = parse("Qwen3MoeForCausalLM", decoder_sparse_step=2, mlp_only_layers=[3], num_local_experts=16)
    assert [layer.is_moe for layer in config.layers] == [False, True, False, False]
    assert config.moe is not None
    assert config.moe.num_experts == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"'GPT2LMHeadModel' has no native decoder; known: Gemma2.*transformers",
        ),
        ({"architectures": None}, "architectures is missing"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 1024, it is '1000000000'"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_act": "relu2"}, "activation 'relu2' is not supported"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id must be an integer or a list"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings must be an integer"),
    ],
)
def test_a_wrong_value_is_named_with_its_bound(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(Fields({**LLAMA, **changes}, "config.json"))


def test_encoders_and_unknown_layer_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="is an encoder"):
        parse("Gemma3ForCausalLM", use_bidirectional_attention=True)
    with pytest.raises(ConfigError, match="layer type 'linear_attention' is not supported"):
        parse("Qwen3ForCausalLM", layer_types=["linear_attention"] * 4)
    with pytest.raises(ConfigError, match="3 layers are described, num_hidden_layers is 4"):
        parse("Gemma2ForCausalLM", layer_types=["full_attention"] * 3)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = [
    *LLAMA,
    *("head_dim", "num_key_value_heads", "rope_scaling", "rope_parameters", "sliding_window", "layer_types"),
    *("eos_token_id", "tie_word_embeddings", "rms_norm_eps", "num_experts", "num_experts_per_tok", "mlp_only_layers"),
    *("decoder_sparse_step", "no_rope_layers", "sliding_window_pattern", "query_pre_attn_scalar", "dtype"),
]


@given(
    architecture=st.sampled_from(architectures()),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, min_size=1, max_size=3),
)
def test_any_file_gives_a_config_or_a_config_error(architecture: str, changes: dict[str, Any]) -> None:
    raw = {**LLAMA, "architectures": [architecture], **changes}
    try:
        config = parse_config(Fields(raw, "config.json"))
    except ConfigError:
        return
    assert config.num_layers <= 1024


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "must hold a JSON object"), ("[" * 10**5, "is not valid JSON")],
)
def test_broken_json_is_a_config_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"absent.json .* cannot be read: No such file"):
        read_json(tmp_path, "absent.json")


def test_parsing_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    program = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path\n"
        "from engine.models.hf_config import load_config\n"
        "from engine.models.layout import checkpoint_layout\n"
        "from engine.models.safetensors_file import read_checkpoint\n"
        "from engine.models.generation_config import load_generation_config\n"
        f"print(len(checkpoint_layout(load_config(Path({str(tmp_path)!r})))))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(result.stdout) == 3 + 4 * 6
