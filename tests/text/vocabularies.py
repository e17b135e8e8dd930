"""Small vocabularies of every supported kind, built in code and saved as checkpoint folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.text.tokenizer import Tokenizer as EngineTokenizer

SPECIAL = ["<|end|>", "<|turn|>", "<s>"]
MARKUP = ["<think>", "</think>"]
CORPUS = [
    "hello world, the quick brown fox jumps over the lazy dog",
    "def add(a, b):\n    return a + b\n",
    "Übergröße naïve café 你好 世界 🙂👍🏽 🇩🇪 e\u0301",
    "one two three four five six seven eight nine ten 0123456789",
] * 3

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message.role }}\n{{ message.content | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def byte_level() -> Tokenizer:
    """GPT-2's kind: every byte is in the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama 2's kind: words carry a space mark, unknown characters fall back to byte tokens."""
    pieces = [*SPECIAL, *(f"<0x{value:02X}>" for value in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz,.ö", "he", "ll", "hell", "hello", "▁hello", "wo", "rl", "▁wo"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("w", "o"), ("r", "l"), ("▁", "wo")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    return tokenizer


def metaspace() -> Tokenizer:
    """The newer sentencepiece form, with the space mark handled by the Metaspace steps."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def word_piece() -> Tokenizer:
    """BERT's kind: pieces are words, continuations are marked."""
    words = ["[UNK]", *SPECIAL, "hello", "world", "##ly", "##s", ",", "[", "]"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace, "word_piece": word_piece}


def save(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """A checkpoint folder with the tokenizer's files; `config` goes into tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"bos_token": "<s>", "eos_token": "<|end|>", "chat_template": TEMPLATE, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def load(folder: Path, kind: str, **config: Any) -> EngineTokenizer:
    return EngineTokenizer.from_folder(save(folder, KINDS[kind](), **config))
