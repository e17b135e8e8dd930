"""Training: a few steps of the real loop on a tiny preset, resumed from its checkpoint; batches repeat by seed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.mimir import data, train
from engine.mimir.checkpoint import STATE_FILE, load_state
from engine.mimir.corpus.base import Chat
from engine.mimir.corpus.symbols import Drill
from engine.mimir.data import StreamSpec, batches
from engine.mimir.model import ModelShape
from engine.mimir.presets import CHAT_TEXTS, LOOKUP_TEXTS, PRESETS, Phase, Preset
from engine.mimir.tasks import FIRST_TRAINING_SEED, make_chat

DRILL = Drill("records", 64, 64)
PHASE = Phase("both", 4, 256, {DRILL: 1.0}, {"chat": 1.0, "python_code": 1.0}, max_length=128, end_scale=0.5)
TINY = Preset(ModelShape(2, 64, 2, 1, 96), (PHASE,), data_workers=0)


def test_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    first = train.Trainer(TINY, tmp_path, 0, torch.device("cpu"))
    first.run(max_steps=2)
    resumed = train.Trainer(TINY, tmp_path, 0, torch.device("cpu"))
    assert resumed.progress == first.progress
    assert resumed.progress.total_steps == 2
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, first.model.state_dict()[name], atol=0, rtol=0)
    resumed.run(max_steps=None)
    assert (resumed.progress.phase, resumed.progress.total_steps) == (1, 4)


def test_new_run_begins_with_the_weights_of_another_at_the_first_phase(tmp_path: Path) -> None:
    first = train.Trainer(TINY, tmp_path / "first", 0, torch.device("cpu"))
    first.run(max_steps=2)
    second = train.Trainer(TINY, tmp_path / "second", 1, torch.device("cpu"))
    second.begin_from(tmp_path / "first")
    assert (second.progress.phase, second.progress.step, second.progress.total_steps) == (0, 0, 2)
    for name, value in second.model.state_dict().items():
        torch.testing.assert_close(value, first.model.state_dict()[name], atol=0, rtol=0)


def test_resumed_optimizers_take_the_same_next_step(tmp_path: Path) -> None:
    batch = next(batches(StreamSpec(PHASE, (0, 0), 0, 256, 4096)))
    first = train.Trainer(TINY, tmp_path, 0, torch.device("cpu"))
    first.run(max_steps=2)
    resumed = train.Trainer(TINY, tmp_path, 0, torch.device("cpu"))
    for trainer in (first, resumed):
        trainer._set_rates(PHASE, 0.5)
        trainer._step(batch)
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, first.model.state_dict()[name], atol=0, rtol=0)


def test_state_file_holds_tensors_and_progress_and_no_pickle(tmp_path: Path) -> None:
    trainer = train.Trainer(TINY, tmp_path, 0, torch.device("cpu"))
    trainer.run(max_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    state = load_state(tmp_path)
    assert state.progress["total_steps"] == 1
    assert len(state.optimizers) == 2
    with safe_open(tmp_path / STATE_FILE, framework="np") as file:
        assert {key.split("/")[0] for key in file.keys()} == {"model", "optimizer"}  # noqa: SIM118


def test_missing_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=STATE_FILE):
        load_state(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_last_layer_at_scored_positions_only_changes_neither_loss_nor_gradients(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(13, 4096, (3, 60), generator=generator)
    scored = torch.rand(3, 59, generator=generator) < share
    model = train.Trainer(TINY, Path("unused"), 0, torch.device("cpu")).model
    grads = []
    for hidden in (model(ids)[:, :-1][scored], train.scored_states(model, ids, scored)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model.logits(hidden), ids[:, 1:][scored]).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(list(model.parameters()))
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0][name], atol=1e-5, rtol=1e-4)


def test_batches_depend_only_on_seed_and_worker() -> None:
    def draw(seed: tuple[int, int]) -> list[torch.Tensor]:
        stream = batches(StreamSpec(PHASE, seed, 0, 256, 4096))
        return [next(stream).ids for _ in range(4)]

    again = zip(draw((0, 0)), draw((0, 0)), strict=True)
    assert all(torch.equal(one, other) for one, other in again)
    assert not all(
        one.shape == other.shape and torch.equal(one, other)
        for one, other in zip(draw((0, 0)), draw((0, 1)), strict=True)
    )


def test_training_draws_no_seed_that_an_evaluation_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def recording(name: str, seed: int, size: int) -> Chat:
        drawn.append(seed)
        return make_chat(name, seed, size)

    monkeypatch.setattr(data, "make_chat", recording)
    only_texts = replace(PHASE, drills={}, texts={"chat": 1.0, "needle": 1.0})
    stream = batches(StreamSpec(only_texts, (0, 0), 0, 256, 4096))
    for _ in range(20):
        next(stream)
    assert min(drawn) >= FIRST_TRAINING_SEED


def test_every_preset_keeps_lookup_to_the_end() -> None:
    for preset in PRESETS.values():
        last = preset.phases[-1]
        assert last.drills
        assert last.end_scale < 0.1
        assert last.texts.keys() >= LOOKUP_TEXTS.keys() | CHAT_TEXTS.keys()
