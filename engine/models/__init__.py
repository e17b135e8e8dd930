"""Models: config.json and safetensors -> something that turns a batch into hidden states and logits.

Importing this package loads no torch; `load_model` and its submodules do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.models.batch import Model


def load_model(path: str | Path, **options: Any) -> Model:
    """Load the model in folder `path`. Options and errors: `engine.models.loader.load_model`."""
    from engine.models import loader

    return loader.load_model(path, **options)
