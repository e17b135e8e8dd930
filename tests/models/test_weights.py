"""Loading: names and shapes checked first, one weight in memory at a time, the same values in every form of file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ConfigError
from engine.models import load_model
from engine.models.hf_config import load_config
from engine.models.layout import checkpoint_layout
from engine.models.weights import CheckpointWeights, DummyWeights, num_parameters
from tests.models.families import Case, save
from tests.models.paged_driver import prompt_logits

CASE = Case("llama", "Llama", {"num_hidden_layers": 2})
TOKEN_IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(CASE.build(), tmp_path_factory.mktemp("llama"))


def edited(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the checkpoint whose tensors `edit` has changed."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


def test_fused_weights_are_the_checkpoint_tensors_on_top_of_each_other(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weights = CheckpointWeights(folder, load_config(folder))
    at = "model.layers.1.self_attn"
    expected = torch.cat([tensors[f"{at}.{name}_proj.weight"] for name in "qkv"])
    torch.testing.assert_close(weights.take("layers.1.qkv"), expected, rtol=0, atol=0)


def test_progress_ends_at_the_bytes_of_the_checkpoint(folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_model(folder, progress=lambda done, total: calls.append((done, total)))
    tensors = load_file(folder / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (total, total)
    assert len(calls) == len(tensors)


def test_missing_unexpected_and_misshaped_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.extra"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(65)
        tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(64, dtype=torch.int8)
        del tensors["lm_head.weight"]

    with pytest.raises(ConfigError) as caught:
        load_model(edited(folder, tmp_path, edit))
    message = str(caught.value)
    assert "1 missing: lm_head.weight" in message
    assert "1 unexpected: model.layers.0.mlp.extra" in message
    assert "1 of another shape: model.norm.weight [65] instead of [64]" in message
    assert "model.layers.0.input_layernorm.weight I8" in message


def test_tensors_that_old_checkpoints_carry_along_are_ignored(folder: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    load_model(edited(folder, tmp_path, edit))


@torch.inference_mode()
def test_mixed_and_64_bit_tensors_load_as_their_values(folder: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "k_proj" in name or "norm" in name:
                tensors[name] = tensors[name].double()

    expected = prompt_logits(load_model(folder), TOKEN_IDS, first_chunk=9)
    actual = prompt_logits(load_model(edited(folder, tmp_path, edit)), TOKEN_IDS, first_chunk=9)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_file_cut_while_it_is_read_is_reported(folder: Path, tmp_path: Path) -> None:
    copy = edited(folder, tmp_path, lambda tensors: None)
    weights = CheckpointWeights(copy, load_config(copy))
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match="ended early"):
        [weights.take(name) for name in checkpoint_layout(load_config(copy))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_depend_on_seed_and_name_only(folder: Path, dtype: torch.dtype) -> None:
    config = load_config(folder)
    first, second, other = (DummyWeights(config, dtype, seed) for seed in (1, 1, 2))
    names = list(checkpoint_layout(config))
    taken = {name: first.take(name) for name in names}
    for name in reversed(names):
        assert torch.equal(second.take(name), taken[name])
    assert not torch.equal(other.take("layers.0.qkv"), taken["layers.0.qkv"])
    assert not torch.equal(taken["layers.0.qkv"], taken["layers.1.qkv"])
    assert taken["layers.0.down"].float().std().item() == pytest.approx(96**-0.5, rel=0.05)


@torch.inference_mode()
def test_a_dummy_model_runs_from_its_config_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    logits = [
        prompt_logits(load_model(tmp_path, load_format="dummy", seed=seed), TOKEN_IDS, first_chunk=9)
        for seed in (0, 0, 1)
    ]
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_parameters_are_counted_as_transformers_counts_them(folder: Path) -> None:
    assert num_parameters(load_config(folder)) == CASE.build().num_parameters()


def test_unknown_options_and_folders_are_config_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is 'int3', known are auto, float32"):
        load_model(folder, dtype="int3")
    with pytest.raises(ConfigError, match="load_format is 'pickle'"):
        load_model(folder, load_format="pickle")
    with pytest.raises(ConfigError, match="model folder 'absent' does not exist"):
        load_model(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"max_model_len is 257, .* ends at 256"):
        load_model(folder, max_model_len=257)


MEMORY_PROGRAM = """
import sys
from pathlib import Path

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

import torch
torch.set_num_threads(1)
from engine.models import load_model
load_model(sys.argv[1])  # small: imports and the kernel library are in memory afterwards
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
model = load_model(sys.argv[2])
print(status("VmHWM") - before, status("VmRSS") - before, model.weight_bytes)
"""


def test_loading_needs_the_model_and_one_weight_of_memory(folder: Path, tmp_path: Path) -> None:
    """Peak resident memory of a 16-bit checkpoint: what stays afterwards and the largest weight, in fp32 at most."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "vocab_size": 4096}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layout = checkpoint_layout(load_config(tmp_path))
    parts = [part for stack in layout.values() for part in stack.parts]
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05) for name, shape in parts}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(torch.Size(stack.shape).numel() for stack in layout.values()) * 4
    assert stored > 8 * largest
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(folder), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    peak, resident, kept = map(int, result.stdout.split())
    assert peak < resident + 1.5 * largest
    assert resident < 1.5 * stored  # the kernels may round each weight up to whole large pages
    assert kept < 1.1 * stored
