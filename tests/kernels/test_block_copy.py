"""Block copies are exact, touch nothing else, and cover all layers of both pools."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import backend, testing

OP = "block_copy"


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
def test_copies_are_exact_and_touch_nothing_else(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    device = testing.device_of(name)
    shape = (9, 3, 2, 4)
    k = torch.randn(*shape, 20, generator=generator).to(dtype).to(device)
    v = torch.randn(*shape, 12, generator=generator).to(dtype).to(device)
    expected_k, expected_v = k.clone(), v.clone()
    pairs = [(1, 5), (1, 8), (3, 0)]
    for source, destination in pairs:
        expected_k[destination], expected_v[destination] = expected_k[source], expected_v[source]
    with backend.using(name):
        kernels.copy_blocks(k, v, torch.tensor(pairs))
    assert torch.equal(k, expected_k)
    assert torch.equal(v, expected_v)


@pytest.mark.parametrize("name", testing.implementations(OP))
def test_no_pairs_is_a_no_op(name: str) -> None:
    k = torch.ones(2, 1, 1, 2, 2, device=testing.device_of(name))
    with backend.using(name):
        kernels.copy_blocks(k, k.clone(), torch.empty(0, 2, dtype=torch.int64))
    assert torch.equal(k, torch.ones_like(k))


def test_wrong_arguments_are_named() -> None:
    pool = torch.zeros(2, 1, 1, 2, 2)
    with pytest.raises(ValueError, match="pools must be contiguous and alike"):
        kernels.copy_blocks(pool, torch.zeros(3, 1, 1, 2, 2), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pairs must be \[n, 2\] int64"):
        kernels.copy_blocks(pool, pool.clone(), torch.zeros(1, 2))
