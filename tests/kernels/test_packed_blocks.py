"""Packed blocks: every implementation writes the definition's bytes and attends as it does; what formats promise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import kernels
from kernels import backend, native, packed_blocks, testing
from kernels.hadamard import hadamard
from kernels.packed_blocks import cpp_impl, layout

OP = "packed_blocks"
IMPLEMENTATIONS = testing.implementations(OP)
FORMATS = packed_blocks.FORMATS
PLAIN = [format for format in FORMATS if not format.endswith("_rotated")]
NUM_LAYERS = 2

needs_cpp = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="needs the native library")

# (head dim of keys, of values, block size): vectors of codes, short rows of them, some that no vector divides
DIMS = (32, 32, 16)
CASES = {
    "even": (torch.float32, DIMS),
    "odd": (torch.float32, (20, 48, 3)),
    "wide": (torch.float32, (136, 8, 8)),
    "float16": (torch.float16, (64, 32, 4)),
    "bfloat16": (torch.bfloat16, DIMS),
}


def pools(
    num_blocks: int, dims: tuple[int, int, int], dtype: torch.dtype = torch.float32, num_heads: int = 1
) -> tuple[Tensor, Tensor]:
    """NaN everywhere; tests fill what they may read."""
    *sizes, block_size = dims
    k, v = (testing.nan_filled(num_blocks, NUM_LAYERS, num_heads, block_size, size, dtype=dtype) for size in sizes)
    return k, v


def fill(pool: Tensor, blocks: list[int], seed: int = 0) -> None:
    """Values of very different sizes, zeros of both signs, a token of zeros and a channel that is far off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(blocks), *pool.shape[1:], generator=generator)
    x *= 10.0 ** torch.randint(-4, 3, (*x.shape[:-1], 1), generator=generator)
    x[..., 0, 1] = 0.0
    x[..., 1, 2] = -0.0
    x[0, ..., 2, :] = 0.0
    x[..., 3] += 1000.0
    pool[blocks] = x.to(pool.dtype)


def seal(name: str, k: Tensor, v: Tensor, moves: list[tuple[int, int, int]], format: str) -> tuple[Tensor, Tensor]:
    """moves: (source, destination, place) each; returns the pools afterwards, on the CPU."""
    device = testing.device_of(name)
    k, v = k.clone().to(device), v.clone().to(device)
    source, destination, places = torch.tensor(moves, dtype=torch.int64).view(-1, 3).unbind(1)
    with backend.using(name):
        packed_blocks.seal_blocks(k, v, source, destination, places, format=format)
    return k.cpu(), v.cpu()


