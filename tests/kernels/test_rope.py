"""Rotation in place: every implementation against the float64 definition, partial and interleaved forms included."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import backend, testing

OP = "rope"


def table(num_positions: int, rot_dim: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(num_positions), 100.0 ** (-torch.arange(rot_dim // 2) / (rot_dim // 2)))
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rotate(
    name: str, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    device = testing.device_of(name) if name != "reference" else torch.device("cpu")
    q, k = q.clone().to(device), k.clone().to(device)
    with backend.using(name):
        kernels.apply_rope(q, k, positions.to(device), cos_sin.to(device), interleaved=interleaved)
    return q.cpu(), k.cpu()


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_tokens", "head_dim", "rot_dim"), [(0, 8, 8), (1, 64, 64), (7, 20, 12), (5, 72, 36)])
def test_agrees_with_the_definition(
    name: str, dtype: torch.dtype, interleaved: bool, num_tokens: int, head_dim: int, rot_dim: int
) -> None:
    if not testing.runs_dtype(name, dtype):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(num_tokens, 6, head_dim, generator=generator).to(dtype)
    k = torch.randn(num_tokens, 2, head_dim, generator=generator).to(dtype)
    positions = torch.randint(40, (num_tokens,), generator=generator)
    cos_sin = table(40, rot_dim)
    for got, expected in zip(
        rotate(name, q, k, positions, cos_sin, interleaved),
        rotate("reference", q, k, positions, cos_sin, interleaved),
        strict=True,
    ):
        testing.assert_close(got, expected)


@pytest.mark.parametrize("name", testing.implementations(OP))
def test_rotates_slices_of_a_fused_projection_and_nothing_beside_them(name: str) -> None:
    device = testing.device_of(name)
    fused = torch.randn(5, 4 * 16 + 2 * 16 + 2 * 16).to(device)
    before = fused.clone()
    q, k = fused[:, :64].view(5, 4, 16), fused[:, 64:96].view(5, 2, 16)
    positions, cos_sin = torch.arange(5).to(device), table(5, 16).to(device)
    with backend.using(name):
        kernels.apply_rope(q, k, positions, cos_sin)
    expected_q, expected_k = rotate(
        "reference", before[:, :64].view(5, 4, 16).cpu(), before[:, 64:96].view(5, 2, 16).cpu(),
        positions.cpu(), cos_sin.cpu(), False,
    )  # fmt: skip
    testing.assert_close(q, expected_q)
    testing.assert_close(k, expected_k)
    assert torch.equal(fused[:, 96:], before[:, 96:])


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)
    cos_sin = table(50, 32)

    def score(query_at: int, key_at: int) -> float:
        a, _ = rotate("torch", q, k, torch.tensor([query_at]), cos_sin, False)
        _, b = rotate("torch", q, k, torch.tensor([key_at]), cos_sin, False)
        return float((a * b).sum())

    assert score(7, 3) == pytest.approx(score(44, 40), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-4)


def test_wrong_arguments_are_named() -> None:
    q, positions = torch.zeros(2, 1, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="q and k disagree"):
        kernels.apply_rope(q, torch.zeros(3, 1, 8), positions, table(2, 8))
    with pytest.raises(ValueError, match=r"positions must be \[2\] int64"):
        kernels.apply_rope(q, q.clone(), positions.int(), table(2, 8))
    with pytest.raises(ValueError, match="rot_dim is 10; it must be even and at most the head dim 8"):
        kernels.apply_rope(q, q.clone(), positions, table(2, 10))
