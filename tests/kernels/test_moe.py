"""The grouped experts: every implementation against the definition, whatever the router chose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import backend, moe, testing

IMPLEMENTATIONS = testing.implementations("moe")


def inputs(
    tokens: int, experts: int, top_k: int, *, hidden: int = 40, size: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator)
    gate_up = torch.randn(experts, 2 * size, hidden, generator=generator) / hidden**0.5
    down = torch.randn(experts, hidden, size, generator=generator) / size**0.5
    chosen = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1)
    weights = chosen.values / chosen.values.sum(dim=1, keepdim=True)
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), weights.to(dtype), chosen.indices


def expected(*args: Tensor, activation: str = "silu") -> Tensor:
    with backend.using("reference"):
        return moe(*args, activation=activation)


def run(name: str, *args: Tensor, activation: str = "silu") -> Tensor:
    with backend.using(name):
        return moe(*(x.to(testing.device_of(name)) for x in args), activation=activation)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (1, 5, 1), (7, 128, 8), (33, 6, 2), (70, 2, 2)])
def test_agrees_with_the_definition(name: str, dtype: torch.dtype, tokens: int, experts: int, top_k: int) -> None:
    if not testing.runs_dtype(name, dtype):
        pytest.skip("the interpreter computes bfloat16 wrongly")
    args = inputs(tokens, experts, top_k, dtype=dtype)
    testing.assert_close(run(name, *args), expected(*args), factor=4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [20, 150])  # tiles of three heights
def test_all_tokens_may_choose_the_same_experts(name: str, tokens: int) -> None:
    *args, chosen = inputs(tokens, 8, 2)
    chosen[:] = torch.tensor([6, 1])
    testing.assert_close(run(name, *args, chosen), expected(*args, chosen), factor=4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_knows_the_activations_of_act_and_mul(name: str, activation: str) -> None:
    args = inputs(9, 4, 2)
    testing.assert_close(run(name, *args, activation=activation), expected(*args, activation=activation), factor=4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_takes_rows_that_lie_apart_and_weights_in_float32(name: str) -> None:
    x, gate_up, down, weights, chosen = inputs(9, 4, 2, dtype=torch.float16)
    found = run(name, testing.strided(x), gate_up, down, weights.float(), chosen)
    testing.assert_close(found, expected(x, gate_up, down, weights.float(), chosen), factor=4)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nan_stays_with_its_token(name: str) -> None:
    x, *others = inputs(9, 4, 2)
    x[3, 5] = torch.nan
    is_nan = run(name, x, *others).isnan().any(dim=1)
    assert is_nan.nonzero().flatten().tolist() == [3]


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="needs Triton")
def test_the_sort_of_triton_cuts_every_expert_into_blocks_and_keeps_the_order() -> None:
    from kernels.moe.triton_impl import _sorted_by_expert

    chosen = torch.tensor([2, 0, 2, 2, 5, 0, 2], device=testing.device_of("triton")).view(7, 1)
    counts, order, blocks = _sorted_by_expert(chosen, 6, num_blocks=6, rows=2)
    assert counts.tolist() == [2, 0, 4, 0, 0, 1]
    assert order.tolist() == [1, 5, 0, 2, 3, 6, 4]
    assert blocks.tolist() == [[0, 0, 2], [2, 2, 2], [2, 4, 2], [5, 6, 1], [-1, -1, -1], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "unknown activation 'relu'"),
        ({"x": torch.zeros(3, 8)}, "do not fit x"),
        ({"down": torch.zeros(4, 6, 5, dtype=torch.float16)}, "down must be contiguous torch.float32"),
        ({"experts": torch.zeros(3, 2, dtype=torch.int32)}, "experts must be"),
        ({"weights": torch.zeros(3, 1)}, "weights must be"),
        ({"experts": torch.zeros(2, 3, dtype=torch.int64).t()}, "must be contiguous"),
    ],
)
def test_disagreeing_inputs_are_refused_by_name(change: dict[str, object], message: str) -> None:
    args: dict[str, object] = {
        "x": torch.zeros(3, 6),
        "gate_up": torch.zeros(4, 10, 6),
        "down": torch.zeros(4, 6, 5),
        "weights": torch.zeros(3, 2),
        "experts": torch.zeros(3, 2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        moe(**{**args, **change})  # type: ignore[arg-type]