def as_bytes(pool: Tensor) -> Tensor:
    return pool.view(torch.uint8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sealing_writes_the_bytes_of_the_definition_and_no_others(name, format, case):
    dtype, dims = CASES[case]
    if not testing.runs_dtype(name, dtype):
        pytest.skip("the interpreter computes bfloat16 wrongly")
    k, v = pools(4, dims, dtype)
    for pool in (k, v):
        fill(pool, [1, 3])
    last = packed_blocks.packed_places(format, *dims, dtype) - 1
    moves = [(3, 2, 0), (1, 0, max(0, last))]
    found, expected = seal(name, k, v, moves, format), seal("reference", k, v, moves, format)
    for before, mine, definition in zip((k, v), found, expected, strict=True):
        assert torch.equal(as_bytes(mine), as_bytes(definition))
        assert torch.equal(as_bytes(mine[[1, 3]]), as_bytes(before[[1, 3]]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_unpacking_agrees_with_the_definition(name, format, case):
    dtype, dims = CASES[case]
    if not testing.runs_dtype(name, dtype):
        pytest.skip("the interpreter computes bfloat16 wrongly")
    k, v = pools(2, dims, dtype)
    for pool in (k, v):
        fill(pool, [0])
    last = packed_blocks.packed_places(format, *dims, dtype) - 1
    k, v = seal("torch", k, v, [(0, 1, last)], format)
    results = []
    for implementation in (name, "reference"):
        device = testing.device_of(implementation)
        with backend.using(implementation):
            found = packed_blocks.unpack_blocks(
                k.to(device), v.to(device), torch.tensor([1]), torch.tensor([last]), format=format
            )
        results.append([x.cpu() for x in found])
    for mine, expected in zip(*results, strict=True):
        assert mine.isfinite().all()
        # code * scale is exact in float32 but for its rounding; with a zero added it may be rounded once or twice
        torch.testing.assert_close(mine, expected, rtol=0, atol=2e-4 if format.startswith("kivi") else 0)


# ---- what a format promises


def packed_and_back(x: Tensor, format: str, name: str = "torch") -> tuple[Tensor, Tensor]:
    """x [BS, D] as the keys and as the values of one block, sealed and unpacked: both [BS, D]."""
    k = torch.zeros(2, 1, 1, *x.shape)
    k[0, 0, 0] = x
    v = k.clone()
    with backend.using(name):
        packed_blocks.seal_blocks(k, v, *torch.tensor([[0], [1], [0]]), format=format)
        found = packed_blocks.unpack_blocks(k, v, torch.tensor([1]), torch.tensor([0]), format=format)
    return found[0][0, 0, 0], found[1][0, 0, 0]


def test_a_channel_of_0_1_2_3_is_exact_at_two_bits():
    x = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None].expand(4, 32)
    keys, _ = packed_and_back(x, "kivi2")
    assert torch.equal(keys, x)


def test_ties_round_to_even_codes():
    # scale 10, zero 10: 25 lies between the codes 1 and 2, and 2 is even
    x = torch.tensor([10.0, 20.0, 25.0, 40.0])[:, None].expand(4, 32)
    keys, _ = packed_and_back(x, "kivi2")
    assert keys[:, 0].tolist() == [10.0, 20.0, 30.0, 40.0]
    _, values = packed_and_back(x.T.repeat(1, 8), "kivi2")
    assert values[0, :4].tolist() == [10.0, 20.0, 30.0, 40.0]


def test_keys_per_channel_beat_values_per_token_on_outlier_channels():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::32] += 50.0  # one channel of each group of 32 is far off
    for format in ("kivi4", "kivi2"):
        keys, values = packed_and_back(x, format)
        others = [channel for channel in range(64) if channel % 32]
        assert (keys - x)[:, others].norm() < 0.2 * (values - x)[:, others].norm()


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_errors_stay_within_the_steps_of_each_format(size):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * size
    in_band = (torch.arange(64) < layout.SCALE_BITS).expand(16, -1)  # codes that carry a bit of their token's scale
    for back in packed_and_back(x, "int8"):
        # the scale has 3 mantissa bits and is no less than 2^-23
        step = (x.abs().amax(1, keepdim=True) / 127 * (1 + 1 / 8)).clamp_min(2.0**-23)
        assert ((back - x).abs() <= torch.where(in_band, step, step / 2)).all()
    in_group = in_band & (torch.arange(16) == 0)[:, None]
    for back in packed_and_back(x, "fp8"):
        # 3 mantissa bits, and below 2^-14 of the largest value the spacing of the subnormal codes
        spacing = torch.maximum(x.abs() / 8, 2 * x.abs().max() / 448 / 512)
        assert ((back - x).abs() <= torch.where(in_group, spacing, spacing / 2)).all()
    for format, levels in (("kivi4", 15), ("kivi2", 3)):
        keys, values = packed_and_back(x, format)
        rounding = x.abs().max() * 2**-10 + 1e-7  # of scale and zero, fp16
        by_channel = (x.amax(0) - x.amin(0)) / levels / 2
        assert ((keys - x).abs() <= by_channel + rounding).all()
        groups = x.view(16, 2, 32)
        by_token = ((groups.amax(2) - groups.amin(2)) / levels / 2).repeat_interleave(32, 1)
        assert ((values - x).abs() <= by_token + rounding).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["reference", *IMPLEMENTATIONS])
def test_a_value_that_is_not_finite_comes_back_as_nan(name, format, bad):
    if testing.device_of(name).type != "cpu":
        pytest.skip("runs on the CPU")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    x[2, 9] = bad
    keys, values = packed_and_back(x, format, name)
    assert keys[2, 9].isnan()
    assert values[2, 9].isnan()
    if format != "fp8":  # whose group is the whole block
        assert values[1].isfinite().all()


