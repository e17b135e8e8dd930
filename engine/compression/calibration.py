"""Measures what policies must know of a loaded model: retrieval heads (RazorAttention) and GemFilter's layer.

Sources: the two policies' files. One forward pass on repeated random tokens tells the heads; the layer is the one whose
choice keeps the most of needles in prose. Shape letters: S tokens, H query heads, H_kv kv heads, D head_dim, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

import kernels
from engine.compression.artefacts import Artefacts
from engine.compression.gemfilter import GemFilter, filter_logits
from engine.compression.razor_attention import echo_and_induction, retrieval_heads
from engine.errors import ConfigError
from engine.mimir.tasks import make_chat
from engine.models.batch import ForwardBatch, KVCache, Model

REPEATED_TOKENS = 256
NUM_COPIES = 4
NUM_NEEDLES = 24
NEEDLE_TOKENS = 512
KEPT_SHARE = 0.1  # of a needle's prompt: few enough that a layer which does not look for the needle loses it
FILTER_RECENT = 8
ENOUGH = 0.9  # of the best layer's recall


@dataclass(frozen=True)
class Needle:
    """token_ids of a prompt whose question the tokens [first, last) answer."""

    token_ids: list[int]
    first: int
    last: int


def calibrate(model: Model, digest: str, bos: int | None, needles: Sequence[Needle], seed: int = 0) -> Artefacts:
    """bos: the token that begins texts, if there is one. Raises ConfigError for a context too short to repeat in."""
    echo, induction = head_scores(model, bos, seed)
    spec = model.spec
    recall = filter_recall(model, needles) if needles else None
    best = None
    if recall is not None and recall.any():
        # of layers that find about as much the first: fewer layers then run over the whole prompt
        best = int((recall >= ENOUGH * recall.max()).nonzero()[0])
    return Artefacts(
        model=digest,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        retrieval_heads=retrieval_heads(echo, induction, spec.num_kv_heads),
        echo=_rounded(echo),
        induction=_rounded(induction),
        filter_layer=best,
        filter_recall=() if recall is None else _rounded(recall.unsqueeze(0))[0],
    )


def head_scores(model: Model, bos: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Echo and induction score of every query head: two [L, H] float32."""
    length = min(REPEATED_TOKENS, (model.max_model_len - 1) // NUM_COPIES)
    if length < 8:
        raise ConfigError(f"the model takes {model.max_model_len} tokens; calibration repeats at least 8 four times")
    numbers = Random(seed)
    repeated = [numbers.randrange(model.vocab_size) for _ in range(length)]
    first = repeated[-1] if bos is None else bos
    scores: dict[int, tuple[Tensor, Tensor]] = {}

    def see(layer: int, q: Tensor, k: Tensor, probabilities: Callable[[], Tensor]) -> None:
        scores[layer] = echo_and_induction(probabilities(), length)

    _forward(model, [first, *repeated * NUM_COPIES], see)
    echo, induction = zip(*(scores[layer] for layer in range(model.spec.num_layers)), strict=True)
    return torch.stack(echo), torch.stack(induction)


def filter_recall(model: Model, needles: Sequence[Needle]) -> Tensor:
    """Share of the needles' tokens that a prompt filtered by each layer still has: [L] float32."""
    kept = torch.zeros(model.spec.num_layers)
    policy = GemFilter(ratio=KEPT_SHARE, num_recent=FILTER_RECENT)
    for needle in needles:

        def see(layer: int, q: Tensor, k: Tensor, probabilities: Callable[[], Tensor], needle: Needle = needle) -> None:
            chosen = policy.choose(filter_logits(q[-1], k.transpose(0, 1)))
            assert chosen is not None
            inside = (chosen >= needle.first) & (chosen < needle.last)
            kept[layer] += inside.sum().item() / (needle.last - needle.first)

        _forward(model, needle.token_ids, see)
    return kept / len(needles)


def make_needles(encode: Callable[[str], list[int]], render: Callable[[str], str], max_tokens: int) -> list[Needle]:
    """Facts in filler with a question about them, in the tokens of a model.

    render  a user's message -> the prompt that the model is given
    """
    found = []
    for seed in range(NUM_NEEDLES):
        chat = make_chat("needle_single", seed, min(NEEDLE_TOKENS, max_tokens // 2))
        text = render("\n".join(turn.text for turn in chat.turns[:-1]))
        start = text.find(chat.answer)
        ids = encode(text)
        first, last = (len(encode(text[:end])) for end in (start, start + len(chat.answer)))
        if start >= 0 and first < last <= len(ids) <= max_tokens:
            found.append(Needle(ids, max(0, first - 1), last))
    return found


See = Callable[[int, Tensor, Tensor, Callable[[], Tensor]], None]


@torch.inference_mode()
def _forward(model: Model, token_ids: list[int], see: See) -> None:
    """One pass over one text; `see` gets each layer's queries [S, H, D], keys [S, H_kv, D] and, when it calls for them,
    probabilities [H, S, S].
    """
    num_tokens, device = len(token_ids), model.device
    spec, hook = model.spec, _Plain(see)
    starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    lengths = torch.tensor([num_tokens], dtype=torch.int32)
    # nobody reads the cache: the hook attends to the text itself
    empty = torch.zeros(1, spec.num_layers, spec.num_kv_heads, 1, spec.head_dim, device=device)
    batch = ForwardBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.arange(num_tokens, device=device),
        slots=torch.full((num_tokens,), -1, device=device),
        cu_seqlens_q=starts.to(device),
        seq_lens=lengths.to(device),
        block_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
        max_seqlen_q=num_tokens,
        attention_plan=kernels.plan_attention(starts, lengths, num_kv_heads=spec.num_kv_heads, device=device),
        attention=hook,
    )
    model.forward(batch, KVCache(empty, empty))


class _Plain:
    """Causal attention written out, one kv head at a time, so that its probabilities can be looked at."""

    def __init__(self, see: See) -> None:
        self._see = see

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int, soft_cap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `engine.models.batch.AttentionHook`; nothing is written to the cache."""

        def probabilities() -> Tensor:
            return torch.cat([_softmax(q, k, head, scale, window, soft_cap, sinks) for head in range(k.shape[1])])

        self._see(layer, q, k, probabilities)
        parts = [
            _softmax(q, k, head, scale, window, soft_cap, sinks) @ v[:, head].float() for head in range(k.shape[1])
        ]
        return torch.cat(parts).transpose(0, 1).to(q.dtype).contiguous()

    def packed(self) -> None:
        """Nothing that the native step does."""


def _softmax(
    q: Tensor, k: Tensor, head: int, scale: float, window: int, soft_cap: float, sinks: Tensor | None
) -> Tensor:
    """Probabilities of the query heads of one kv head: [G, S, S] float32."""
    group = q.shape[1] // k.shape[1]
    heads = slice(head * group, (head + 1) * group)
    logits = q[:, heads].float().transpose(0, 1) @ k[:, head].float().T * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    place = torch.arange(len(q), device=q.device)
    distance = place.unsqueeze(1) - place
    hidden = distance < 0 if not window else (distance < 0) | (distance >= window)
    logits = logits.masked_fill(hidden, -torch.inf)
    if sinks is None:
        return logits.softmax(-1)
    sink = sinks[heads].float().view(-1, 1, 1).expand(-1, len(q), 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]


def _rounded(scores: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(round(value, 4) for value in row) for row in scores.tolist())
