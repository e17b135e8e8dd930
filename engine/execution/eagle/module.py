"""The head as it is trained: what it computes at each depth of a draft, for all places of many texts at once.

Source: Li et al. 2024, "EAGLE", arXiv:2401.15077, section 4.1; unrolled as in EAGLE-3, arXiv:2503.01840, section 3.2.
Differs from EAGLE-1: the layer has its input norm, and a norm of its own makes the output a feature; features are the
target's hidden states behind its last norm. Shape letters: B texts, T entries, C width, H query heads, H_kv kv heads,
D head_dim. Entry t of a text stands for the feature of token t and the token behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.execution.eagle.files import HeadShape
from engine.models.rope import build_rope_table

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class HeadModule(nn.Module):
    """Parameter names equal those of `HeadShape.tensors`."""

    cos_sin: Tensor  # [max_entries, D]
    input_scale: Tensor  # [2 C]

    def __init__(self, shape: HeadShape, max_entries: int) -> None:
        """max_entries: longest text of a batch."""
        super().__init__()
        self.shape = shape
        width, inner = shape.hidden_size, shape.intermediate_size
        self.heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.attention_norm = nn.RMSNorm(width, eps=shape.norm_eps)
        self.qkv = nn.Linear(width, sum(self.heads) * shape.head_dim, bias=False)
        self.o = nn.Linear(shape.num_heads * shape.head_dim, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=shape.norm_eps)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=shape.norm_eps)
        self.register_buffer("cos_sin", build_rope_table(shape.rope, max_entries).cos_sin, persistent=False)
        # embeddings are often much smaller than features, and one learning rate has to do for both
        self.register_buffer("input_scale", torch.ones(2 * width), persistent=False)

    def adopt_sizes(self, embeddings: Tensor, features: Tensor) -> None:
        """Learns how large inputs and outputs are: before training, from some rows [n, C] of each."""
        width = self.shape.hidden_size
        for part, rows in ((slice(width), embeddings), (slice(width, None), features)):
            self.input_scale[part] = rows.pow(2).mean().sqrt().clamp(min=1e-6).reciprocal()
        with torch.no_grad():
            self.norm.weight.copy_(features.pow(2).mean(0).sqrt())

    def weights(self) -> dict[str, Tensor]:
        """What is served, by the names of `HeadShape.tensors`."""
        found = {name: weight.detach().clone() for name, weight in self.state_dict().items()}
        found["fc.weight"] *= self.input_scale
        return found

    def forward(self, embeddings: Tensor, features: Tensor, depth: int) -> list[Tensor]:
        """What drafts of so many tokens would compute at every entry: a list of [B, T, C], of depths 1 to `depth`.

        embeddings, features  [B, T, C], of the token behind each entry's place and of the place itself
        At depth d an entry sees true entries up to d - 1 places before it, and drafted ones from there on, whose
        features are those predicted one depth before, one place earlier.
        """
        length = features.shape[1]
        place = torch.arange(length, device=features.device)
        found: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        true_keys = true_values = None
        for level in range(depth):
            x = self.fc(torch.cat((embeddings, features), dim=-1) * self.input_scale)
            q, k, v = self._project(self.attention_norm(x))
            if level == 0:
                true_keys, true_values = k, v
            else:
                keys, values = [_later(key) for key in keys], [_later(value) for value in values]
                keys.append(k)
                values.append(v)
            hidden = place[None, :] > place[:, None] - level  # [T, T]
            x = x + self.o(self._attend(q, true_keys, true_values, hidden, keys, values))
            gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
            x = x + self.down(_ACTIVATIONS[self.shape.activation](gate) * up)
            found.append(self.norm(x))
            features = _later(found[-1])  # [B, T, C]: predicted for each place by the entry before it
        return found

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, C] -> [B, H or H_kv, T, D], rotated."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)
        return self._rotate(q), self._rotate(k), v

    def _rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos_sin[: x.shape[2]].chunk(2, dim=-1)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def _attend(
        self, q: Tensor, true_keys: Tensor | None, true_values: Tensor | None, hidden: Tensor, keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """Attention to the true entries that are not hidden, and to one drafted entry of each depth: [B, T, H * D]."""
        assert true_keys is not None
        assert true_values is not None
        group, scale = self.shape.num_heads // self.shape.num_kv_heads, self.shape.head_dim**-0.5
        scores = (q @ true_keys.repeat_interleave(group, 1).transpose(-1, -2)) * scale
        scores = scores.masked_fill(hidden, -torch.inf)
        drafted = [(q * key.repeat_interleave(group, 1)).sum(-1, keepdim=True) * scale for key in keys]
        shares = torch.cat((scores, *drafted), dim=-1).softmax(-1)
        length = true_keys.shape[2]
        out = shares[..., :length] @ true_values.repeat_interleave(group, 1)
        for i, value in enumerate(values):
            out = out + shares[..., length + i, None] * value.repeat_interleave(group, 1)
        return out.transpose(1, 2).flatten(2)


def _later(x: Tensor) -> Tensor:
    """Everything one place later, zeros first: [..., T, C]."""
    return F.pad(x, (0, 0, 1, 0))[..., :-1, :]
