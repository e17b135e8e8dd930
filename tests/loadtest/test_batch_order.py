"""The planned order on Mimir: every shared prefix is computed once, and the answers do not change."""

from __future__ import annotations

import torch

from engine.batching.ordering import num_computed_tokens, plan
from engine.launch import resolve_model_path
from engine.models import load_model
from loadtest.batch_order import BLOCK_SIZE, items_of, measure, workload


def test_the_planned_order_computes_each_prefix_once_and_gives_the_same_tokens() -> None:
    model = load_model(resolve_model_path("mimir"), device=torch.device("cpu"))
    requests = workload(num_prefixes=4, num_requests=4, prefix_tokens=384, tail_tokens=24)
    items = items_of(requests)
    results = [measure(model, requests, 1024 // BLOCK_SIZE, is_planned=flag) for flag in (False, True)]
    assert results[1].prompt_tokens_computed == num_computed_tokens(plan(items, BLOCK_SIZE), items)
    assert results[1].prompt_tokens_computed * 1.5 < results[0].prompt_tokens_computed
    assert results[0].outputs == results[1].outputs
    assert len(results[0].outputs) == len(requests)
