"""The model, and the miniatures under names that only these tests know."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engine.compression import registry
from engine.launch import resolve_model_path
from engine.models import load_model
from engine.models.batch import Model
from tests.compression.hook_users.rewriting import ACT, CoreContext, Landmark, PoD, QuickSilver, Steering
from tests.compression.hook_users.selecting import DoubleSparsity, QuestByHook, TidalDecode, TokenButler, TokenSelect

MINIATURES = {
    "quest_by_hook": QuestByHook,
    "tidal_decode": TidalDecode,
    "token_select": TokenSelect,
    "double_sparsity": DoubleSparsity,
    "token_butler": TokenButler,
    "act": ACT,
    "pod": PoD,
    "landmark": Landmark,
    "cca": CoreContext,
    "quick_silver": QuickSilver,
    "steering": Steering,
}


@pytest.fixture(scope="package")
def mimir() -> Model:
    return load_model(resolve_model_path("mimir"), device=torch.device("cpu"), max_model_len=512)


@pytest.fixture(scope="package", autouse=True)
def miniatures(mimir: Model) -> Iterator[None]:
    """Registered, and with artefacts: channels by an ordering of their own, a predictor from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    spec, hidden_size = mimir.spec, mimir.embed(torch.zeros(1, dtype=torch.int64)).shape[1]  # type: ignore[attr-defined]
    order = [torch.randperm(spec.head_dim, generator=generator) for _ in range(spec.num_layers * spec.num_kv_heads)]
    DoubleSparsity.channels = torch.stack(order).view(spec.num_layers, spec.num_kv_heads, -1)
    TokenButler.num_layers, TokenButler.num_kv_heads = spec.num_layers, spec.num_kv_heads
    width = spec.num_layers * spec.num_kv_heads * 8
    TokenButler.maps = tuple(torch.randn(hidden_size, width, generator=generator) for _ in range(2))  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_entries", dict(registry._entries))
        for name, policy in MINIATURES.items():
            registry.register(name)(policy)
        yield
