"""Mimir's byte-level BPE: trained on text the project generates or every Python installation carries.

`build` writes the standard Hugging Face files (tokenizer.json, tokenizer_config.json, special_tokens_map.json), which
load in `tokenizers` and in `transformers`. Digits are split singly so that numbers copy and add digit by digit; all
256 bytes are in the alphabet, so any text round-trips.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<|bos|>", "<|endoftext|>", "<|pad|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# Control tokens are dropped by `skip_special_tokens`; markup tokens are single ids that stay visible in the text.
CONTROL_TOKENS = (EOS, BOS, PAD, TURN_START, TURN_END)
MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
)
# Words with their leading space, single digits, punctuation runs, line breaks with indentation.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the 4,096-token vocabulary; special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*CONTROL_TOKENS, *MARKUP_TOKENS],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=16,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _mark_visible(tokenizer)


def _mark_visible(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with the markup tokens kept in decoded text (`special: false`)."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(content))


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """The id of a special token. Raises KeyError where the vocabulary lacks it."""
    return tokenizer.get_vocab()[text]


def save(tokenizer: Tokenizer, folder: Path, max_positions: int) -> None:
    """Write the Hugging Face tokenizer files, chat template included, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": TURN_END, "pad_token": PAD}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "additional_special_tokens": [EOS, TURN_START],
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): _added_token(text) for text in (*CONTROL_TOKENS, *MARKUP_TOKENS)
        },
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8"),
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _added_token(text: str) -> dict[str, str | bool]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": text, **flags, "special": text in CONTROL_TOKENS}
