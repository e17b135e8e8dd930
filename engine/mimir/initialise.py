"""Initial weights from which in-context lookup appears in a minute instead of an hour.

An induction circuit needs two layers to agree: one that copies each token's predecessor forward, one that matches it
with the current token. Random weights find that pair slowly, so the first layers start as such a circuit, in the spirit
of mimetic initialisation (Trockman and Kolter 2023, arXiv:2305.09828; for recall: arXiv:2410.11135). Differs: the
previous-token pattern is written through the rotary phases, a second kv head does the same one token further back (so
that pairs of tokens are matched), matching uses only the slow rotary pairs, and what would drown the circuit
(feed-forward outputs, the other layers' attention) starts small. All weights stay trainable.
"""

import torch
from torch import Tensor

from engine.mimir.model import Attention, Mimir

NUM_SHARP_PAIRS = 5  # the fastest rotary pairs, the only ones that tell distance 1 from 0 and 2
MAX_DISTANCE = 2  # predecessors that are forwarded
NUM_FAST_PAIRS = 6  # pairs that turn too fast to carry content over a distance; matching leaves them out
PHASE_GAIN = 8.0  # size of query and key in each sharp pair
SHARED_SHARE = 0.7  # length of the direction all embeddings share, relative to the rest of an embedding
FORWARD_GAIN = 0.24  # predecessor written into the residual stream, by all heads of a group together
MATCH_GAIN = 3.0
COPY_GAIN = 0.8  # of what was found, by all heads of a group together
LOGIT_GAIN = 3.0  # weight of the final norm, so that what is copied is also said
QUIET_GAIN = 0.1  # scale of every other output projection


@torch.no_grad()
def structure_induction(model: Mimir, seed: int = 1) -> None:
    """Overwrite the attention of the first layers of a freshly initialised model with an induction circuit.

    The width is divided into orthogonal parts: one direction shared by all embeddings, which position-only attention
    reads; one part for each kv head's predecessor; the rest for the token itself.
    """
    shape = model.shape
    generator = torch.Generator().manual_seed(seed)
    model.norm.weight.fill_(LOGIT_GAIN)
    for layer in model.blocks():
        layer.mlp.down_proj.weight.mul_(QUIET_GAIN)
        layer.self_attn.o_proj.weight.mul_(QUIET_GAIN)
    basis, _ = torch.linalg.qr(torch.randn(shape.width, shape.width, generator=generator))
    num_slow = shape.head_dim - 2 * NUM_FAST_PAIRS
    num_parts = min(MAX_DISTANCE, shape.num_kv_heads)
    sizes = (1, *[num_slow] * num_parts, shape.width - 1 - num_slow * num_parts)
    shared, *parts, content = basis.T.split(sizes)  # rows of length C
    weight = model.embed_tokens.weight
    weight.copy_(weight @ content.T @ content)
    weight.add_(SHARED_SHARE * weight.norm(dim=1).mean() * shared)
    first, second, *_ = (layer.self_attn for layer in model.blocks())
    _forward_previous(first, shared[0], content[:num_slow], parts)
    _match_and_copy(second, content, [content[:num_slow], *parts])


def _forward_previous(attention: Attention, shared: Tensor, matched: Tensor, parts: list[Tensor]) -> None:
    """The heads of kv group i attend to distance i + 1 and write that token's `matched` part into `parts[i]`."""
    shape = attention.shape
    half = shape.head_dim // 2
    theta = shape.rope_theta ** -(torch.arange(half) / half)
    sharp = (torch.arange(half) < NUM_SHARP_PAIRS).float()
    # The normalised input holds `shared` with length share * sqrt(C), where share follows from SHARED_SHARE.
    gain = PHASE_GAIN / (SHARED_SHARE / (1 + SHARED_SHARE**2) ** 0.5 * shape.width**0.5)
    query = torch.cat((sharp, torch.zeros(half))) * gain
    per_group = shape.num_heads // shape.num_kv_heads
    for kv_head, part in enumerate(parts):
        phase = (kv_head + 1) * theta
        key = torch.cat((sharp * phase.cos(), sharp * phase.sin())) * gain  # a key that pretends to stand later
        rows = _rows(kv_head, shape.head_dim)
        attention.k_proj.weight[rows].mul_(0.1).add_(torch.outer(key, shared))
        attention.v_proj.weight[rows][: len(part)] = matched
        for head in range(kv_head * per_group, (kv_head + 1) * per_group):
            rows = _rows(head, shape.head_dim)
            attention.q_proj.weight[rows].mul_(0.1).add_(torch.outer(query, shared))
            attention.o_proj.weight[:, rows][:, : len(part)] = part.T * (FORWARD_GAIN / per_group)


def _match_and_copy(attention: Attention, content: Tensor, chain: list[Tensor]) -> None:
    """Kv group i compares `chain[i]` of the query's token with `chain[i + 1]` of the key's and copies what it finds."""
    shape = attention.shape
    slow = (torch.arange(shape.head_dim) % (shape.head_dim // 2)) >= NUM_FAST_PAIRS
    per_group = shape.num_heads // shape.num_kv_heads
    for kv_head in range(len(chain) - 1):
        rows = _rows(kv_head, shape.head_dim)
        attention.k_proj.weight[rows] *= 0.1
        attention.k_proj.weight[rows][slow] = chain[kv_head + 1] * MATCH_GAIN
        copied = content[rows] if (kv_head + 1) * shape.head_dim <= len(content) else content[-shape.head_dim :]
        attention.v_proj.weight[rows] = copied
        for head in range(kv_head * per_group, (kv_head + 1) * per_group):
            query_rows = _rows(head, shape.head_dim)
            attention.q_proj.weight[query_rows] *= 0.1
            attention.q_proj.weight[query_rows][slow] = chain[kv_head] * MATCH_GAIN
            attention.o_proj.weight[:, query_rows] = copied.T * (COPY_GAIN / per_group)


def _rows(head: int, head_dim: int) -> slice:
    return slice(head * head_dim, (head + 1) * head_dim)
