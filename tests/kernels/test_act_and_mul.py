"""Gated activations agree with a float64 definition, whatever the shape, the stride and the type."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import backend, testing

OP = "act_and_mul"


def inputs(num_tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens * 1000 + size)
    return (torch.randn(num_tokens, 2 * size, generator=generator) * 4).to(dtype)


def run(name: str, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    device = testing.device_of(name) if name != "reference" else torch.device("cpu")
    out = testing.nan_filled(*shape, dtype=gate_up.dtype, device=device)
    with backend.using(name):
        kernels.act_and_mul(gate_up.to(device), activation, out=out)
    return out.cpu()


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(0, 8), (1, 1), (7, 20), (33, 64), (2, 1031)])
def test_agrees_with_the_definition(name: str, activation: str, dtype: torch.dtype, num_tokens: int, size: int) -> None:
    if not testing.runs_dtype(name, dtype):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    gate_up = inputs(num_tokens, size, dtype)
    testing.assert_close(run(name, gate_up, activation), run("reference", gate_up, activation))


@pytest.mark.parametrize("name", testing.implementations(OP))
def test_takes_strided_rows(name: str) -> None:
    gate_up = testing.strided(inputs(5, 12, torch.float32))
    testing.assert_close(run(name, gate_up, "silu"), run("reference", gate_up, "silu"))


def test_the_native_result_of_a_row_does_not_depend_on_the_others() -> None:
    if "cpp" not in testing.implementations(OP):
        pytest.skip("there is no native library here")
    gate_up = inputs(64, 600, torch.float32)
    whole = run("cpp", gate_up, "silu")
    for i in (0, 17, 63):
        assert torch.equal(run("cpp", gate_up[i : i + 1], "silu")[0], whole[i])


def test_extreme_gates_neither_overflow_nor_vanish() -> None:
    gate_up = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0] + [1.0] * 5])
    for name in testing.implementations(OP):
        torch.testing.assert_close(run(name, gate_up, "silu")[0], torch.tensor([0.0, 0.0, 0.0, 90.0, 200.0]))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown activation 'relu'; known: silu"):
        kernels.act_and_mul(torch.zeros(1, 4), "relu")
    with pytest.raises(ValueError, match=r"gate_up must be \[T, 2I\]"):
        kernels.act_and_mul(torch.zeros(1, 3), "silu")
    with pytest.raises(ValueError, match="out is"):
        kernels.act_and_mul(torch.zeros(1, 4), "silu", out=torch.zeros(1, 3))
