"""Mimir, the small language model that Kvasir ships: weights, tokenizer, corpus, training and evaluation."""

from pathlib import Path

MODELS = ("mimir", "mimir-draft")


def model_path(name: str = "mimir") -> Path:
    """The folder of a bundled model: "mimir", or "mimir-draft", its small drafter with the same tokenizer."""
    if name not in MODELS:
        raise ValueError(f"no bundled model {name!r}; there are {', '.join(MODELS)}")
    return Path(__file__).parent / "weights" / name
