"""Logits themselves: over all channels they are those of attention, over some the sum over those."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import attention_logits, backend, native, paged_attention, testing

IMPLEMENTATIONS = testing.implementations("attention_logits")
BLOCK_SIZE, DIM, KV_HEADS = 4, 20, 3
ROWS = [(1, 9), (5, 7), (0, 4), (2, 2), (1, 21)]  # new tokens, slots


def batch(dtype: torch.dtype, group: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(count for count, _ in ROWS)
    pool = testing.nan_filled(24, 2, KV_HEADS, BLOCK_SIZE, DIM, dtype=dtype)
    table = torch.full((len(ROWS), 8), 1 << 20, dtype=torch.int32)  # entries beyond a row's length are never read
    free = torch.randperm(24, generator=generator).tolist()
    for row, (_, length) in enumerate(ROWS):
        for slot in range(length):
            if slot % BLOCK_SIZE == 0:
                table[row, slot // BLOCK_SIZE] = free.pop()
            key = torch.randn(KV_HEADS, DIM, generator=generator).to(dtype)
            pool[table[row, slot // BLOCK_SIZE], 1, :, slot % BLOCK_SIZE] = key
    starts = [0]
    for count, _ in ROWS:
        starts.append(starts[-1] + count)
    return {
        "q": testing.strided(torch.randn(num_tokens, KV_HEADS * group, DIM, generator=generator).to(dtype)),
        "k_cache": pool[:, 1],
        "block_table": table,
        "seq_lens": torch.tensor([length for _, length in ROWS], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor(starts, dtype=torch.int32),
    }


def logits(name: str, given: dict[str, Tensor], **options: object) -> Tensor:
    device = testing.device_of(name)
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    with backend.using(name):
        return attention_logits(**{key: value.to(device) for key, value in given.items()}, **options).cpu()  # type: ignore[arg-type]


CASES = {
    "all": {},
    "capped": {"soft_cap": 1.5},
    "some": {"channels": torch.tensor([[3, 0, 19], [1, 2, 3], [7, 7, 5]])},
    "one, more slots": {"channels": torch.tensor([[3], [0], [19]]), "num_slots": 33},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
def test_logits_agree_with_the_definition(name: str, case: str, dtype: torch.dtype) -> None:
    if not testing.runs_dtype(name, dtype):
        pytest.skip("the interpreter computes bfloat16 wrongly")
    given = batch(dtype)
    found, expected = (logits(which, given, scale=0.3, **CASES[case]) for which in (name, "reference"))
    assert torch.equal(found == -torch.inf, expected == -torch.inf)
    assert found.shape[2] == CASES[case].get("num_slots", 21)
    is_seen = expected > -torch.inf
    testing.assert_close(found[is_seen], expected[is_seen], dtype=torch.float32, factor=4)


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, "reference"])
def test_attention_is_the_softmax_of_these_logits(name: str) -> None:
    given = batch(torch.float32, group=1)
    found = logits(name, given, scale=0.3)
    _, lse = paged_attention(**given, v_cache=given["k_cache"], scale=0.3, return_lse=True)  # type: ignore[arg-type]
    testing.assert_close(found.logsumexp(2), lse, factor=2)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_all_channels_by_name_are_all_channels(name: str) -> None:
    given = batch(torch.float32)
    by_name = torch.arange(DIM).expand(KV_HEADS, DIM)
    assert torch.equal(logits(name, given, scale=0.3, channels=by_name), logits(name, given, scale=0.3))


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs the native library")
def test_neither_the_batch_nor_the_number_of_threads_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    given = batch(torch.float32)
    together = logits("cpp", given, scale=0.3)
    monkeypatch.setattr(native, "num_threads", lambda: 4)
    assert torch.equal(logits("cpp", given, scale=0.3), together)
    alone = {**given, "q": given["q"][8:], "block_table": given["block_table"][4:], "seq_lens": given["seq_lens"][4:]}
    alone["cu_seqlens_q"] = torch.tensor([0, 1], dtype=torch.int32)
    assert torch.equal(logits("cpp", alone, scale=0.3)[0], together[8])


def test_wrong_arguments_are_named() -> None:
    given = batch(torch.float32)
    with pytest.raises(ValueError, match=r"need \[3, C\] int64"):
        attention_logits(**given, scale=1.0, channels=torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="does not fit"):
        attention_logits(**{**given, "q": given["q"][:, :4]}, scale=1.0)
    with pytest.raises(ValueError, match="must be int32"):
        attention_logits(**{**given, "seq_lens": given["seq_lens"].long()}, scale=1.0)
