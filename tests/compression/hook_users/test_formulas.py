"""One layer's attention with hooks, against formulas written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels
from engine.compression.base import CacheShape, Part, Policy, QueryView, Rewrite, Selection
from engine.compression.hooked import HookedRows
from engine.compression.lists import ListAttention, listed, virtual_part
from engine.compression.scoring import KeepsEverything
from engine.compression.state import RowState
from engine.models.batch import ForwardBatch, KVCache
from engine.scheduling.plan import Chunk, ChunkResult
from kernels import backend, testing
from tests.compression.hook_users.rewriting import ACT, CoreContext, Landmark, pooled
from tests.compression.hook_users.selecting import DoubleSparsity

BLOCK_SIZE, KV_HEADS, DIM, LAYERS, SCALE = 4, 2, 16, 3, 0.3
# Causal probabilities of one head over six tokens: the hand-checkable example of the scores' tests.
F6 = ["1", ".6 .4", ".5 .3 .2", ".4 .1 .4 .1", ".3 .05 .4 .05 .2", ".3 .05 .1 .35 .1 .1"]


def attended(
    policy: Policy, q: Tensor, k: Tensor, v: Tensor, *, scale: float = SCALE, scores: Tensor | None = None,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """Attention of tokens q [n, H, D], k and v [n, H_kv, D] in the second of three layers, from the `first` on, one
    after the other. The first layer has the same keys and values.
    """
    num_tokens, num_kv_heads, dim = k.shape
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    pools = [testing.nan_filled(num_blocks + 3, LAYERS, num_kv_heads, BLOCK_SIZE, dim) for _ in range(2)]
    cache, blocks = KVCache(*pools), torch.randperm(num_blocks + 3)[:num_blocks]
    shape = CacheShape(LAYERS, num_kv_heads, dim, dim, BLOCK_SIZE)
    rows, state = HookedRows(cache), RowState(policy, policy.plan(0, shape), 0, 0)
    state.scores = scores
    rows.add(0, state)
    outs = []
    for layer in (0, 1):
        before = torch.arange(first)
        slots = blocks[before // BLOCK_SIZE] * BLOCK_SIZE + before % BLOCK_SIZE
        kernels.kv_write(k[:first], v[:first], *cache.layer(layer), slots)
    for at in range(first, num_tokens):
        starts, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [at + 1]))
        batch = ForwardBatch(
            token_ids=torch.zeros(1, dtype=torch.int64),
            positions=torch.tensor([at]),
            slots=(blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE).view(1),
            cu_seqlens_q=starts,
            seq_lens=lens,
            block_table=blocks.int().unsqueeze(0),
            max_seqlen_q=1,
            attention_plan=kernels.plan_attention(starts, lens, num_kv_heads=num_kv_heads),
        )
        chunk = Chunk(row=0, start=at, num_tokens=1, new_block_ids=(), is_sampling=True, output_index=0)
        segment = rows.segment([chunk], batch, 0)
        options = {"scale": scale, "window": 0, "soft_cap": 0.0, "sinks": None}
        out = torch.empty(1, *q.shape[1:])
        for layer in (0, 1):
            segment.attend(layer, *(x[at : at + 1] for x in (q, k, v)), out, options)
        rows.commit([chunk], segment, [ChunkResult()])
        outs.append(out)
    return torch.cat(outs)


def random_tokens(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(num_tokens, heads, DIM, generator=generator) for heads in (4, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


def logits_of(q: Tensor, k: Tensor) -> Tensor:
    """[H, n] float64 of one query [H, D] and keys [n, H_kv, D]."""
    grouped = q.double().unflatten(0, (k.shape[1], -1))
    return torch.einsum("hgd,nhd->hgn", grouped, k.double()).flatten(0, 1) * SCALE


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """weights [H, n], v [n, H_kv, D] -> [H, D]."""
    return torch.einsum("hgn,nhd->hgd", weights.unflatten(0, (v.shape[1], -1)), v.double()).flatten(0, 1)


class Chosen(KeepsEverything):
    """Answers what a function of the view says."""

    name = "chosen"

    def __init__(self, answer: Callable[[QueryView], Selection | Rewrite | None], *, rewrites: bool = False) -> None:
        setattr(self, "rewrite" if rewrites else "select", answer)


@pytest.mark.parametrize("of_blocks", [False, True])
def test_a_list_in_any_order_and_twice_is_read_once_with_the_newest_block(of_blocks: bool) -> None:
    q, k, v = random_tokens(11)
    index = torch.tensor([[[5, 0, 5, -1, 99, 9]], [[2, -1, 1, 1, -1, -1]]]).transpose(0, 1)  # [1, H_kv, K]
    found = attended(Chosen(lambda view: Selection(index, of_blocks)), q, k, v)[-1]
    for head in range(KV_HEADS):
        named = {item for item in index[0, head].tolist() if item >= 0}
        slots = {slot for slot in range(8) if (slot // BLOCK_SIZE if of_blocks else slot) in named} | {8, 9, 10}
        kept = torch.tensor(sorted(slots))
        heads = slice(head * 2, head * 2 + 2)
        weights = logits_of(q[-1], k[kept])[heads].softmax(1)
        torch.testing.assert_close(found[heads].double(), weights @ v[kept, head].double(), atol=1e-5, rtol=1e-5)


def test_a_list_of_everything_has_the_bits_of_attention_as_usual() -> None:
    tokens = random_tokens(300)
    plain = attended(Chosen(lambda view: None), *tokens, first=290)
    slots, blocks = (torch.arange(400).view(1, 1, -1) // size for size in (1, BLOCK_SIZE))
    assert torch.equal(attended(Chosen(lambda view: Selection(slots)), *tokens, first=290), plain)
    assert torch.equal(attended(Chosen(lambda view: Selection(blocks, of_blocks=True)), *tokens, first=290), plain)


def test_parts_of_a_division_are_one_softmax() -> None:
    q, k, v = random_tokens(13)

    def divided(view: QueryView) -> Rewrite:
        slots = torch.arange(13)
        return Rewrite([Part(slots.where(slots % 3 == part, -1).view(1, 1, -1)) for part in range(3)])

    plain = attended(Chosen(lambda view: None), q, k, v)
    torch.testing.assert_close(attended(Chosen(divided, rewrites=True), q, k, v), plain, atol=1e-5, rtol=1e-5)


def test_act_gives_the_rows_of_the_hand_checked_example() -> None:
    table = torch.tensor([[float(x) for x in row.split()] + [0.0] * (6 - len(row.split())) for row in F6])
    q = (table.clamp_min(1e-30).log() * math.sqrt(DIM)).unsqueeze(1)
    q = torch.nn.functional.pad(q, (0, DIM - 6))
    one_hot = torch.eye(6, DIM).unsqueeze(1)
    scores = table.sum(0).view(1, 1, 1, 6).expand(1, LAYERS, 1, 6)
    options = {"scale": 1 / math.sqrt(DIM), "scores": scores}
    found = attended(ACT(threshold=0.25, beta=0.4), q, one_hot, one_hot, **options)[:, 0, :6]  # type: ignore[arg-type]
    expected = {
        2: [0.575, 0.345, 0.08, 0, 0, 0],
        4: [0.42, 0.07, 0.16, 0.07, 0.28, 0],
        5: [0.32, 0.0533, 0.04, 0.3733, 0.1067, 0.1067],
    }
    for row, weights in expected.items():
        torch.testing.assert_close(found[row], torch.tensor(weights), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(6))
    plain = attended(ACT(threshold=0.25, beta=1.0), q, one_hot, one_hot, **options)[:, 0, :6]  # type: ignore[arg-type]
    torch.testing.assert_close(plain, table, atol=1e-5, rtol=1e-5)


def test_landmarks_give_what_they_get_to_their_blocks() -> None:
    q, k, v = random_tokens(14)
    found = attended(Landmark(block=4, num_blocks=9), q, k, v)[-1]
    logits, expected = logits_of(q[-1], k), torch.zeros(4, 14, dtype=torch.float64)
    groups = torch.cat([logits[:, 3:12:4], logits[:, 12:]], dim=1).softmax(1)  # three landmarks, two own tokens
    expected[:, 12:] = groups[:, 3:]
    for block in range(3):
        members = slice(4 * block, 4 * block + 3)
        expected[:, members] = logits[:, members].softmax(1) * groups[:, block : block + 1]
    torch.testing.assert_close(found.double(), weighted(expected, v), atol=1e-5, rtol=1e-5)


def test_pooled_groups_are_read_in_one_softmax_with_the_window() -> None:
    q, k, v = random_tokens(14)
    found = attended(CoreContext(group=4, window=5), q, k, v)[-1]
    cores = [
        pooled(q[end - 1], *(x[end - 4 : end].transpose(0, 1) for x in (k, v)), SCALE)
        for end in (4, 8)  # groups that end before the last five tokens
    ]
    keys, values = (torch.cat([*[core[i].transpose(0, 1) for core in cores], x[8:]]) for i, x in enumerate((k, v)))
    torch.testing.assert_close(
        found.double(), weighted(logits_of(q[-1], keys).softmax(1), values), atol=1e-5, rtol=1e-5
    )


def test_with_all_channels_double_sparsity_is_the_exact_top_k(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_tokens(40)
    channels = torch.stack([torch.randperm(DIM) for _ in range(LAYERS * KV_HEADS)]).view(LAYERS, KV_HEADS, DIM)
    monkeypatch.setattr(DoubleSparsity, "channels", channels, raising=False)
    found = attended(DoubleSparsity(budget=5, share=1), q, k, v)[-1]
    logits = logits_of(q[-1], k)
    for head in range(KV_HEADS):
        heads = slice(head * 2, head * 2 + 2)
        best = logits[heads].amax(0).topk(5).indices
        kept = torch.tensor(sorted({*best.tolist(), 36, 37, 38, 39}))
        expected = logits[heads][:, kept].softmax(1) @ v[kept, head].double()
        torch.testing.assert_close(found[heads].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*testing.implementations("paged_attention"), "reference"])
def test_lists_of_tokens_with_keys_of_another_layer(name: str) -> None:
    """Every implementation of attention, on a view of the pools in blocks of one slot; lists that differ by head, and
    one that is empty.
    """
    device = testing.device_of(name)
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(6, LAYERS, KV_HEADS, BLOCK_SIZE, DIM, generator=generator) for _ in range(2))
    q = torch.randn(3, 4, DIM, generator=generator)
    blocks, index = torch.tensor([4, 0, 5]), torch.full((3, KV_HEADS, 7), -1)
    for query in range(2):
        for head in range(KV_HEADS):
            count = 3 + query + 2 * head
            index[query, head, :count] = torch.randperm(12, generator=generator)[:count]
    lists = ListAttention(KVCache(k.to(device), v.to(device)))
    chosen = listed(index, torch.full((3,), 12), 12)
    tables = [x.to(device) for x in lists.of_tokens(chosen.to(device), 7, blocks.to(device))]
    options = {"scale": SCALE, "window": 0, "soft_cap": 0.0, "sinks": None}
    with backend.using(name):
        out, lse = (x.cpu() for x in lists.run_tokens(2, 0, q.to(device), *tables, options))  # type: ignore[arg-type]
    for query in range(2):
        for head in range(KV_HEADS):
            slots = index[query, head][index[query, head] >= 0]
            where = blocks[slots // BLOCK_SIZE], slots % BLOCK_SIZE
            keys, values = (pool[where[0], layer, head, where[1]].double() for pool, layer in ((k, 0), (v, 2)))
            logits = q[query, 2 * head : 2 * head + 2].double() @ keys.T * SCALE
            expected = (logits.softmax(1) @ values).float()
            torch.testing.assert_close(out[query, 2 * head : 2 * head + 2], expected, atol=1e-5, rtol=1e-5)
            found = lse[query, 2 * head : 2 * head + 2].double()
            torch.testing.assert_close(found, logits.logsumexp(1), atol=1e-5, rtol=1e-5)
    assert out[2].eq(0).all()
    assert lse[2].eq(-torch.inf).all()


def test_a_virtual_key_with_a_bias_stands_for_many() -> None:
    q, k, v = random_tokens(1)
    options = {"scale": SCALE, "window": 0, "soft_cap": 0.0, "sinks": None}
    keys, values = (torch.cat([x, x * 2]).transpose(0, 1).unsqueeze(0) for x in (k, v))  # [1, H_kv, 2, D]
    bias = torch.tensor([math.log(3.0), 0.0]).expand(1, KV_HEADS, 2)
    out, lse = virtual_part(q, keys, values, bias, options)
    logits = logits_of(q[0], torch.cat([k, k, k, k * 2]))
    expected = weighted(logits.softmax(1), torch.cat([v, v, v, v * 2]))
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0].double(), logits.logsumexp(1), atol=1e-5, rtol=1e-5)
    nothing, none = virtual_part(q, keys, values, torch.full_like(bias, -torch.inf), options)
    assert nothing.eq(0).all()
    assert none.eq(-torch.inf).all()
