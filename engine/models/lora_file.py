"""A PEFT adapter folder -> the low-rank parts of our fused linears, by their names in engine.models.layout.

The files are read once, so that the digest belongs to the weights. No pickles, no code from the adapter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from engine.errors import ConfigError
from engine.models.config import DecoderConfig
from engine.models.layout import checkpoint_layout
from engine.models.lora_config import CONFIG_FILE, AdapterConfig, read_lora_config
from kernels import LoraPart

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 16 * 1024 * 1024
DIGEST_CHARS = 16
_MAX_ITEM_BYTES = 8
_NAMES_IN_ERROR = 5
# base_model.model.<module>.lora_A.weight, as save_pretrained writes it; older files name the adapter: lora_A.default
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>[\w.]+?)\.lora_(?P<half>[AB])(?:\.default)?\.weight")


class Target(NamedTuple):
    """Where the adapter of one checkpoint module adds: rows [first, first + num_columns) of a fused weight [N, K]."""

    linear: str  # name in engine.models.layout, for instance "layers.0.qkv"
    first_column: int
    num_columns: int
    in_features: int


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter as read from its folder, on the CPU."""

    digest: str  # of both files: another content is another version
    rank: int  # the largest of its parts
    parts: dict[str, list[LoraPart]]  # linear -> its parts

    @property
    def num_bytes(self) -> int:
        return sum(part.a.nbytes + part.b.nbytes for parts in self.parts.values() for part in parts)


def adaptable(config: DecoderConfig) -> dict[str, Target]:
    """Checkpoint modules that an adapter may target: the linears of attention and of dense feed-forwards."""
    targets = {}
    for name, stack in checkpoint_layout(config).items():
        parts = name.split(".")
        if len(parts) != 3 or parts[2] not in ("qkv", "o", "gate_up", "down"):
            continue  # no linear, or one of a mixture of experts
        first = 0
        for tensor, (num_rows, width) in stack.parts:
            targets[tensor.removesuffix(".weight")] = Target(name, first, num_rows, width)
            first += num_rows
    return targets


def read_adapter(folder: Path, targets: Mapping[str, Target], *, max_rank: int) -> AdapterWeights:
    """Reads and checks an adapter. Raises ConfigError that names what cannot be honoured.

    targets   of `adaptable`
    """
    config = read_lora_config(folder, max_rank=max_rank)
    data = _read_weights(folder, targets, max_rank)
    digest = hashlib.sha256((folder / CONFIG_FILE).read_bytes())
    digest.update(hashlib.sha256(data).digest())
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(f"{WEIGHTS_FILE} is damaged or no safetensors file: {error}") from None
    pairs = _pairs(tensors, targets)
    if missing := config.untouched(pairs):
        raise ConfigError(f"{WEIGHTS_FILE} has no weights for the target modules {_listed(missing)}")
    parts: dict[str, list[LoraPart]] = {}
    for module, (a, b) in pairs.items():
        target = targets[module]
        parts.setdefault(target.linear, []).append(_part(module, target, a, b, config))
    rank = max(part.a.shape[0] for own in parts.values() for part in own)
    return AdapterWeights(digest.hexdigest()[:DIGEST_CHARS], rank, parts)


def _read_weights(folder: Path, targets: Mapping[str, Target], max_rank: int) -> bytes:
    path = folder / WEIGHTS_FILE
    largest = sum(target.in_features + target.num_columns for target in targets.values()) * max_rank * _MAX_ITEM_BYTES
    try:
        size = path.stat().st_size
        if size > largest + MAX_HEADER_BYTES:
            raise ConfigError(f"{WEIGHTS_FILE} has {size} bytes, more than any adapter of rank {max_rank} needs")
        return path.read_bytes()
    except OSError as error:
        pickled = sorted(found.name for found in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never loaded: save it as safetensors" if pickled else ""
        raise ConfigError(f"{WEIGHTS_FILE} cannot be read: {error.strerror}{hint}") from None


def _pairs(tensors: Mapping[str, Tensor], targets: Mapping[str, Target]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> its A and B. Every tensor of the file must be one of these."""
    halves: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for name in sorted(tensors):  # the library gives them in no order
        found = _TENSOR.fullmatch(name)
        module = _module(found["module"], targets) if found else None
        if found is None or module is None:
            foreign.append(name)
        else:
            halves.setdefault(module, {})[found["half"]] = tensors[name]
    if foreign:
        raise ConfigError(
            f"{WEIGHTS_FILE} has {len(foreign)} tensors that cannot be applied (only A and B of attention and dense "
            f"feed-forward projections can; no embedding, head, norm, bias or expert): {_listed(foreign)}"
        )
    if not halves:
        raise ConfigError(f"{WEIGHTS_FILE} holds no tensors")
    lonely = sorted(module for module, pair in halves.items() if len(pair) != 2)
    if lonely:
        raise ConfigError(f"{WEIGHTS_FILE} has only one of A and B for {_listed(lonely)}")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _module(name: str, targets: Mapping[str, Target]) -> str | None:
    """The checkpoint's name of a module: an adapter trained on the bare decoder lacks the first "model."."""
    return next((full for full in (name, f"model.{name}") if full in targets), None)


def _part(module: str, target: Target, a: Tensor, b: Tensor, config: AdapterConfig) -> LoraPart:
    rank = config.rank_of(module)
    if a.shape != (rank, target.in_features) or b.shape != (target.num_columns, rank):
        raise ConfigError(
            f"{module}: A is {list(a.shape)} and B {list(b.shape)}; the base model and rank {rank} need "
            f"[{rank}, {target.in_features}] and [{target.num_columns}, {rank}]"
        )
    if not (a.is_floating_point() and b.is_floating_point()) or min(a.element_size(), b.element_size()) < 2:
        raise ConfigError(f"{module}: A is {a.dtype} and B {b.dtype}; they must be float32, float16 or bfloat16")
    dtype = a.dtype if a.dtype == b.dtype and a.dtype != torch.float64 else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ConfigError(f"{module}: A or B holds values that are not finite")
    return LoraPart(a, b, config.scale_of(module), target.first_column)


def _listed(names: Iterable[str]) -> str:
    shown = [name[:120] for name in names]
    more = f" and {len(shown) - _NAMES_IN_ERROR} more" if len(shown) > _NAMES_IN_ERROR else ""
    return ", ".join(shown[:_NAMES_IN_ERROR]) + more
