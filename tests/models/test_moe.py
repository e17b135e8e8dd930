"""The mixture of experts against its definition, token by token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models import decoder, load_model
from engine.models.config import MoEConfig
from engine.models.moe import GroupedExperts, MixtureOfExperts, SeparateExperts, stack
from tests.models.paged_driver import prompt_logits

HIDDEN = 16
NUM_EXPERTS = 7


def linear(out_features: int, seed: int) -> Tensor:
    return torch.randn(out_features, HIDDEN, generator=torch.Generator().manual_seed(seed))


ROUTER = linear(NUM_EXPERTS, 0)
EXPERTS = [linear(HIDDEN, 1 + expert) for expert in range(NUM_EXPERTS)]
SHARED, SHARED_GATE = linear(HIDDEN, 50), linear(1, 51)


def build(top_k: int, *, normalize: bool, shared: bool) -> MixtureOfExperts:
    return MixtureOfExperts(
        MoEConfig(
            num_experts=NUM_EXPERTS,
            top_k=top_k,
            intermediate_size=1,
            normalize_weights=normalize,
            shared_intermediate_size=int(shared),
        ),
        router=lambda x: F.linear(x, ROUTER),
        experts=SeparateExperts([lambda x, weight=weight: F.linear(x, weight) for weight in EXPERTS]),
        shared=(lambda x: F.linear(x, SHARED)) if shared else None,
        shared_gate=(lambda x: F.linear(x, SHARED_GATE)) if shared else None,
    )


def definition(x: Tensor, top_k: int, *, normalize: bool, shared: bool) -> Tensor:
    rows = []
    for token in x:
        probabilities = (ROUTER @ token).softmax(0)
        chosen = probabilities.argsort(descending=True)[:top_k].tolist()
        scale = sum(float(probabilities[e]) for e in chosen) if normalize else 1.0
        row = sum((probabilities[e] / scale * (EXPERTS[e] @ token) for e in chosen), torch.zeros(HIDDEN))
        if shared:
            row = row + torch.sigmoid(SHARED_GATE @ token) * (SHARED @ token)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("num_tokens", [1, 2, 33, 512])
@pytest.mark.parametrize(("top_k", "normalize", "shared"), [(1, False, False), (2, True, False), (3, False, True)])
def test_output_equals_the_definition(num_tokens: int, top_k: int, normalize: bool, shared: bool) -> None:
    x = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    actual = build(top_k, normalize=normalize, shared=shared)(x)
    torch.testing.assert_close(actual, definition(x, top_k, normalize=normalize, shared=shared), rtol=1e-4, atol=1e-5)


def test_each_expert_runs_once_and_only_when_chosen() -> None:
    calls: list[tuple[int, int]] = []
    moe = build(2, normalize=True, shared=False)
    moe.experts = SeparateExperts(
        [lambda x, expert=expert: calls.append((expert, x.shape[0])) or x for expert in range(NUM_EXPERTS)]
    )
    moe(torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(0)))
    assert len({expert for expert, _ in calls}) == len(calls) <= NUM_EXPERTS
    assert sum(count for _, count in calls) == 2 * 64
    calls.clear()
    moe(torch.randn(1, HIDDEN))
    assert [count for _, count in calls] == [1, 1]


def test_grouped_experts_give_what_separate_ones_give() -> None:
    generator = torch.Generator().manual_seed(3)
    gate_up = torch.randn(NUM_EXPERTS, 10, HIDDEN, generator=generator)
    down = torch.randn(NUM_EXPERTS, HIDDEN, 5, generator=generator)

    def mlp(x: Tensor, expert: int) -> Tensor:
        gate, up = F.linear(x, gate_up[expert]).chunk(2, dim=1)
        return F.linear(F.silu(gate) * up, down[expert])

    separate = SeparateExperts([lambda x, expert=expert: mlp(x, expert) for expert in range(NUM_EXPERTS)])
    stacks = (stack(iter(matrices), NUM_EXPERTS, matrices.device) for matrices in (gate_up, down))
    grouped = GroupedExperts(*stacks, "silu")
    x = torch.randn(33, HIDDEN, generator=generator)
    moe = build(3, normalize=True, shared=True)
    found = []
    for experts in (separate, grouped):
        moe.experts = experts
        found.append(moe(x))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert grouped.nbytes == gate_up.nbytes + down.nbytes


def test_a_decoder_with_grouped_experts_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built on GPUs, on the CPU."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = []
    for is_grouped in (False, True):
        if is_grouped:
            monkeypatch.setattr(decoder._Builder, "_experts", decoder._Builder._grouped_experts)
        model = load_model(tmp_path, load_format="dummy")
        found.append((prompt_logits(model, list(range(1, 20)), first_chunk=7), model.weight_bytes))
    assert "2 grouped_experts_float32" in model.description()["linears"]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-4)
