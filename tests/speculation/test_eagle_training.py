"""Training a head: it learns, what it is measured by is what a server accepts, and the command says what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.compression.artefacts import model_digest
from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.errors import ConfigError
from engine.execution.eagle.files import Head, HeadShape, read, write
from engine.execution.eagle.texts import FeatureReader, Text
from engine.execution.eagle.training import Trainer, TrainingOptions
from engine.launch import wire
from engine.launch_drafter import DrafterTraining, _ends, read_prompts, train_drafter
from engine.mimir import model_path
from engine.models import load_model
from engine.models.decoder import Decoder
from server.cli import main
from tests.e2e.driving import core_for, request, run
from tests.speculation.heads import config_for, save_model
from tests.speculation.test_eagle_head import guessing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("random"), vocab_size=40)


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    found = load_model(folder, dtype="float32", deterministic=True)
    assert isinstance(found, Decoder)
    return found


@pytest.fixture(scope="module")
def texts(model: Decoder) -> list[Text]:
    prompts = [[i % 40, (7 * i) % 40, (3 * i) % 40] for i in range(24)]
    answers = run(core_for(model), [request(f"r{i}", prompt, max_tokens=40) for i, prompt in enumerate(prompts)])
    return [Text([*prompt, *answers[f"r{i}", 0].token_ids], 3, True) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def trained(model: Decoder, folder: Path, texts: list[Text]) -> tuple[Trainer, list[float]]:
    shape = HeadShape.like(model.config)
    options = TrainingOptions(batch_tokens=512, max_length=64, learning_rate=2e-2)
    trainer = Trainer(model, _ends(model, folder), shape, options, texts)
    return trainer, list(trainer.run(1e6, 60, lambda done, loss: None))


def test_a_few_steps_lower_the_loss(trained: tuple[Trainer, list[float]]) -> None:
    _, losses = trained
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_training_ends_when_its_time_is_over(model: Decoder, folder: Path, texts: list[Text]) -> None:
    options = TrainingOptions(batch_tokens=512, max_length=64)
    trainer = Trainer(model, _ends(model, folder), HeadShape.like(model.config), options, texts)
    assert not list(trainer.run(0.0, None, lambda done, loss: None))


def test_the_measured_acceptance_is_that_of_a_server(
    trained: tuple[Trainer, list[float]], model: Decoder, folder: Path, texts: list[Text], tmp_path: Path
) -> None:
    """One guess at a time on texts that it knows: as many are right as was measured."""
    trainer, _ = trained
    rates = trainer.acceptance(texts)
    assert rates[0] > 0.2, "the head was meant to learn something"
    write(Head(model_digest(folder), trainer.module.shape, trainer.module.weights()), tmp_path, torch.float32)
    core, _ = wire(model, config_for(folder, tmp_path), torch.device("cpu"))
    drafter = core.speculation._drafter("eagle")
    drafter.options = type(drafter.options)(max_depth=1, width=1, min_value=0.0)  # type: ignore[union-attr]
    asking = guessing([request(f"r{i}", text.token_ids[:3], max_tokens=40) for i, text in enumerate(texts)], 1)
    answers = run(core, asking)
    assert [answers[f"r{i}", 0].token_ids for i in range(len(texts))] == [text.token_ids[3:] for text in texts]
    stats = core.stats()
    # not exactly: behind a right guess, the next place is not guessed for
    share = stats.spec_accepted["eagle"] / stats.spec_proposed["eagle"]
    assert share == pytest.approx(rates[0], abs=0.12)


def test_hidden_states_of_many_texts_are_those_of_each_alone(model: Decoder, texts: list[Text]) -> None:
    reader = FeatureReader(model, 3, 64)
    some = [texts[0].token_ids, texts[1].token_ids[:5], texts[2].token_ids[:17]]
    for together, alone in zip(reader.read(some), [reader.read([one])[0] for one in some], strict=True):
        assert torch.allclose(together, alone, atol=1e-5)


def small_mimir() -> Config:
    return Config(
        model=ModelConfig(model="mimir", max_model_len=256),
        cache=CacheConfig(num_blocks=300),
        scheduler=SchedulerConfig(max_num_seqs=16),
        runtime=RuntimeConfig(threads=1),
    )


@pytest.fixture
def threads() -> Iterator[None]:
    """The command sets how many threads torch has; later tests want what was there before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_command_writes_a_head_that_the_model_can_be_served_with(tmp_path: Path) -> None:
    training = DrafterTraining(minutes=5.0, num_tokens=1000, max_output=8, max_steps=2)
    told = train_drafter(small_mimir(), tmp_path / "head", training)
    assert "2 steps on " in told
    found = read(tmp_path / "head", model_digest(model_path("mimir")))
    assert found.training["steps"] == 2
    assert len(found.acceptance) == 4


def test_prompts_are_messages_texts_or_json(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path.write_text("Who are you?\n\n" + json.dumps({"prompt": "Once"}) + "\n" + json.dumps({"messages": messages}))
    assert read_prompts(path) == [[{"role": "user", "content": "Who are you?"}], "Once", messages]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mimir", "--minutes", "0"], "--minutes is 0; need more than 0"),
        (["mimir", "--tokens", "5"], "--tokens is 5; need 1000 to"),
        (["mimir", "--prompts", "{tmp}/none"], "cannot read --prompts"),
        (["mimir", "--prompts", "{tmp}/empty"], "has no prompts"),
        (["mimir", "--prompts", "{tmp}/broken"], "line 2 is not JSON"),
        (["mimir", "--prompts", "{tmp}/wrong"], 'line 1 has neither a "prompt" text nor a "messages" list'),
        (["{tmp}"], "has no config.json"),
        (["mimir", "--load-format", "dummy"], "random weights would learn nothing"),
        (["mimir", "--out", "{tmp}/empty"], "cannot write"),
    ],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "broken").write_text("Hello\n{oops\n")
    (tmp_path / "wrong").write_text('{"text": "Hello"}\n')
    given = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    assert main(["train-drafter", *given, *out, "--num-blocks", "64"]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_bundled_needs_prompts(folder: Path, tmp_path: Path, model: Decoder) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model_path("mimir") / name).read_bytes())
    config = Config(model=ModelConfig(model=str(folder)), cache=CacheConfig(num_blocks=64))
    with pytest.raises(ConfigError, match="needs --prompts FILE for this model"):
        train_drafter(config, tmp_path, DrafterTraining())
