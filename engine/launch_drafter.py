"""The part of `engine.launch` for `kvasir train-drafter`: the target writes texts, a head learns from them, its file.

Importing it is cheap; torch and the model load inside the functions.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engine.config import Config
from engine.errors import ConfigError
from engine.launch_speculation import HEAD_FOLDER
from engine.mimir import MODELS
from engine.resources import num_cores

if TYPE_CHECKING:
    from engine.execution.eagle.texts import Text
    from engine.execution.eagle.training import TargetEnds, TrainingOptions
    from engine.models.decoder import Decoder
    from engine.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

WRITING_SHARE = 0.3  # of the time, at most, for the target to write texts
HELD_OUT_SHARE = 0.05  # of the texts, to measure acceptance with
MIN_TEXTS = 4
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 8192  # of a step of the training
ROUNDS = 4  # a file's prompts are used so often at most: every answer is another one

Messages = list[dict[str, Any]]
Encode = Callable[[str | Messages], list[int]]


@dataclass(frozen=True)
class DrafterTraining:
    """
    minutes     for everything
    num_tokens  that the target writes at most
    prompts     file with a prompt in each line; None: the corpus of a bundled model
    max_output  tokens of one answer at most
    max_steps   of the training; None: as many as the time allows
    """

    minutes: float = 20.0
    num_tokens: int = 250_000
    prompts: Path | None = None
    max_output: int = 128
    seed: int = 0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 10_000:
            raise ConfigError(f"--minutes is {self.minutes:g}; need more than 0 and at most 10000")
        if not 1_000 <= self.num_tokens <= 100_000_000:
            raise ConfigError(f"--tokens is {self.num_tokens}; need 1000 to 100000000")


def train_drafter(config: Config, out: Path | None, training: DrafterTraining) -> str:
    """Trains a head and writes it, by default to the folder `eagle` in the model's own: where `kvasir serve` finds it.

    Returns what to tell the user. Raises ConfigError.
    """
    import torch

    from engine.compression.artefacts import model_digest
    from engine.execution.eagle.files import Head, HeadShape, write
    from engine.execution.eagle.training import Trainer, TrainingOptions
    from engine.launch import resolve_device, resolve_model_path, wire

    started = time.monotonic()
    folder = resolve_model_path(config.model.model)
    path = out or folder / HEAD_FOLDER
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another folder with --out") from error
    torch.set_num_threads(config.runtime.threads or num_cores())
    device = resolve_device(config.model.device)
    batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    options = TrainingOptions(seed=training.seed, batch_tokens=batch_tokens)
    prompts = _prompts(config, folder, training, options.max_length // 2)
    model = _load(config, folder, device)
    core, info = wire(model, config, device)
    with tqdm(desc="texts", total=training.num_tokens, unit="tok", disable=None) as bar:
        texts = _write(core, prompts, training, options, config, info.max_model_len, bar.update)
    held_out = max(1, int(len(texts) * HELD_OUT_SHARE))
    ends = _ends(model, folder)
    shape = HeadShape.like(model.config)
    trainer = Trainer(model, ends, shape, options, texts[held_out:])
    seconds = 60 * training.minutes - (time.monotonic() - started)
    with tqdm(desc="training", total=100, unit="%", disable=None) as bar:
        losses = list(trainer.run(seconds, training.max_steps, lambda done, loss: _show(bar, done, loss)))
    acceptance = trainer.acceptance(texts[:held_out])
    num_written = sum(len(text.token_ids) - text.num_prompt_tokens for text in texts)
    figures: dict[str, float] = {"steps": len(losses), "tokens": num_written}
    head = Head(model_digest(folder), shape, trainer.module.weights(), tuple(acceptance), figures)
    try:
        write(head, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; name another folder with --out") from error
    rates = ", ".join(f"{rate:.2f}" for rate in acceptance)
    return f"{path}: {len(losses)} steps on {num_written} tokens; right at depth 1, 2, ...: {rates}"


def _load(config: Config, folder: Path, device: Any) -> Decoder:
    from engine.models import load_model
    from engine.models.decoder import Decoder

    if config.runtime.load_format == "dummy":
        raise ConfigError("a head for random weights would learn nothing; leave load_format out")
    model = load_model(
        folder,
        device=device,
        dtype=config.model.dtype,
        kind=config.model.load_adapter,
        max_model_len=config.model.max_model_len,
    )
    if not isinstance(model, Decoder):
        raise ConfigError(f"train-drafter needs a native decoder; {model.architecture} does not run through one")
    return model


def _ends(model: Decoder, folder: Path) -> TargetEnds:
    """Embedding and output head, which serving keeps in packed form, from the checkpoint."""
    from engine.execution.eagle.training import TargetEnds
    from engine.models.fields import read_json
    from engine.models.pooling_config import pooler_tensors
    from engine.models.weights import CheckpointWeights

    without = pooler_tensors(read_json(folder, "config.json"))
    weights = CheckpointWeights(folder, model.config, without=without)
    embedding = weights.take("embedding").to(model.device).float()
    head = weights.take("head").to(model.device).float() if weights.has("head") else embedding
    return TargetEnds(embedding, head, model.config.logits_divisor, model.config.logits_soft_cap)


def _write(
    core: Any, prompts: Iterator[Sequence[int]], training: DrafterTraining, options: TrainingOptions, config: Config,
    max_model_len: int, report: Callable[[int], Any],
) -> list[Text]:  # fmt: skip
    from engine.execution.eagle.texts import write_texts

    texts = write_texts(
        core,
        prompts,
        num_tokens=training.num_tokens,
        max_output=training.max_output,
        max_length=min(options.max_length, max_model_len),
        num_rows=config.scheduler.max_num_seqs,
        seconds=60 * training.minutes * WRITING_SHARE,
        seed=training.seed,
        report=report,
    )
    texts = [text for text in texts if len(text.token_ids) >= text.num_prompt_tokens + 2]
    Random(training.seed).shuffle(texts)  # the short ones were ready first
    if len(texts) < MIN_TEXTS:
        raise ConfigError(
            f"the model wrote {len(texts)} texts of two tokens or more, training needs {MIN_TEXTS}: give more or "
            f"shorter prompts (at most {min(options.max_length, max_model_len) - 2} tokens), or more --minutes"
        )
    return texts


def _prompts(config: Config, folder: Path, training: DrafterTraining, max_size: int) -> Iterator[list[int]]:
    """Prompts in tokens. Raises ConfigError where there are none."""
    from engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(Path(config.model.tokenizer or folder), config.model.chat_template)
    if training.prompts is not None:
        lines = read_prompts(training.prompts)
        encode = _encoder(tokenizer)
        return (encode(line) for line in _in_rounds(lines, training.seed))
    if config.model.model not in MODELS:
        raise ConfigError("train-drafter needs --prompts FILE for this model: a prompt in each line, text or JSON")
    from engine.mimir.prompts import training_prompts
    from engine.text.rendered import RenderedText

    texts = training_prompts(tokenizer, training.seed, max_size)
    return (tokenizer.encode_rendered(RenderedText(text)) for text in texts)


def _in_rounds(lines: Sequence[str | Messages], seed: int) -> Iterator[str | Messages]:
    random = Random(seed)
    for _ in range(ROUNDS):
        yield from random.sample(lines, len(lines))


def read_prompts(path: Path) -> list[str | Messages]:
    """A line is a user's message, or JSON: {"prompt": text} as it stands, or {"messages": [...]}. ConfigError."""
    found: list[str | Messages] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --prompts {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not line.startswith("{"):
            found.append([{"role": "user", "content": line}])
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}") from error
        prompt = entry.get("prompt", entry.get("messages"))
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and prompt)):
            raise ConfigError(f'{path} line {number} has neither a "prompt" text nor a "messages" list')
        found.append(prompt)
    if not found:
        raise ConfigError(f"--prompts {path} has no prompts")
    return found


def _encoder(tokenizer: Tokenizer) -> Encode:
    """Messages go through the chat template; without one, their texts stand line by line."""
    from engine.text.chat_template import ChatTemplate
    from engine.text.rendered import RenderedText
    from engine.types import ChatPrompt

    files = tokenizer.files
    template = None
    if files.chat_template is not None:
        template = ChatTemplate(files.chat_template, files.named_tokens, tokenizer.control_tokens)

    def encode(prompt: str | Messages) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer.encode_rendered(RenderedText(prompt))
        if template is None:
            text = "".join(f"{message.get('content', '')}\n" for message in prompt)
            return tokenizer.encode_rendered(RenderedText(text))
        return tokenizer.encode_rendered(template.render(ChatPrompt(messages=prompt), 1 << 20))

    return encode


def _show(bar: Any, done: float, loss: float) -> None:
    bar.update(round(100 * done) - bar.n)
    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
