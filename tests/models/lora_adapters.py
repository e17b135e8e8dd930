"""Random adapters in PEFT's file format for tiny transformers models, and the same adapters merged into the weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linears(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linears whose names end in one of `targets`."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name == t or name.endswith(f".{t}") for t in targets)
    }
    assert found, f"{targets} are not in the model"
    return found


def random_pairs(
    model: PreTrainedModel, targets: Sequence[str], rank: int, *, seed: int = 0, strength: float = 0.5
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A [R, K] and B [N, R], large enough to change the answers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, module.in_features, generator=generator) * strength / module.in_features**0.5,
            torch.randn(module.out_features, rank, generator=generator) * strength / rank**0.5,
        )
        for name, module in linears(model, targets).items()
    }


def write_adapter(
    folder: Path,
    pairs: dict[str, tuple[Tensor, Tensor]],
    *,
    prefix: str = "base_model.model.",
    extra: dict[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """adapter_config.json and adapter_model.safetensors. config: fields that differ from a plain adapter's."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = next(iter(pairs.values()))[0].shape[0] if pairs else 8
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in pairs}),
        "bias": "none",
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
        "init_lora_weights": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {
        f"{prefix}{name}.lora_{half}.weight": matrix.contiguous()
        for name, pair in pairs.items()
        for half, matrix in zip("AB", pair, strict=True)
    }
    safetensors.torch.save_file({**tensors, **(extra or {})}, folder / "adapter_model.safetensors")
    return folder


def random_adapter(
    folder: Path,
    model: PreTrainedModel,
    *,
    rank: int = 4,
    targets: Sequence[str] = ALL_LINEAR,
    seed: int = 0,
    **config: Any,
) -> tuple[Path, PreTrainedModel]:
    """A written adapter, and the model with it merged into the weights."""
    pairs = random_pairs(model, targets, rank, seed=seed)
    write_adapter(folder, pairs, **config)
    alpha = config.get("lora_alpha", 16)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return folder, merged(model, pairs, scale)


def merged(
    model: PreTrainedModel, pairs: dict[str, tuple[Tensor, Tensor]], scale: float | dict[str, float]
) -> PreTrainedModel:
    """A copy whose weights are W + scale * B A."""
    result = copy.deepcopy(model)
    modules = dict(result.named_modules())
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            factor = scale[name] if isinstance(scale, dict) else scale
            modules[name].weight.add_(factor * (b.double() @ a.double()).float())  # type: ignore[union-attr, operator]
    return result
