"""Merging partial attention: two halves make the whole; a virtual key stands for the equal keys that it replaces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import backend, merge_attention, paged_attention, testing, virtual_key
from tests.kernels.test_paged_attention import make_batch

IMPLEMENTATIONS = testing.implementations("merge_attention")
NOTHING = -torch.inf


def merged(name: str, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    device = testing.device_of(name)
    out, lse = out_a.to(device, copy=True), lse_a.to(device, copy=True)
    with backend.using(name):
        merge_attention(out, lse, out_b.to(device), lse_b.to(device))
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype_a", "dtype_b"), [(torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("num_tokens", testing.ODD_TOKENS)
def test_agrees_with_the_definition(name: str, dtype_a: torch.dtype, dtype_b: torch.dtype, num_tokens: int) -> None:
    if not testing.runs_dtype(name, dtype_a):
        pytest.skip("the interpreter computes bfloat16 wrongly")
    generator = torch.Generator().manual_seed(0)
    a, b = (
        testing.strided(torch.randn(num_tokens, 3, 20, generator=generator).to(dtype)) for dtype in (dtype_a, dtype_b)
    )
    lse_a, lse_b = 5 * torch.randn(2, num_tokens, 3, generator=generator)
    expected, expected_lse = merged("reference", a, lse_a, b, lse_b)
    out, lse = merged(name, a, lse_a, b, lse_b)
    testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
def test_a_part_that_saw_nothing_changes_no_bit(name: str) -> None:
    a, b = torch.randn(2, 3, 2, 20, generator=torch.Generator().manual_seed(1)).unbind(0)
    lse = torch.tensor([[0.5, -100.0], [3.0, 80.0], [1.0, 0.0]])
    nothing = torch.full_like(lse, NOTHING)
    empty = testing.nan_filled(3, 2, 20)  # what an empty part holds does not matter
    for found in (merged(name, a, lse, empty, nothing), merged(name, empty, nothing, a, lse)):
        assert torch.equal(found[0], a)
        assert torch.equal(found[1], lse)
    out, still_nothing = merged(name, b, nothing, a, nothing)
    assert torch.equal(out, b)
    assert still_nothing.eq(NOTHING).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_denominators_do_not_overflow(name: str) -> None:
    a, b = torch.zeros(1, 2, 8), torch.ones(1, 2, 8)
    out, lse = merged(name, a, torch.tensor([[900.0, -900.0]]), b, torch.tensor([[900.0, -901.0]]))
    torch.testing.assert_close(out[0, :, 0], torch.tensor([0.5, 1 / (1 + math.e)]))
    torch.testing.assert_close(lse[0], torch.tensor([900.0 + math.log(2), -900.0 + math.log1p(1 / math.e)]))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_two_halves_make_the_whole(name: str) -> None:
    batch = make_batch([(1, 96), (1, 80)], heads=(4, 2)).to(testing.device_of(name))
    halves = []
    with backend.using(name):
        whole, whole_lse = batch.run(return_lse=True)
        for blocks, cut in ((slice(0, 3), 48), (slice(3, None), None)):
            table = batch.block_table[:, blocks].contiguous()
            lens = torch.full_like(batch.seq_lens, cut) if cut else batch.seq_lens - 48
            caches = batch.k_cache, batch.v_cache
            halves.append(
                paged_attention(batch.q, *caches, table, lens, batch.cu_seqlens_q, scale=batch.scale, return_lse=True)
            )
        (out, lse), (other, other_lse) = halves
        merge_attention(out, lse, other, other_lse)
    testing.assert_close(out, whole, factor=2)
    torch.testing.assert_close(lse, whole_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
def test_a_virtual_key_of_equal_logits_is_exact(name: str) -> None:
    """q = (1, 0); kept: k = (0, 0), v = (0, 4); dropped: k = (0, 1) and (0, 3), v = (1, 0) and (3, 0)."""
    q = torch.tensor([[[1.0, 0.0]]])
    out, lse = torch.tensor([[[0.0, 4.0]]]), torch.zeros(1, 1)
    mean_k, mean_v = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[2.0, 0.0]]])
    starts = torch.tensor([0, 1], dtype=torch.int32)
    part, part_lse = virtual_key(q, mean_k, mean_v, torch.tensor([[math.log(2)]]), starts, scale=1.0)
    found, found_lse = merged(name, out, lse, part, part_lse)
    torch.testing.assert_close(found.flatten(), torch.tensor([4 / 3, 4 / 3]))
    torch.testing.assert_close(found_lse.flatten(), torch.tensor([math.log(3)]))


def test_a_virtual_key_belongs_to_its_row_and_kv_head() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(5, 6, 8, generator=generator).half()
    k, v = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 2, 4, generator=generator)
    log_count = torch.tensor([[0.0, 1.5], [NOTHING, 2.0], [0.5, NOTHING]])
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    out, lse = virtual_key(q, k, v, log_count, starts, scale=0.3, soft_cap=2.0)
    for token, row in enumerate([0, 0, 2, 2, 2]):
        for head in range(6):
            x = float(q[token, head].float() @ k[row, head // 3]) * 0.3
            expected = 2.0 * math.tanh(x / 2.0) + float(log_count[row, head // 3])
            assert lse[token, head].item() == pytest.approx(expected, abs=1e-5)
            is_nothing = log_count[row, head // 3] == NOTHING
            assert torch.equal(out[token, head], torch.zeros(4) if is_nothing else v[row, head // 3])


def test_wrong_arguments_are_named() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"out_b is \[2, 3, 5\]"):
        merge_attention(out, lse, torch.zeros(2, 3, 5), lse)
    with pytest.raises(ValueError, match=r"lse_b is \[3, 2\]"):
        merge_attention(out, lse, out.clone(), lse.T)
    count, starts = torch.zeros(1, 2), torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit"):
        virtual_key(out, torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), count, starts, scale=1.0)
    q = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match="need one more than the 1 rows"):
        virtual_key(q, torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), count, starts[:1], scale=1.0)
