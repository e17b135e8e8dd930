"""Random-weight checkpoints of known shapes, so that speed can be compared without downloading anything.

    python -m loadtest.shapes small FOLDER

small   Qwen2.5-0.5B-shaped with a 32k vocabulary: 387 M parameters, bf16
tiny    Llama-shaped, 5.8 M parameters: measures overhead
nano    Llama-shaped, one layer, 0.3 M parameters: a step that is over at once, to measure what lies around it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
NANO: dict[str, Any] = {
    **TINY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def make(shape: str, folder: Path, *, seed: int = 0) -> Path:
    """Writes checkpoint and tokenizer once; an existing folder is kept. Raises ValueError for an unknown shape."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    if shape == "small":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**SMALL, rms_norm_eps=1e-6, dtype="bfloat16"))
        vocab_size = SMALL["vocab_size"]
    elif shape in ("tiny", "nano"):
        config = TINY if shape == "tiny" else NANO
        model = LlamaForCausalLM(LlamaConfig(**config, dtype="bfloat16"))
        vocab_size = config["vocab_size"]
    else:
        raise ValueError(f"unknown shape {shape!r}; known: small, tiny, nano")
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    _make_tokenizer(vocab_size).save_pretrained(folder)
    return folder


def _make_tokenizer(vocab_size: int) -> Any:
    """Byte-level BPE whose vocabulary is filled up with made-up words to the wanted size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    letters = [letter for letter in alphabet if letter.isalpha() and letter.isascii()]
    stems = list(letters)
    while len(vocab) < vocab_size:
        grown = []
        for stem in stems:
            for letter in letters:
                if len(vocab) >= vocab_size:
                    break
                word = stem + letter
                if word not in vocab:
                    merges.append((stem, letter))
                    vocab[word] = len(vocab)
                    grown.append(word)
        stems = grown
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    return build(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a random-weight checkpoint of a known shape.")
    parser.add_argument("shape", choices=("small", "tiny", "nano"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    print(make(arguments.shape, arguments.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
