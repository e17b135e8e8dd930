"""Cache writes are exact, skip slot -1, leave other slots alone; the fused form equals rotation, then write."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import backend, testing
from tests.kernels.test_rope import table

OP = "kv_write"
NUM_BLOCKS, BLOCK_SIZE, NUM_LAYERS = 6, 4, 3


def caches(num_heads: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, device: torch.device) -> list:  # type: ignore[type-arg]
    """Layer 1 of a pool: strided as in the engine, filled with NaN."""
    return [
        testing.nan_filled(NUM_BLOCKS, NUM_LAYERS, num_heads, BLOCK_SIZE, size, dtype=dtype, device=device)
        for size in (head_dim, head_dim_v)
    ]


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
@pytest.mark.parametrize("cache_dtype", testing.FLOAT_DTYPES)
@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(20, 20), (32, 16)])
def test_writes_are_exact(
    name: str, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int, head_dim_v: int
) -> None:
    if not (testing.runs_dtype(name, dtype) and testing.runs_dtype(name, cache_dtype)):
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    device = testing.device_of(name)
    generator = torch.Generator().manual_seed(1)
    k = testing.strided(torch.randn(5, 3, head_dim, generator=generator).to(dtype)).to(device)
    v = torch.randn(5, 3, head_dim_v, generator=generator).to(dtype).to(device)
    slots = torch.tensor([7, -1, 0, 23, 8], device=device)
    pools = caches(3, head_dim, head_dim_v, cache_dtype, device)
    with backend.using(name):
        kernels.kv_write(k, v, pools[0][:, 1], pools[1][:, 1], slots)
    for x, pool in ((k, pools[0]), (v, pools[1])):
        assert pool[:, [0, 2]].isnan().all(), "another layer was written"
        written = pool[:, 1].transpose(1, 2).reshape(NUM_BLOCKS * BLOCK_SIZE, 3, -1)  # [slots, H_kv, D]
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert torch.equal(written[slot], x[token].to(cache_dtype))
                written[slot] = float("nan")
        assert written.isnan().all(), "another slot was written"


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rot_dim", [24, 16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_the_fused_form_is_rotation_then_write(
    name: str, interleaved: bool, rot_dim: int, cache_dtype: torch.dtype
) -> None:
    device = testing.device_of(name)
    generator = torch.Generator().manual_seed(2)
    fused = torch.randn(6, (4 + 2 + 2) * 24, generator=generator).to(device)
    q, k, v = (part.unflatten(1, (-1, 24)) for part in fused.split([4 * 24, 2 * 24, 2 * 24], dim=1))
    positions = torch.randint(30, (6,), generator=generator).to(device)
    slots = torch.tensor([1, 2, 3, -1, 13, 22], device=device)
    cos_sin = table(30, rot_dim).to(device)
    q_expected, k_expected, k_before = q.clone(), k.clone(), k.clone()
    expected, got = caches(2, 24, 24, cache_dtype, device), caches(2, 24, 24, cache_dtype, device)
    with backend.using(name):
        kernels.apply_rope(q_expected, k_expected, positions, cos_sin, interleaved=interleaved)
        kernels.kv_write(k_expected, v, expected[0][:, 1], expected[1][:, 1], slots)
        kernels.rope_kv_write(q, k, v, positions, cos_sin, got[0][:, 1], got[1][:, 1], slots, interleaved=interleaved)
    assert torch.equal(q, q_expected)
    assert torch.equal(k, k_before), "k itself stays as it is"
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", testing.implementations(OP))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(20, 10), (9, 9), (1, 1)])
def test_the_fused_form_reaches_every_head_and_no_slot_of_padding(name: str, num_heads: int, num_kv_heads: int) -> None:
    device = testing.device_of(name)
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(3, heads, 16, generator=generator).to(device) for heads in (num_heads, num_kv_heads))
    v = torch.randn(3, num_kv_heads, 12, generator=generator).to(device)
    positions, slots = torch.tensor([5, 0, 0], device=device), torch.tensor([9, -1, -1], device=device)
    cos_sin = table(30, 16).to(device)
    q_expected, k_expected = q.clone(), k.clone()
    k_pool, v_pool = caches(num_kv_heads, 16, 12, torch.float32, device)
    with backend.using(name):
        kernels.apply_rope(q_expected, k_expected, positions, cos_sin)
        kernels.rope_kv_write(q, k, v, positions, cos_sin, k_pool[:, 1], v_pool[:, 1], slots)
    assert torch.equal(q, q_expected)
    for pool, x in ((k_pool, k_expected), (v_pool, v)):
        assert torch.equal(pool[9 // BLOCK_SIZE, 1, :, 9 % BLOCK_SIZE], x[0])
        pool[9 // BLOCK_SIZE, 1, :, 9 % BLOCK_SIZE] = float("nan")
        assert pool.isnan().all(), "padding was written"


@pytest.mark.parametrize("name", testing.implementations(OP))
def test_no_tokens_is_a_no_op(name: str) -> None:
    device = testing.device_of(name)
    k_cache = torch.zeros(2, 1, 4, 8, device=device)
    empty = torch.zeros(0, 1, 8, device=device)
    with backend.using(name):
        kernels.kv_write(empty, empty, k_cache, k_cache.clone(), torch.zeros(0, dtype=torch.int64, device=device))
    assert not k_cache.any()


def test_wrong_arguments_are_named() -> None:
    k, cache, slots = torch.zeros(2, 1, 8), torch.zeros(3, 1, 4, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not fit k_cache"):
        kernels.kv_write(k, k, torch.zeros(3, 2, 4, 8), cache, slots)
    with pytest.raises(ValueError, match=r"slots must be \[2\] int64"):
        kernels.kv_write(k, k, cache, cache, slots.int())
    with pytest.raises(ValueError, match="contiguous slots"):
        kernels.kv_write(k, k, cache.transpose(2, 3), cache, slots)
