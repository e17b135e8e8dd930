"""Training: a few steps of the real loop on a tiny preset, resumed from its checkpoint; batches repeat by seed."""

from pathlib import Path

import torch

from engine.mimir import train
from engine.mimir.corpus.symbols import Drill
from engine.mimir.data import StreamSpec, batches
from engine.mimir.model import ModelShape
from engine.mimir.presets import ALL_TEXTS, PRESETS, Phase, Preset

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


def test_every_preset_keeps_lookup_to_the_end() -> None:
    for preset in PRESETS.values():
        last = preset.phases[-1]
        assert last.drills
        assert last.end_scale < 0.1
        assert last.texts == ALL_TEXTS