@pytest.mark.parametrize(
    ("format", "dtype", "places"),
    [
        ("int8", torch.float32, 4),
        ("fp8", torch.float32, 4),
        ("kivi4", torch.float32, 5),
        ("kivi4_rotated", torch.float32, 5),
        ("kivi2", torch.float32, 8),
        ("int8", torch.bfloat16, 2),
        ("fp8", torch.float16, 2),
        ("kivi4", torch.float16, 2),
        ("kivi2", torch.bfloat16, 4),
    ],
)
def test_places_and_bits(format, dtype, places):
    shape = 64, 64, 16, dtype
    assert packed_blocks.packed_places(format, *shape) == places
    assert packed_blocks.packed_bits_per_value(format, *shape) == 8 * dtype.itemsize / places


@pytest.mark.parametrize(("format", "levels"), [("kivi4_rotated", 15), ("kivi2_rotated", 3)])
def test_errors_of_rotated_keys_stay_within_the_steps_of_the_rotated_ones(format, levels):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    keys, values = packed_and_back(x, format)
    assert torch.equal(values, packed_and_back(x, format.removesuffix("_rotated"))[1])
    rotated = hadamard(x)
    by_channel = (rotated.amax(0) - rotated.amin(0)) / levels / 2
    rounding = rotated.abs().max() * 2**-10
    assert ((hadamard(keys) - rotated).abs() <= by_channel + rounding).all()


@pytest.mark.parametrize("format", ["kivi4", "kivi2"])
def test_rotated_keys_miss_less_of_a_query_that_looks_at_a_channel_of_wide_range(format):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 20.0
    q = torch.zeros(64)
    q[3] = 1.0
    plain, rotated = ((packed_and_back(x, name)[0] - x) @ q for name in (format, f"{format}_rotated"))
    assert rotated.norm() < 0.8 * plain.norm()


# ---- attention


@dataclass(frozen=True)
class Batch:
    """Rows over packed blocks of which no other byte is anything but NaN."""

    q: Tensor
    k_pool: Tensor
    v_pool: Tensor
    packed_table: Tensor
    packed_lens: Tensor
    cu_seqlens_q: Tensor
    format: str

    def to(self, device: torch.device) -> Batch:
        tensors = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def run(self, name: str, **options) -> tuple[Tensor, Tensor]:
        batch = self.to(testing.device_of(name))
        arguments = {**vars(batch), "layer": 1, "scale": self.q.shape[2] ** -0.5, **options}
        with backend.using(name):
            out = testing.nan_filled(
                *batch.q.shape[:2], batch.v_pool.shape[4], dtype=batch.q.dtype, device=batch.q.device
            )
            found, lse = packed_blocks.packed_attention(**arguments, out=out)
        assert found is out
        return out.cpu(), lse.cpu()

    def only(self, row: int, first: int, last: int) -> Batch:
        """Queries first to last - 1 of one row, as a batch of its own."""
        start = int(self.cu_seqlens_q[row])
        return replace(
            self,
            q=self.q[start + first : start + last],
            packed_table=self.packed_table[row : row + 1],
            packed_lens=self.packed_lens[row : row + 1],
            cu_seqlens_q=torch.tensor([0, last - first], dtype=torch.int32),
        )


