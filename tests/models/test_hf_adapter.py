"""The transformers adapter: families that the native decoder does not know, and models that it must refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from engine.errors import ConfigError
from engine.models import load_model
from engine.models.batch import KVSpec
from tests.e2e.driving import greedy
from tests.models.families import CASES, SIZES, VOCAB, randomize_vectors, save
from tests.models.paged_driver import prompt_logits

TOLERANCE = 1e-4
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPT2Config": GPT2,  # absolute positions
    "GPTNeoXConfig": {**SIZES, "rotary_pct": 0.25},  # Pythia: partial rotary, parallel blocks
    "StableLmConfig": SIZES,
    "Cohere2Config": {**SIZES, "sliding_window": 8, "head_dim": 16, "num_hidden_layers": 4, "logit_scale": 0.3},
    "GptOssConfig": {**SIZES, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "DeepseekV3Config": {  # keys wider than values
        **SIZES,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
    },
}


def build(config_name: str, options: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize_vectors(model)
    return model.eval()


@torch.inference_mode()
@pytest.mark.parametrize("config_name", FAMILIES)
def test_adapted_model_equals_transformers(config_name: str, tmp_path: Path) -> None:
    reference = build(config_name, FAMILIES[config_name])
    model = load_model(save(reference, tmp_path))
    assert "transformers adapter" in model.description()["architecture"]
    prompts = [torch.randint(3, VOCAB, (count,)).tolist() for count in (17, 3, 26)]
    expected = reference(torch.tensor([prompts[2]]), use_cache=False).logits[0]
    torch.testing.assert_close(prompt_logits(model, prompts[2], first_chunk=11), expected, rtol=0, atol=TOLERANCE)
    for prompt, output in zip(prompts, greedy(model, prompts, 64), strict=True):
        logits = reference(torch.tensor([prompt + output[:-1]]), use_cache=False).logits[0]
        assert output == logits[len(prompt) - 1 :].argmax(dim=-1).tolist()


@torch.inference_mode()
def test_a_native_family_runs_through_the_adapter_too(tmp_path: Path) -> None:
    reference = next(case for case in CASES if case.name == "gemma2").build()
    save(reference, tmp_path)
    native, adapted = load_model(tmp_path), load_model(tmp_path, kind="transformers")
    assert native.spec == adapted.spec
    assert native.logits_size == adapted.logits_size
    token_ids = list(range(3, 60))
    actual, expected = (prompt_logits(model, token_ids, first_chunk=20) for model in (adapted, native))
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_what_the_engine_asks_of_a_model_is_there(tmp_path: Path) -> None:
    reference = build("GPT2Config", GPT2)
    save(reference, tmp_path)
    calls: list[tuple[int, int]] = []
    model = load_model(tmp_path, progress=lambda done, total: calls.append((done, total)), max_model_len=100)
    assert model.spec == KVSpec(num_layers=2, num_kv_heads=4, head_dim=16, head_dim_v=16)
    assert (model.vocab_size, model.logits_size, model.max_model_len) == (VOCAB, VOCAB, 100)
    assert model.eos_token_ids == (2,)
    assert model.dtype_name == "float32"
    assert model.weight_bytes == sum(parameter.nbytes for parameter in reference.parameters())
    assert calls[-1] == (model.weight_bytes, model.weight_bytes)


@torch.inference_mode()
def test_dummy_weights_need_only_the_config(tmp_path: Path) -> None:
    build("GPT2Config", GPT2).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    model = load_model(tmp_path, load_format="dummy", seed=3)
    assert torch.isfinite(prompt_logits(model, list(range(30)), first_chunk=10)).all()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "BloomConfig": (
        {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "attention was found in 0 of its 2 layers",
    ),
    "MambaConfig": (
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2},
        "attention was found in 0 of its 2 layers",
    ),
    "BertConfig": ({**SIZES, "is_decoder": False}, "attention is not causal"),
}


@pytest.mark.parametrize("config_name", REFUSED)
def test_models_whose_attention_cannot_be_replaced_are_refused(config_name: str, tmp_path: Path) -> None:
    options, message = REFUSED[config_name]
    save(build(config_name, options), tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_model(tmp_path, max_model_len=64)


def test_a_model_that_mixes_tokens_outside_attention_is_found_out(tmp_path: Path) -> None:
    """Attention in every layer, and a state-space mixer beside it: only the comparison can tell."""
    options = {**SIZES, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
    save(build("FalconH1Config", options), tmp_path)
    with pytest.raises(ConfigError, match="does not give the same logits on a paged cache"):
        load_model(tmp_path)


def test_code_that_comes_with_a_checkpoint_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["EvilForCausalLM"],
                "model_type": "evil",
                "auto_map": {
                    "AutoConfig": "modeling_evil.EvilConfig",
                    "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
                },
            }
        )
    )
    with pytest.raises(ConfigError, match="the checkpoint brings its own code, which is never run"):
        load_model(tmp_path)
    assert not marker.exists()


def test_encoder_decoders_and_lossy_requests_are_refused(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=VOCAB, architectures=["T5ForConditionalGeneration"]).save_pretrained(
        tmp_path / "t5"
    )
    with pytest.raises(ConfigError, match="t5 is an encoder-decoder model"):
        load_model(tmp_path / "t5")
    gpt2 = save(build("GPT2Config", GPT2), tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="on CPU the transformers adapter computes in float32"):
        load_model(gpt2, dtype="bfloat16")
    with pytest.raises(ConfigError, match="deterministic mode needs a native decoder"):
        load_model(gpt2, deterministic=True)
    with pytest.raises(ConfigError, match=r"max_model_len is 257; .* serves at most 256"):
        load_model(gpt2, max_model_len=257)
    with pytest.raises(ConfigError, match="'GPT2LMHeadModel' has no native decoder"):
        load_model(gpt2, kind="native")


def test_tensors_that_transformers_would_make_up_are_an_error(tmp_path: Path) -> None:
    save(build("GPT2Config", GPT2), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors: transformer.h.1.mlp.c_fc.weight"):
        load_model(tmp_path)
