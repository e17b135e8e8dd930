"""Pooling rows on their own: chunks in any cut, chunks run twice, numbers that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.execution.pooling import PoolingRows
from engine.models.encoder import MAX_PADDING, batches
from engine.models.pooling import Pooler
from engine.models.pooling_config import ClassifierConfig, PoolerConfig
from engine.scheduling.plan import Chunk, ChunkResult
from engine.types import PoolingMethod, PoolingParams

HIDDEN = torch.randn(23, 8, generator=torch.Generator().manual_seed(1)) * 3
METHODS: tuple[PoolingMethod, ...] = ("last", "mean", "cls", "weighted")


def rows_for(classifier: ClassifierConfig | None = None) -> PoolingRows:
    score = torch.randn(2, 8, generator=torch.Generator().manual_seed(2)) if classifier else None
    return PoolingRows(Pooler(PoolerConfig("mean", classifier=classifier), 8, [], score))


def feed(rows: PoolingRows, params: PoolingParams, cuts: list[int], hidden: torch.Tensor = HIDDEN) -> ChunkResult:
    """Row 3 gets the prompt in chunks that end at `cuts`; each is run twice, as after another row's failure."""
    rows.add(3, params)
    results: list[ChunkResult] = []
    for start, end in zip([0, *cuts[:-1]], cuts, strict=True):
        chunk = Chunk(3, start, end - start, (), is_sampling=False, output_index=0)
        results = [rows.take(chunk, hidden[start:end], len(hidden)) for _ in range(2)]
        assert results[0] == results[1]
        assert (results[0].pooled is not None) == (end == len(hidden))
    return results[-1]


@pytest.mark.parametrize("method", METHODS)
def test_cuts_and_repeats_do_not_show(method: PoolingMethod) -> None:
    params = PoolingParams(method=method)
    whole = feed(rows_for(), params, [23])
    for cuts in ([1, 23], [22, 23], [5, 6, 7, 23], list(range(1, 24))):
        assert feed(rows_for(), params, cuts) == whole


def test_a_row_that_is_taken_again_starts_over() -> None:
    rows, params = rows_for(), PoolingParams(method="mean")
    rows.add(3, params)
    rows.take(Chunk(3, 0, 9, (), is_sampling=False, output_index=0), HIDDEN[:9] + 100, 23)
    assert feed(rows, params, [4, 23]) == feed(rows_for(), params, [23])
    rows.remove(3)
    rows.remove(3)
    assert 3 not in rows


def test_token_embeddings_keep_their_order_and_shape() -> None:
    result = feed(rows_for(), PoolingParams(task="token_embed", activate=False), [5, 17, 23])
    assert result.pooled is not None
    data, shape = result.pooled
    assert shape == (23, 8)
    assert np.array_equal(np.frombuffer(data, "<f4").reshape(shape), HIDDEN.numpy())


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "identity"])
def test_class_scores_are_activated_unless_asked_otherwise(activation: str) -> None:
    classifier = ClassifierConfig(("a", "b"), activation)  # type: ignore[arg-type]
    raw = feed(rows_for(classifier), PoolingParams(task="classify", activate=False), [9, 23])
    scores = feed(rows_for(classifier), PoolingParams(task="classify"), [9, 23])
    assert raw.pooled is not None
    assert scores.pooled is not None
    logits = torch.from_numpy(np.frombuffer(raw.pooled[0], "<f4").copy())
    expected = {"sigmoid": logits.sigmoid(), "softmax": logits.softmax(0), "identity": logits}[activation]
    assert np.frombuffer(scores.pooled[0], "<f4").tolist() == pytest.approx(expected.tolist())


def test_results_that_are_not_finite_are_an_error() -> None:
    hidden = HIDDEN.clone()
    hidden[4, 0] = torch.nan
    rows = rows_for()
    rows.add(3, PoolingParams(method="mean"))
    chunk = Chunk(3, 0, 23, (), is_sampling=False, output_index=0)
    assert rows.take(chunk, hidden, 23).error == "numerical_error"


def test_batches_hold_every_text_once_with_little_padding() -> None:
    lengths = [int(n) for n in np.random.RandomState(0).randint(1, 400, 200)]
    found = batches(lengths)
    assert sorted(index for batch in found for index in batch) == list(range(200))
    for batch in found:
        own = [lengths[index] for index in batch]
        assert len(own) * max(own) <= sum(own) * (1 + MAX_PADDING)
    assert len(found) < 20
