"""Adapter files: what is read from PEFT's format, and what is refused with a reason."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.errors import ConfigError
from engine.models.fields import Fields
from engine.models.hf_config import parse_config
from engine.models.lora_config import read_lora_config
from engine.models.lora_file import AdapterWeights, Target, adaptable, read_adapter
from tests.models.families import CASES
from tests.models.lora_adapters import ALL_LINEAR, random_pairs, write_adapter

CASE_OF = {case.name: case for case in CASES}


def targets_of(name: str) -> dict[str, Target]:
    config = CASE_OF[name].build().config
    fields = {**config.to_dict(), "architectures": [type(CASE_OF[name].build()).__name__]}
    return adaptable(parse_config(Fields(fields, "config.json")))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return CASE_OF["llama"].build()


@pytest.fixture(scope="module")
def targets() -> dict[str, Target]:
    return targets_of("llama")


@pytest.fixture(scope="module")
def pairs(llama: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    return random_pairs(llama, ALL_LINEAR, 4)


def read(folder: Path, targets: dict[str, Target]) -> AdapterWeights:
    return read_adapter(folder, targets, max_rank=64)


def test_fused_linears_get_one_part_per_projection(
    tmp_path: Path, targets: dict[str, Target], pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    weights = read(write_adapter(tmp_path, pairs, lora_alpha=6), targets)
    assert weights.rank == 4
    assert weights.num_bytes == sum(a.nbytes + b.nbytes for a, b in pairs.values())
    # 4 heads and 2 kv heads of 16
    layer = "model.layers.1"
    columns = {"q_proj": 0, "k_proj": 64, "v_proj": 96}
    found = {part.first_column: part for part in weights.parts["layers.1.qkv"]}
    assert sorted(found) == sorted(columns.values())
    for name, first in columns.items():
        a, b = pairs[f"{layer}.self_attn.{name}"]
        assert torch.equal(found[first].a, a)
        assert torch.equal(found[first].b, b)
        assert found[first].scale == 1.5
    assert [part.first_column for part in weights.parts["layers.1.gate_up"]] in ([0, 96], [96, 0])
    assert set(weights.parts) == {f"layers.{i}.{name}" for i in range(3) for name in ("qkv", "o", "gate_up", "down")}


def test_only_linears_of_attention_and_dense_feed_forwards_are_targets() -> None:
    dense, phi, experts = targets_of("llama"), targets_of("phi3"), targets_of("qwen3_moe")
    assert len(dense) == 3 * 7
    assert {name.split(".", 3)[3] for name in phi} == {
        *("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    assert "model.layers.1.mlp.up_proj" in experts  # the dense layer
    assert not [name for name in experts if "experts" in name or name.endswith(".gate") or "layers.0.mlp" in name]


def test_ranks_and_alphas_may_differ_by_module(
    tmp_path: Path, llama: PreTrainedModel, targets: dict[str, Target]
) -> None:
    pairs = {**random_pairs(llama, ["q_proj", "down_proj"], 4), **random_pairs(llama, ["layers.2.mlp.down_proj"], 9)}
    folder = write_adapter(
        tmp_path,
        pairs,
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={r"^model\.layers\.2\.mlp\.down_proj": 9},
        alpha_pattern={"layers.2.mlp.down_proj": 27, "q_proj": 2},
    )
    weights = read(folder, targets)
    assert weights.rank == 9
    scales = {name: parts[0].scale for name, parts in weights.parts.items()}
    assert scales["layers.2.down"] == 3.0
    assert scales["layers.0.down"] == 2.0
    assert scales["layers.0.qkv"] == scales["layers.2.qkv"] == 0.5
    write_adapter(tmp_path, random_pairs(llama, ["o_proj"], 4), use_rslora=True, lora_alpha=8)
    assert read(folder, targets).parts["layers.0.o"][0].scale == 8 / math.sqrt(4)


@pytest.mark.parametrize(
    ("prefix", "cut"),
    [("base_model.model.", ""), ("", ""), ("base_model.model.", "model.")],
    ids=["peft", "bare", "decoder"],
)
def test_names_may_lack_what_does_not_matter(
    tmp_path: Path, targets: dict[str, Target], pairs: dict[str, tuple[Tensor, Tensor]], prefix: str, cut: str
) -> None:
    """An adapter trained on the decoder without its head has no first "model."."""
    named = {name.removeprefix(cut): pair for name, pair in pairs.items()}
    assert len(read(write_adapter(tmp_path, named, prefix=prefix), targets).parts) == 12


def test_another_content_is_another_version(
    tmp_path: Path, targets: dict[str, Target], pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    digests = []
    for scale, alpha in ((1.0, 16), (1.0, 16), (1.001, 16), (1.0, 17)):
        scaled = {name: (a * scale, b) for name, (a, b) in pairs.items()}
        digests.append(read(write_adapter(tmp_path, scaled, lora_alpha=alpha), targets).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_16_bit_matrices_stay_16_bits_wide(
    tmp_path: Path, targets: dict[str, Target], pairs: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    typed = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in pairs.items()}
    part = read(write_adapter(tmp_path, typed), targets).parts["layers.0.o"][0]
    assert part.a.dtype == part.b.dtype == (torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "DoRA rescales"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"trainable_token_indices": [5]}, "token embeddings"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "no linear layers"),
        ({"layer_replication": [[0, 2]]}, "copies layers"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights; convert the adapter"),
        ({"init_lora_weights": "olora"}, "changes the base weights"),
        ({"r": 65}, "rank 65, the limit is 64; --max-lora-rank raises it"),
        ({"r": 0}, "r must be an integer from 1"),
        ({"r": "4"}, "r must be an integer"),
        ({"r": True}, "r must be an integer"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a number"),
        ({"use_rslora": 1}, "use_rslora must be true or false"),
        ({"rank_pattern": {"q_proj": 70}}, "rank 70, the limit is 64"),
        ({"rank_pattern": {"(a+)+$": 4}}, "no plain module name"),
        ({"alpha_pattern": {"q_proj": None}}, "q_proj is missing"),
        ({"alpha_pattern": [4]}, "alpha_pattern must be an object"),
        ({"target_modules": {"a": 1}}, "target_modules must be a list"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no weights for the target modules lm_head"),
        (
            {"r": 5},
            r"down_proj: A is \[4, 96\] and B \[64, 4\]; the base model and rank 5 need \[5, 96\] and \[64, 5\]",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    tmp_path: Path,
    targets: dict[str, Target],
    pairs: dict[str, tuple[Tensor, Tensor]],
    config: dict[str, Any],
    reason: str,
) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(write_adapter(tmp_path, pairs, **config), targets)


@pytest.mark.parametrize(
    "name",
    [
        *("base_model.model.lm_head.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"),
        *("base_model.model.model.embed_tokens.weight", "base_model.model.model.layers.0.input_layernorm.weight"),
        *("base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight", "x"),
        *("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", "a.lora_A.other.weight"),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
    ],
)
def test_tensors_that_are_no_pair_of_a_target_are_refused(
    tmp_path: Path, targets: dict[str, Target], pairs: dict[str, tuple[Tensor, Tensor]], name: str
) -> None:
    with pytest.raises(ConfigError, match="1 tensors that cannot be applied"):
        read(write_adapter(tmp_path, pairs, extra={name: torch.ones(4, 64)}), targets)


def test_incomplete_or_damaged_files_are_refused(
    tmp_path: Path, targets: dict[str, Target], pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    with pytest.raises(ConfigError, match=r"adapter_config\.json .* cannot be read"):
        read(tmp_path, targets)
    write_adapter(tmp_path, pairs)
    file = tmp_path / "adapter_model.safetensors"
    data = file.read_bytes()
    for wrong in (data[:-1], data[:4], b"", b"\xff" * 100, data + b"x"):
        file.write_bytes(wrong)
        with pytest.raises(ConfigError, match="damaged or no safetensors"):
            read(tmp_path, targets)
    file.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin is a pickle, which is never loaded"):
        read(tmp_path, targets)
    lonely = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}
    with pytest.raises(ConfigError, match=r"only one of A and B for model\.layers\.0\.self_attn\.q_proj"):
        read(write_adapter(tmp_path, {}, r=4, extra=lonely), targets)
    with pytest.raises(ConfigError, match="holds no tensors"):
        read(write_adapter(tmp_path, {}), targets)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a.fill_(float("nan")), "not finite"),
        (lambda a: a.fill_(float("inf")), "not finite"),
        (lambda a: a.to(torch.int32), "must be float32, float16 or bfloat16"),
        (lambda a: a.to(torch.float8_e4m3fn), "must be float32, float16 or bfloat16"),
        (lambda a: a[:, :-1], r"A is \[4, 63\]"),
    ],
)
def test_matrices_that_cannot_be_used_are_refused(
    tmp_path: Path, targets: dict[str, Target], pairs: dict[str, tuple[Tensor, Tensor]], change: Any, reason: str
) -> None:
    name = "model.layers.0.self_attn.q_proj"
    a, b = pairs[name]
    with pytest.raises(ConfigError, match=reason):
        read(write_adapter(tmp_path, {**pairs, name: (change(a.clone()), b)}), targets)


def test_a_file_larger_than_any_adapter_is_not_read(
    tmp_path: Path, targets: dict[str, Target], pairs: dict[str, tuple[Tensor, Tensor]]
) -> None:
    write_adapter(tmp_path, pairs)
    with (tmp_path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ConfigError, match="more than any adapter of rank 64 needs"):
        read(tmp_path, targets)


def test_fields_that_nobody_knows_are_told(
    tmp_path: Path, pairs: dict[str, tuple[Tensor, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(tmp_path, pairs, use_tomorrow=True, unused=None, eva_config={"rho": 2})
    with caplog.at_level(logging.WARNING):
        config = read_lora_config(tmp_path, max_rank=64)
    assert [record.getMessage() for record in caplog.records] == [
        "adapter_config.json has fields that are not known here and are ignored: use_tomorrow"
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == config.rank
