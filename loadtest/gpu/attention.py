"""Attention against the copy bandwidth and the best library: decoding in all forms of the cache, and prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loadtest.gpu.contexts import BLOCK_SIZE, Contexts
from loadtest.gpu.libraries import attention, best_ms
from loadtest.gpu.record import Run, Target, relative_error

DECODE = Target("share_of_copy", 0.85)
PREFILL = Target("ratio_to_best_library", 0.70)
FORMATS = ("fp8", "int8", "kivi4")
TREE_NODES = (4, 16, 64)
KEPT = 4096  # slots of a list

# Rows and slots: half a million tokens each, then few rows.
MANY_ROWS = ((512, 1024), (64, 8192), (16, 32768), (4, 131072))
FEW_ROWS = ((1, 8192), (1, 32768), (1, 131072))


def measure_decode(run: Run) -> None:
    """One new token a row; the floor is reading all that is visible once."""
    sizes = ((3, 64), (1, 128)) if run.tiny else MANY_ROWS + FEW_ROWS
    for rows, length in sizes:
        case = f"bf16 {rows} x {length}"
        if run.has_time(case, 3):
            with run.case(case):
                _decode_paged(run, case, rows, length)
    rows, length = sizes[0] if run.tiny else (16, 32768)
    contexts = Contexts.make(run, rows, length)
    for name in FORMATS:
        if run.has_time(name, 3):
            with run.case(name):
                _decode_packed(run, contexts, name)
    kept = min(KEPT, length // 2)
    for name, call in (("block lists", contexts.block_lists(kept)), ("token lists", contexts.token_lists(kept))):
        if run.has_time(name, 3):
            with run.case(name):
                ms = run.ms(call, in_graph=True)
                num_bytes = contexts.num_bytes * kept // length
                share = run.share_of_copy(num_bytes, ms)
                run.record(f"{name}, {kept} of {rows} x {length}", ms=ms, share_of_copy=share)
    del contexts
    for nodes in TREE_NODES[: run.size(3, 1)]:
        if run.has_time("tree rows", 3):
            with run.case(f"trees of {nodes}"):
                _decode_trees(run, rows, length, nodes)


def _decode_paged(run: Run, case: str, rows: int, length: int) -> None:
    contexts = Contexts.make(run, rows, length)
    call = contexts.paged()
    error = _error_of(call(), contexts)
    ms, eager_ms = run.ms(call, in_graph=True), run.ms(call)
    best, libraries = best_ms(attention(*contexts.dense()), lambda call: run.ms(call, in_graph=True))
    run.record(
        f"decode {case}",
        DECODE if length >= 8192 or run.tiny else None,
        ms=ms,
        eager_ms=eager_ms,
        error=None if error < 2e-2 else f"relative error {error:.3g}",
        relative_error=error,
        share_of_copy=run.share_of_copy(contexts.num_bytes, ms),
        ratio_to_best_library=float(libraries[best]) / ms,
        best_library=best,
        library_ms=libraries,
    )


def _decode_packed(run: Run, contexts: Contexts, name: str) -> None:
    call, num_bytes, decoded = contexts.packed(name)
    dense_ms = run.ms(contexts.paged(), in_graph=True)
    ms = run.ms(call, in_graph=True)
    run.record(
        f"decode {name} {contexts.rows} x {contexts.length}",
        Target("speedup_over_dense", 1.0),
        ms=ms,
        relative_error=_error_of(call(), decoded()),
        share_of_copy=run.share_of_copy(num_bytes, ms),
        speedup_over_dense=dense_ms / ms,
    )


def _decode_trees(run: Run, rows: int, length: int, nodes: int) -> None:
    """Binary trees behind the last token: what a step costs that verifies so many guesses of each row."""
    parents = [-1, *((node - 1) // 2 for node in range(1, 1 + nodes))] * rows
    plain = Contexts.make(run, rows, length)
    wide = Contexts.make(run, rows, length, queries=1 + nodes)
    one_ms, ms = run.ms(plain.paged(), in_graph=True), run.ms(wide.paged(parents), in_graph=True)
    run.record(f"decode trees of {nodes}, {rows} x {length}", ms=ms, cost_over_one_token=ms / one_ms)


def measure_prefill(run: Run) -> None:
    """Whole prompts, and a chunk at the end of a long one, against the best library attention."""
    sizes = ((64, 64), (16, 64)) if run.tiny else ((2048, 2048), (8192, 8192), (32768, 32768), (512, 32768))
    for queries, length in sizes:
        case = f"prefill {queries} of {length}"
        if run.has_time(case, 4):
            with run.case(case):
                _prefill(run, case, queries, length)


def _prefill(run: Run, case: str, queries: int, length: int) -> None:
    contexts = Contexts.make(run, 1, length, queries)
    call = contexts.paged()
    error = _error_of(call()[-BLOCK_SIZE:], contexts, BLOCK_SIZE)
    ms = run.ms(call)
    best, libraries = best_ms(attention(*contexts.dense()), run.ms)
    pairs = queries * (length - queries) + queries * (queries + 1) // 2  # of a query and a key that it sees
    run.record(
        case,
        PREFILL,
        ms=ms,
        error=None if error < 2e-2 else f"relative error {error:.3g}",
        relative_error=error,
        tflops=4 * contexts.heads.query * contexts.heads.dim * pairs / 1e9 / ms,
        ratio_to_best_library=float(libraries[best]) / ms,
        best_library=best,
        library_ms=libraries,
    )


def _error_of(out: Tensor, contexts: Contexts, last: int = 1) -> float:
    """Against float32 attention of torch: the last queries of the first row, or every row's only one."""
    rows = min(contexts.rows, 4)
    q, k, v = (x.float() for x in contexts.dense(rows))
    q = q[:, :, -last:]
    mask = torch.ones(last, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - last)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # [R, H, n, D]
    return relative_error(out[: rows * last], expected.transpose(1, 2).flatten(0, 1))
