"""The Walsh-Hadamard transform: the same bits everywhere, its own inverse, and products that stay."""

from __future__ import annotations

import pytest
import torch

from kernels import backend, testing
from kernels.hadamard import hadamard, hadamard_size

IMPLEMENTATIONS = testing.implementations("hadamard")


def run(name: str, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    device = testing.device_of(name) if name != "reference" else torch.device("cpu")
    with backend.using(name):
        return hadamard(x.to(device), scale=scale).cpu()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (2, 5, 20), (7, 64), (2, 3, 128), (33, 256)])
def test_every_implementation_gives_the_bits_of_the_definition(name: str, dtype: torch.dtype, shape: tuple) -> None:
    if not testing.runs_dtype(name, dtype):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    found = run(name, x, 1 / 64)
    assert found.dtype == dtype
    assert torch.equal(found, run("reference", x, 1 / 64))


def test_the_definition_is_the_matrix_of_signs() -> None:
    matrix = run("reference", torch.eye(8))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.abs(), torch.ones(8, 8))
    assert torch.equal(matrix @ matrix, 8 * torch.eye(8))


def test_vectors_whose_length_is_no_power_of_two_are_mixed_in_runs() -> None:
    assert [hadamard_size(dim) for dim in (1, 20, 64, 80, 96)] == [1, 4, 64, 16, 32]
    x = torch.arange(12.0)
    assert torch.equal(run("reference", x), torch.cat([run("reference", part) for part in x.chunk(3)]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_products_are_kept_and_strides_do_not_matter(name: str) -> None:
    q, k = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    torch.testing.assert_close((run(name, q, 1 / 32) * run(name, k)).sum(1), (q * k).sum(1))
    assert torch.equal(run(name, testing.strided(q)), run(name, q))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        hadamard(torch.ones(4, dtype=torch.int64))
