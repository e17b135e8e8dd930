"""Models that read whole texts: encoders and classifiers of transformers, several texts in one padded batch.

Attention goes both ways, so there are no chunks and no KV cache. Nothing is assumed to work: at load, two texts
together must give what each gives alone, or every text runs alone.
Shape letters: B texts, L tokens of the longest, C hidden size, K labels.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models.hf_check import CHECK_IDS

logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # of the largest value
MAX_PADDING = 0.25  # of a batch's own tokens


@dataclass(frozen=True)
class EncoderText:
    """One text, or a pair in one sequence: `num_first_tokens` of it are the first text's; 0: one text."""

    token_ids: Sequence[int]
    num_first_tokens: int = 0


@dataclass(frozen=True)
class EncoderOutput:
    """Of one batch, float32."""

    hidden: Tensor | None  # [B, L, C]; beyond a text's own tokens without meaning. None: a classifier
    head: Tensor | None  # [B, C] of the trained pooler or [B, K] logits of the classifier; None: there is none


class EncoderModel:
    """A transformers model without a cache. Called from one thread."""

    def __init__(
        self,
        hf_model: Any,
        *,
        is_classifier: bool,
        has_head: bool,
        architecture: str,
        device: torch.device,
        max_model_len: int,
    ) -> None:
        """has_head: the model's trained pooler is wanted. Raises ConfigError when the model cannot run like this."""
        config = hf_model.config.get_text_config()
        self._hf_model = hf_model
        self._is_classifier = is_classifier
        self._has_head = has_head
        self.architecture = architecture
        self.device = device
        self.max_model_len = max_model_len
        self.vocab_size: int = hf_model.get_input_embeddings().weight.shape[0]
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = getattr(config, "num_hidden_layers", 0)
        self.weight_bytes = sum(parameter.nbytes for parameter in hf_model.parameters())
        self._dtype = next(hf_model.parameters()).dtype
        self.dtype_name = str(self._dtype).removeprefix("torch.")
        pad_token_id = getattr(config, "pad_token_id", None)
        self._pad_id: int = 0 if pad_token_id is None else pad_token_id
        takes_types = "token_type_ids" in inspect.signature(hf_model.forward).parameters
        self._has_types = takes_types and (getattr(config, "type_vocab_size", 0) or 0) > 1
        self.is_causal = False
        self.can_batch = self._check()

    @torch.inference_mode()
    def forward(self, texts: Sequence[EncoderText]) -> EncoderOutput:
        """Runs the texts as one batch, the shorter ones padded at their ends."""
        lengths = [len(text.token_ids) for text in texts]
        ids = torch.full((len(texts), max(lengths)), self._pad_id, dtype=torch.int64)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            ids[row, :length] = torch.tensor(text.token_ids, dtype=torch.int64)
            mask[row, :length] = 1
            if text.num_first_tokens:
                types[row, text.num_first_tokens : length] = 1
        inputs = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if self._has_types else {})
        output = self._hf_model(**{name: value.to(self.device) for name, value in inputs.items()})
        if self._is_classifier:
            return EncoderOutput(None, output.logits.float())
        head = output.pooler_output.float() if self._has_head else None
        return EncoderOutput(output.last_hidden_state.float(), head)

    def description(self) -> dict[str, str]:
        """What was loaded, for the start-up report."""
        return {
            "architecture": f"{self.architecture} (transformers, whole texts)",
            "layers": str(self.num_layers),
            "parameters": f"{self._hf_model.num_parameters() / 1e6:.1f} M",
            "weights": f"{self.weight_bytes / 2**20:.0f} MiB, {self.dtype_name}",
        }

    def _check(self) -> bool:
        """Runs two texts alone and together: whether they may share a batch. Notes whether attention is causal."""
        texts = [EncoderText([i % self.vocab_size for i in ids]) for ids in CHECK_IDS]
        try:
            alone = [self._result(self.forward([text]), 0, len(text.token_ids)) for text in texts]
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.architecture} does not run as an encoder: {error}") from error
        if not all(bool(result.isfinite().all()) for result in alone):
            raise ConfigError(f"{self.architecture} gives numbers that are not finite; are the weights complete?")
        if not self._is_classifier:
            shorter = self.forward([EncoderText(texts[0].token_ids[:-1])]).hidden
            assert shorter is not None
            self.is_causal = bool(torch.allclose(shorter[0, 0], alone[0][0], rtol=1e-4, atol=1e-6))
        try:
            both = self.forward(texts)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            logger.warning("%s runs one text at a time: it refuses two together (%s)", self.architecture, error)
            return False
        bound = _TOLERANCE[self._dtype] * max(float(result.abs().max()) for result in alone)
        change = max(
            float((self._result(both, i, len(text.token_ids)) - alone[i]).abs().max()) for i, text in enumerate(texts)
        )
        if not change <= bound:
            logger.warning("%s runs one text at a time: padding changes its results by %.2g", self.architecture, change)
            return False
        return True

    def _result(self, output: EncoderOutput, row: int, length: int) -> Tensor:
        if output.hidden is not None:
            return output.hidden[row, :length]
        assert output.head is not None
        return output.head[row]


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts that run together: of like length, with at most MAX_PADDING of padding."""
    found: list[list[int]] = []
    num_tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[found[-1][0]] if found else 0
        padded = longest * (len(found[-1]) + 1) if found else 0
        if found and padded <= (num_tokens + lengths[index]) * (1 + MAX_PADDING):
            found[-1].append(index)
            num_tokens += lengths[index]
        else:
            found.append([index])
            num_tokens = lengths[index]
    return found