def make_batch(
    rows: list[tuple[int, int]],
    format: str,
    *,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int, int] = DIMS,
    dtype: torch.dtype = torch.float32,
    q_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Batch:
    """rows: (queries, packed tokens) each; the last group may be read in part."""
    generator = torch.Generator().manual_seed(seed)
    places = packed_blocks.packed_places(format, *dims, dtype)
    counts = [-(-length // dims[2]) for _, length in rows]
    num_blocks = 1 + sum(-(-count // places) for count in counts) + sum(counts)
    k, v = pools(num_blocks, dims, dtype, heads[1])
    order = torch.randperm(num_blocks, generator=generator).tolist()
    table = torch.full((len(rows), -(-max(counts, default=0) // places) + 1), 1 << 20, dtype=torch.int32)
    moves = []
    for row, count in enumerate(counts):
        for group in range(count):
            if group % places == 0:
                table[row, group // places] = order.pop()
            moves.append((order.pop(), int(table[row, group // places]), group % places))
    sources = [source for source, _, _ in moves]
    for pool in (k, v):
        if sources:
            pool[sources] = torch.randn(len(sources), *pool.shape[1:], generator=generator).to(dtype)
    k, v = seal("torch", k, v, moves, format)
    for pool in (k, v):
        pool[sources] = torch.nan
    num_queries = [count for count, _ in rows]
    wide = torch.randn(sum(num_queries), 2, heads[0], dims[0], generator=generator).to(q_dtype)
    return Batch(
        q=wide[:, 1],  # strided, as a slice of a fused projection is
        k_pool=k,
        v_pool=v,
        packed_table=table,
        packed_lens=torch.tensor([length for _, length in rows], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *num_queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        format=format,
    )


MIXED = [(1, 48), (5, 16), (0, 32), (3, 0), (1, 295)]

# arguments of make_batch, options of packed_attention
ATTENTION_CASES = {
    "mixed": ({"rows": MIXED}, {}),
    "soft cap": ({"rows": MIXED[:2]}, {"soft_cap": 2.0}),
    "mqa, odd dims": ({"rows": [(1, 20), (2, 9)], "heads": (3, 1), "dims": (20, 12, 3)}, {}),
    "16 bit": ({"rows": MIXED[:2], "dtype": torch.float16, "q_dtype": torch.float16}, {}),
    "several tiles": ({"rows": [(1, 150), (3, 70)], "heads": (6, 1), "dims": (64, 128, 16)}, {}),
}


@pytest.mark.parametrize("case", ATTENTION_CASES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_attention_agrees_with_the_definition_and_reads_no_other_byte(name, format, case):
    arguments, options = ATTENTION_CASES[case]
    batch = make_batch(format=format, **arguments)
    out, lse = batch.run(name, **options)
    expected, expected_lse = batch.run("reference", **options)
    testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5 if batch.q.dtype == torch.float32 else 4e-3, rtol=1e-5)


def test_a_row_without_packed_tokens_gives_zeros_and_minus_infinity():
    out, lse = make_batch([(2, 0)], "int8").run("reference")
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_does_not_depend_on_its_batch(name):
    batch = make_batch(MIXED, "kivi4")
    together, _ = batch.run(name)
    for row, (count, _) in enumerate(MIXED):
        alone, _ = batch.only(row, 0, count).run(name)
        start = int(batch.cu_seqlens_q[row])
        assert torch.equal(alone, together[start : start + count])


@needs_cpp
@pytest.mark.parametrize("format", PLAIN)
def test_one_query_is_bit_for_bit_paged_attention_over_the_unpacked_tokens(format):
    batch = make_batch([(1, 700), (1, 64)], format, heads=(6, 2), dims=(64, 32, 16))
    places = packed_blocks.packed_places(format, 64, 32, 16, torch.float32)
    with backend.using("cpp"):
        blocks, groups = batch.packed_table[:, :-1].flatten(), torch.arange(places)
        used = blocks[blocks < len(batch.k_pool)].long()
        k, v = packed_blocks.unpack_blocks(
            batch.k_pool, batch.v_pool, used.repeat_interleave(places), groups.repeat(len(used)), format=format
        )
        index = {int(block): i * places for i, block in enumerate(used)}
        table = torch.zeros(2, 44, dtype=torch.int32)
        for row, count in enumerate((44, 4)):
            for group in range(count):
                table[row, group] = index[int(batch.packed_table[row, group // places])] + group % places
        expected = kernels.paged_attention(
            batch.q,
            k[:, 1],
            v[:, 1],
            table,
            batch.packed_lens,
            batch.cu_seqlens_q,
            scale=64**-0.5,
            return_lse=True,
        )
    for mine, theirs in zip(batch.run("cpp"), expected, strict=True):
        assert torch.equal(mine, theirs)


@needs_cpp
def test_chunks_waves_and_threads_change_no_bit(monkeypatch):
    batch = make_batch([(40, 600), (1, 300)], "int8")
    whole = batch.run("cpp")
    for first, last in [(0, 1), (7, 23), (16, 40)]:
        for mine, theirs in zip(batch.only(0, first, last).run("cpp"), whole, strict=True):
            assert torch.equal(mine, theirs[first:last])
    monkeypatch.setattr(cpp_impl, "MAX_PARTIALS", 20)
    monkeypatch.setattr(native, "num_threads", lambda: 3)
    for mine, theirs in zip(batch.run("cpp"), whole, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "int3"},
            "unknown packed format 'int3'; known: fp8, int8, kivi4, kivi2, kivi4_rotated",
        ),
        ({"q": torch.zeros(6, 5, 32)}, "does not fit pools"),
        ({"q": torch.zeros(6, 4, 32, dtype=torch.float16)}, "q must be float32 or of the pools' type"),
        ({"q": torch.zeros(7, 4, 32)}, "q has 7 tokens, the plan 6"),
        ({"v_pool": torch.zeros(9, 2, 2, 4, 32)}, "alike"),
        ({"packed_table": torch.zeros(2, 3)}, "must be int32"),
        ({"packed_table": torch.zeros(3, 3, dtype=torch.int32)}, "the plan has 2 rows, packed_table 3"),
    ],
)
def test_disagreeing_inputs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        replace(make_batch([(1, 16), (5, 16)], "int8"), **change).run("torch")


def test_heads_that_a_format_cannot_code_are_refused():
    with pytest.raises(ValueError, match="kivi2 needs a head dim that is a multiple of 4, got 6"):
        packed_blocks.packed_places("kivi2", 32, 6, 16, torch.float32)
    with pytest.raises(ValueError, match="int8 needs a head dim of at least 8, got 4"):
        packed_blocks.packed_places("int8", 4, 32, 16, torch.float32)
    k, ids = torch.zeros(2, 1, 1, 1, 32), torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="kivi4 of 1 tokens does not fit into a block"):
        packed_blocks.seal_blocks(k, k.clone(), *ids, format="kivi4")


def test_a_plan_of_another_implementation_is_refused():
    batch = make_batch([(1, 16)], "int8")
    with backend.using("reference"):
        plan = packed_blocks.plan_packed_attention([0, 1], [16])
    with pytest.raises(ValueError, match=r"made by kernels\.packed_blocks\.reference, .*torch_impl runs"):
        batch.run("torch", plan=plan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [[(1, 3000), (1, 16)], [(9, 2000), (3, 48)]])
@pytest.mark.parametrize("dims", [(64, 64, 16), (128, 128, 32)])
@pytest.mark.parametrize("dtype", testing.FLOAT_DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_triton_on_a_gpu_errs_at_most_twice_as_much_as_torch(format, dtype, dims, rows):
    batch = make_batch(rows, format, heads=(8, 2), dims=dims, dtype=dtype, q_dtype=dtype)
    out, _ = batch.run("triton")
    plain, _ = batch.to(torch.device("cuda")).run("torch")
    exact, _ = replace(batch, q=batch.q.float()).run("torch")
    testing.assert_at_most_twice_the_error(out, plain, exact)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_tokens_that_are_in_no_block_are_sealed_to_the_same_bytes(name, format):
    k, v = pools(4, DIMS)
    for pool in (k, v):
        fill(pool, [1, 3])
    expected = seal(name, k, v, [(1, 2, 1), (3, 0, 0)], format)
    device = testing.device_of(name)
    found = k.clone().to(device), v.clone().to(device)
    tokens = [pool[[1, 3]].clone().to(device) for pool in (k, v)]
    with backend.using(name):
        packed_blocks.seal_groups(*found, *tokens, torch.tensor([2, 0]), torch.tensor([1, 0]), format=format)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(as_bytes(one.cpu()), as_bytes(other))


def test_tokens_of_another_type_or_shape_are_refused():
    k, v = pools(2, DIMS)
    where = torch.tensor([1]), torch.tensor([0])
    with pytest.raises(ValueError, match="tokens are"):
        packed_blocks.seal_groups(k, v, k[:1].half(), v[:1].half(), *where, format="int8")
    with pytest.raises(ValueError, match="tokens are"):
        packed_blocks.seal_groups(k, v, k, v, *where, format="int8")
