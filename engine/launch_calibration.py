"""The part of `engine.launch` for calibration: makes the file of `kvasir calibrate`, and finds and checks it at start.

Importing it is cheap; torch and the model load inside the functions.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import Config
from engine.errors import ConfigError
from engine.resources import num_cores

if TYPE_CHECKING:
    from engine.compression.artefacts import Artefacts

logger = logging.getLogger(__name__)


def find_artefacts(config: Config, folder: Path) -> Artefacts | None:
    """The calibration of the model in a folder: the configured file, or the one beside the weights.

    Raises ConfigError for a configured file that does not belong to the model. One beside the weights that does not, as
    after training, is left out with a warning: policies that need it then refuse and say why.
    """
    from engine.compression import artefacts

    given = config.cache.kv_artefacts
    if given is not None:
        return artefacts.read(Path(given), artefacts.model_digest(folder))
    beside = folder / artefacts.FILE_NAME
    if config.runtime.load_format == "dummy" or not beside.is_file():
        return None
    try:
        return artefacts.read(beside, artefacts.model_digest(folder))
    except ConfigError as error:
        logger.warning("%s; policies that need it are refused", error)
        return None


def calibrate(config: Config, out: Path | None) -> Path:
    """Measures the model and writes the file, by default beside the weights. Raises ConfigError."""
    import torch

    from engine.compression import artefacts, calibration
    from engine.launch import resolve_device, resolve_model_path
    from engine.models import load_model
    from engine.text.chat_template import ChatTemplate
    from engine.text.rendered import RenderedText
    from engine.text.tokenizer import Tokenizer
    from engine.types import ChatPrompt

    folder = resolve_model_path(config.model.model)
    torch.set_num_threads(config.runtime.threads or num_cores())
    model = load_model(
        folder,
        device=resolve_device(config.model.device),
        dtype=config.model.dtype,
        kind=config.model.load_adapter,
        max_model_len=config.model.max_model_len,
    )
    tokenizer = Tokenizer.from_folder(Path(config.model.tokenizer or folder), config.model.chat_template)
    files = tokenizer.files
    template = None
    if files.chat_template is not None:
        template = ChatTemplate(files.chat_template, files.named_tokens, tokenizer.control_tokens)

    def render(message: str) -> str:
        if template is None:
            return message + "\n"
        prompt = ChatPrompt(messages=[{"role": "user", "content": message}])
        return template.render(prompt, 1 << 20).plain()

    def encode(text: str) -> list[int]:
        return tokenizer.encode_rendered(RenderedText(text))

    needles = calibration.make_needles(encode, render, model.max_model_len)
    found = calibration.calibrate(model, artefacts.model_digest(folder), tokenizer.bos_token_id, needles)
    path = out or folder / artefacts.FILE_NAME
    try:
        artefacts.write(found, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another file with --out") from error
    return path
