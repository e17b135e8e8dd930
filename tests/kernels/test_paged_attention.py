"""Paged attention: every implementation against the definition, and the exactness that the C++ one promises."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import backend, fixed_decode_plan, native, num_decode_items, paged_attention, plan_attention, testing
from kernels.paged_attention import cpp_impl, reference

IMPLEMENTATIONS = testing.implementations("paged_attention")
FLOAT_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

needs_cpp = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs the native library")


@dataclass(frozen=True)
class Batch:
    """One call's tensors; every cache slot and table entry that no row may read is poisoned."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5

    def run(self, **options) -> Tensor | tuple[Tensor, Tensor]:
        return paged_attention(*vars(self).values(), scale=self.scale, **options)

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def only(self, row: int, first: int, last: int) -> Batch:
        """Queries first to last - 1 of one row, as a batch of its own; `seq_lens` ends with the last of them."""
        start, stop = self.cu_seqlens_q[row : row + 2].tolist()
        return replace(
            self,
            q=self.q[start + first : start + last],
            block_table=self.block_table[row : row + 1],
            seq_lens=self.seq_lens[row : row + 1] - (stop - start - last),
            cu_seqlens_q=torch.tensor([0, last - first], dtype=torch.int32),
        )


def make_batch(
    rows: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (16, 16),
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    per_head: bool = False,
    seed: int = 0,
) -> Batch:
    """rows: (new tokens, seq_len) each. per_head: a table for each kv head, those after the first half as long."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    cache_dtype = cache_dtype or dtype
    num_queries = [count for count, _ in rows]
    cu_seqlens_q = torch.tensor([0, *num_queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor([[length] * num_kv_heads for _, length in rows], dtype=torch.int32).view(-1, num_kv_heads)
    if per_head:
        lengths[:, 1:] = torch.maximum(lengths[:, 1:] // 2, torch.tensor(num_queries, dtype=torch.int32)[:, None])
    max_blocks = max([-(-length // block_size) for _, length in rows], default=0) + 2
    num_blocks = sum(-(-int(n) // block_size) for n in lengths.flatten()) + 1
    pool = torch.randperm(num_blocks, generator=generator).tolist()
    cache_heads = 1 if per_head else num_kv_heads
    # One layer of a pool with two: the view's blocks lie apart.
    caches = [testing.nan_filled(num_blocks, 2, cache_heads, block_size, dim, dtype=cache_dtype)[:, 1] for dim in dims]
    table = torch.full((len(rows), num_kv_heads if per_head else 1, max_blocks), 1 << 20, dtype=torch.int32)
    for row in range(len(rows)):
        for head in range(table.shape[1]):
            for index in range(0, int(lengths[row, head]), block_size):
                block = table[row, head, index // block_size] = pool.pop()
                used = min(block_size, int(lengths[row, head]) - index)
                for cache in caches:
                    shape = cache_heads, used, cache.shape[3]
                    cache[block, :, :used] = torch.randn(shape, generator=generator).to(cache_dtype)
    total = sum(num_queries)
    wide = torch.randn(total, 2, num_heads, dims[0], generator=generator).to(dtype)
    return Batch(
        q=wide[:, 1],  # strided, as a slice of a fused projection is
        k_cache=caches[0],
        v_cache=caches[1],
        block_table=table if per_head else table[:, 0],
        seq_lens=lengths if per_head else lengths[:, 0],
        cu_seqlens_q=cu_seqlens_q,
    )


MIXED = [(1, 37), (7, 7), (0, 20), (5, 61), (1, 1), (33, 70), (0, 0)]

# name -> arguments of make_batch, options of paged_attention
CASES = {
    "mixed": ({"rows": MIXED}, {}),
    "empty batch": ({"rows": []}, {}),
    "no queries": ({"rows": [(0, 5), (0, 0)]}, {}),
    "mha": ({"rows": MIXED, "heads": (3, 3)}, {}),
    "mqa": ({"rows": MIXED, "heads": (7, 1)}, {}),
    "odd dims": ({"rows": MIXED, "dims": (20, 20)}, {}),
    "dv above d": ({"rows": MIXED, "dims": (24, 40)}, {}),
    "dv below d": ({"rows": MIXED, "dims": (48, 17)}, {}),
    "wide heads": ({"rows": [(1, 37), (5, 61)], "dims": (136, 128)}, {}),
    "block of 1": ({"rows": [(1, 9), (3, 5)], "block_size": 1}, {}),
    "block of 64": ({"rows": [(1, 37), (5, 130)], "block_size": 64}, {}),
    "window": ({"rows": MIXED}, {"window": 9}),
    "window of 1": ({"rows": MIXED}, {"window": 1}),
    "soft cap": ({"rows": MIXED}, {"soft_cap": 2.0}),
    "everything": ({"rows": MIXED, "heads": (6, 2), "dims": (24, 16)}, {"window": 20, "soft_cap": 3.0, "sinks": True}),
    "sinks": ({"rows": MIXED}, {"sinks": True}),
    "per head": ({"rows": [(1, 37), (7, 40), (2, 2)], "per_head": True}, {"window": 30}),
    "long": ({"rows": [(1, 1100), (3, 515)], "heads": (2, 1)}, {"sinks": True}),
    "as many queries as a tree has": ({"rows": [(20, 600), (65, 70)], "heads": (4, 1)}, {"window": 530, "sinks": True}),
    "more": ({"rows": [(70, 150)], "heads": (4, 1)}, {"sinks": True}),
    "sees nothing": ({"rows": [(3, 1), (2, 0)]}, {"sinks": True}),
}


def options_of(batch: Batch, options: dict) -> dict:
    sinks = torch.linspace(-1, 2, batch.q.shape[1], device=batch.q.device) if options.get("sinks") else None
    return {**options, "sinks": sinks}


def outputs_of(batch: Batch, name: str, options: dict) -> tuple[Tensor, Tensor]:
    """out and lse of one implementation, written into an output of NaN."""
    batch = batch.to(testing.device_of(name))
    out = testing.nan_filled(*batch.q.shape[:2], batch.v_cache.shape[3], dtype=batch.q.dtype, device=batch.q.device)
    with backend.using(name):
        result, lse = batch.run(out=out, return_lse=True, **options_of(batch, options))
    assert result is out
    return out.cpu(), lse.cpu()


def assert_agrees(batch: Batch, name: str, options: dict, factor: float = 1.0) -> None:
    expected, expected_lse = outputs_of(batch, "reference", options)
    out, lse = outputs_of(batch, name, options)
    testing.assert_close(out, expected, factor=factor)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_agrees_with_the_definition(name, case):
    arguments, options = CASES[case]
    assert_agrees(make_batch(**arguments), name, options)


@pytest.mark.parametrize("cache_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("same_dtype", [True, False], ids=["q as cache", "q float32"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_takes_16_bit_caches(name, cache_dtype, same_dtype):
    if not testing.runs_dtype(name, cache_dtype):
        pytest.skip("the interpreter computes bfloat16 wrongly")
    dtype = cache_dtype if same_dtype else torch.float32
    for dims in [(32, 32), (24, 20)]:
        batch = make_batch([(1, 37), (5, 21), (1, 300)], dtype=dtype, cache_dtype=cache_dtype, dims=dims)
        assert_agrees(batch, name, {"sinks": True})


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_batch(name):
    batch = make_batch(MIXED)
    with backend.using(name):
        together = batch.to(testing.device_of(name)).run().cpu()
        for row, (count, _) in enumerate(MIXED):
            alone = batch.only(row, 0, count).to(testing.device_of(name)).run().cpu()
            start = int(batch.cu_seqlens_q[row])
            assert torch.equal(alone, together[start : start + count])


@needs_cpp
@pytest.mark.parametrize("options", [{}, {"window": 100, "soft_cap": 5.0, "sinks": True}], ids=["plain", "options"])
@pytest.mark.parametrize("dims", [(32, 32), (24, 40)])
@pytest.mark.parametrize("cache_dtype", FLOAT_DTYPES)
def test_decode_equals_prefill_bit_for_bit(cache_dtype, dims, options):
    batch = make_batch([(330, 700)], heads=(6, 2), dims=dims, cache_dtype=cache_dtype)
    options = options_of(batch, options)
    with backend.using("cpp"):
        whole, whole_lse = batch.run(return_lse=True, **options)
        for chunk in (1, 7, 16, 63):
            for first in range(0, 330, 5 * chunk):
                last = min(330, first + chunk)
                out, lse = batch.only(0, first, last).run(return_lse=True, **options)
                assert torch.equal(out, whole[first:last])
                assert torch.equal(lse, whole_lse[first:last])


@needs_cpp
def test_the_number_of_threads_changes_no_bit(monkeypatch):
    batch = make_batch([(1, 1500), (40, 900), (1, 30)], heads=(4, 2))
    results = []
    with backend.using("cpp"):
        for num_threads in (1, 2, 5):
            monkeypatch.setattr(native, "num_threads", lambda n=num_threads: n)
            results.append(batch.run(return_lse=True, sinks=torch.zeros(4)))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@needs_cpp
def test_plan_divides_a_long_row_and_only_with_several_threads(monkeypatch):
    lengths = [1500, 40]
    monkeypatch.setattr(native, "num_threads", lambda: 4)
    with backend.using("cpp"):
        divided = plan_attention([0, 1, 2], lengths, num_kv_heads=2).work
    splits = -(-1500 // cpp_impl.SPLIT_KEYS)
    assert divided.merges.tolist() == [[0, 0, 1, splits, 0]]
    assert sorted(item[3] for item in divided.items.tolist() if item[0] == 0) == list(range(splits))
    assert [item[3:] for item in divided.items.tolist() if item[0] == 1] == [[0, 1, -1]]
    monkeypatch.setattr(native, "num_threads", lambda: 1)
    with backend.using("cpp"):
        assert plan_attention([0, 1, 2], lengths, num_kv_heads=2).work.num_partials == 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_one_plan_serves_layers_with_and_without_window(name):
    batch = make_batch([(1, 300), (4, 60)]).to(testing.device_of(name))
    with backend.using(name):
        plan = plan_attention([0, 1, 5], [300, 60], num_kv_heads=2, device=batch.q.device)
        for window in (0, 17):
            assert torch.equal(batch.run(plan=plan, window=window), batch.run(window=window))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_items", [4, 9], ids=["no room to spare", "room to spare"])
def test_a_fixed_plan_filled_again_has_the_bits_of_a_plan_of_its_own(name: str, num_items: int) -> None:
    with backend.using(name):
        device = testing.device_of(name)
        plan = fixed_decode_plan(4, num_items, num_kv_heads=2, device=device)
        lengths = [[700, 1, 20, 0], [3, 512, 33, 31]] if num_items > 4 else [[40, 1, 20, 0], [3, 512, 33, 31]]
        for seq_lens in lengths:
            batch = make_batch([(1, max(1, length)) for length in seq_lens]).to(device)
            batch = replace(batch, seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device))
            plan.fill(seq_lens)
            assert torch.equal(batch.run(plan=plan), batch.run())
            assert (0 in seq_lens) == bool((batch.run(plan=plan)[3] == 0).all())


def test_a_fixed_plan_says_when_rows_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 are too few for 3 rows"):
        fixed_decode_plan(3, 2)
    plan = fixed_decode_plan(2, 2)
    with pytest.raises(ValueError, match="3 lengths for a plan of 2 rows"):
        plan.fill([1, 2, 3])
    if "triton" in IMPLEMENTATIONS:
        with backend.using("triton"), pytest.raises(ValueError, match="take 3 items, the plan has room for 2"):
            fixed_decode_plan(2, 2, device=testing.device_of("triton")).fill([1, 513])
    assert num_decode_items([1, 512, 513]) == 4


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nan_in_a_key_reaches_the_output_of_its_own_row_only(name):
    batch = make_batch([(1, 20), (1, 20)])
    batch.k_cache[batch.block_table[0, 0], 0, 3, 0] = torch.nan
    with backend.using(name):
        out = batch.to(testing.device_of(name)).run().cpu()
    assert out[0, :2].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_large_scores_do_not_overflow(name):
    batch = make_batch([(1, 37), (5, 61)])
    # Scores of some thousands carry an absolute rounding error of some 1e-4 into the exponent.
    assert_agrees(replace(batch, q=batch.q * 1000), name, {}, factor=200)


def test_definition_is_softmax_attention():
    batch = make_batch([(5, 5)], heads=(1, 1))
    keys, values = (cache[int(batch.block_table[0, 0]), :, :5] for cache in (batch.k_cache, batch.v_cache))
    queries = batch.q.transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    with backend.using("reference"):
        torch.testing.assert_close(batch.run(), expected.transpose(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 5, 16)}, "does not fit 2 kv heads"),
        ({"q": torch.zeros(8, 4, 16, dtype=torch.float16)}, "q must be float32 or of the cache's type"),
        ({"q": torch.zeros(9, 4, 16)}, "q has 9 tokens, the plan 8"),
        ({"v_cache": torch.zeros(1, 2, 16, 16)}, "differ in layout"),
        ({"seq_lens": torch.zeros(2, 3, dtype=torch.int32)}, "does not fit 2 kv heads"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, "need one more than the 3"),
        ({"block_table": torch.zeros(2, 3, 4, dtype=torch.int32)}, "block_table has 3 heads, the cache 2"),
        ({"block_table": torch.zeros(2, 4)}, "must be int32"),
    ],
)
def test_disagreeing_inputs_are_refused_by_name(change, message):
    batch = make_batch([(1, 20), (7, 20)])
    with pytest.raises(ValueError, match=message):
        replace(batch, **change).run()


def test_a_plan_that_fitted_once_is_checked_again_for_other_tensors():
    batch = make_batch([(1, 20), (7, 20)])
    plan = plan_attention(batch.cu_seqlens_q, batch.seq_lens, num_kv_heads=2)
    batch.run(plan=plan)
    with pytest.raises(ValueError, match="does not fit 2 kv heads"):
        replace(batch, q=batch.q[..., :8]).run(plan=plan)
    with pytest.raises(ValueError, match=r"sinks is \[3\]"):
        batch.run(plan=plan, sinks=torch.zeros(3))


def test_a_plan_of_another_implementation_is_refused():
    batch = make_batch([(1, 20)])
    with backend.using("reference"):
        plan = plan_attention([0, 1], [20], num_kv_heads=2)
    with (
        backend.using("torch"),
        pytest.raises(ValueError, match=r"made by kernels\.paged_attention\.reference, .*torch_impl runs"),
    ):
        batch.run(plan=plan)


def test_reference_covers_every_implementation_option():
    assert reference.paged_attention.__annotations__.keys() == cpp_impl.paged_attention.__annotations__.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [[(1, 3000), (1, 17)], [(9, 2000), (3, 40)], [(700, 900), (1, 33)]])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_triton_on_a_gpu_errs_at_most_twice_as_much_as_torch(dtype, dims, rows):
    batch = make_batch(rows, heads=(8, 2), dims=dims, dtype=dtype).to(torch.device("cuda"))
    results = {}
    for name in ("triton", "torch"):
        with backend.using(name):
            results[name] = batch.run(window=1500)
    exact = replace(batch, q=batch.q.float(), k_cache=batch.k_cache.float(), v_cache=batch.v_cache.float())
    with backend.using("torch"):
        expected = exact.run(window=1500)
    testing.assert_at_most_twice_the_error(results["triton"], results["torch"], expected)


# ---- trees


def random_parents(num_tokens: int, generator: torch.Generator) -> list[int]:
    """Of one row: any earlier token."""
    return [-1, *(int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, num_tokens))]


def paths_of(parents: list[int]) -> list[list[int]]:
    paths: list[list[int]] = []
    for index, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), index])
    return paths


def along(batch: Batch, row: int, path: list[int]) -> Batch:
    """The last token of a path as a decoding row of its own, with the path's keys and values behind each other."""
    start, stop = batch.cu_seqlens_q[row : row + 2].tolist()
    before = int(batch.seq_lens[row]) - (stop - start)
    block_size = batch.k_cache.shape[2]
    slots = [*range(before), *(before + node for node in path)]
    num_blocks = -(-len(slots) // block_size)
    caches = []
    for cache in (batch.k_cache, batch.v_cache):
        own = testing.nan_filled(num_blocks, cache.shape[1], block_size, cache.shape[3], dtype=cache.dtype)
        for place, slot in enumerate(slots):
            block = batch.block_table[row, slot // block_size]
            own[place // block_size, :, place % block_size] = cache[block, :, slot % block_size]
        caches.append(own)
    return Batch(
        batch.q[start + path[-1] : start + path[-1] + 1],
        *caches,
        torch.arange(num_blocks, dtype=torch.int32)[None],
        torch.tensor([len(slots)], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
    )


TREE_ROWS = [(1, 9), (7, 60), (20, 20), (65, 330), (3, 700), (40, 41)]
IS_TREE = [False, True, True, True, True, False]


def tree_parents(rows: list[tuple[int, int]], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        random_parents(count, generator) if is_tree else list(range(-1, count - 1))
        for (count, _), is_tree in zip(rows, IS_TREE, strict=True)
    ]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"window": 33}, {"soft_cap": 5.0}])
def test_a_token_of_a_tree_sees_its_path_and_what_was_before(name: str, options: dict[str, float]) -> None:
    batch = make_batch(TREE_ROWS, heads=(6, 2), dims=(24, 20))
    parents = tree_parents(TREE_ROWS)
    device = testing.device_of(name)
    flat = [parent for own in parents for parent in own]
    with backend.using(name):
        plan = plan_attention(batch.cu_seqlens_q, batch.seq_lens, num_kv_heads=2, device=device, parents=flat)
        found, lse = batch.to(device).run(plan=plan, return_lse=True, **options)
    with backend.using("reference"):
        for row, own in enumerate(parents):
            start = int(batch.cu_seqlens_q[row])
            for index, path in enumerate(paths_of(own)):
                expected, expected_lse = along(batch, row, path).run(return_lse=True, **options)
                testing.assert_close(found[start + index : start + index + 1].cpu(), expected)
                testing.assert_close(lse[start + index : start + index + 1].cpu(), expected_lse)


@needs_cpp
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_of_a_tree_has_the_bits_of_its_path_alone(
    dtype: torch.dtype, window: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "num_threads", lambda: threads)
    batch = make_batch(TREE_ROWS, heads=(6, 2), dims=(24, 20), dtype=dtype)
    parents = tree_parents(TREE_ROWS, seed=1)
    with backend.using("cpp"):
        plan = plan_attention(
            batch.cu_seqlens_q, batch.seq_lens, num_kv_heads=2, parents=[parent for own in parents for parent in own]
        )
        found = batch.run(plan=plan, window=window)
        for row, own in enumerate(parents):
            start = int(batch.cu_seqlens_q[row])
            for index, path in enumerate(paths_of(own)):
                alone = along(batch, row, path).run(window=window)
                assert torch.equal(found[start + index], alone[0]), f"token {index} of row {row}"


def test_a_tree_whose_tokens_come_before_their_parents_is_refused() -> None:
    for parents in ([-1, 0, 2], [0, 0, 1], [-1, 0], [-1, -1, 0]):
        with pytest.raises(ValueError, match=r"parents has|continues token"):
            plan_attention([0, 3], [3], parents=parents)
