"""What `kvasir calibrate` measures, the file that it writes, and the policies that are bound to it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.compression import artefacts, calibration
from engine.compression.artefacts import FILE_NAME, Artefacts
from engine.compression.base import CacheShape
from engine.compression.gemfilter import GemFilter
from engine.compression.razor_attention import RazorAttention
from engine.compression.resolver import Policies
from engine.config import CacheConfig, Config, ModelConfig, RuntimeConfig
from engine.errors import ConfigError, InvalidParameter
from engine.launch import build_core, resolve_model_path
from engine.launch_calibration import find_artefacts
from engine.models import load_model
from engine.models.batch import KVSpec, Model
from server import cli
from tests.compression.views import SHAPE

MIMIR = resolve_model_path("mimir")
FOUND = Artefacts("digest", 4, 2, ((0, 1), (2, 0)), ((0.1,),), ((0.2,),), 3, (0.0, 0.5, 0.25, 1.0))


@pytest.fixture(scope="module")
def mimir() -> Model:
    return load_model(MIMIR, device=torch.device("cpu"), max_model_len=1280)


def test_the_bundled_file_belongs_to_the_bundled_weights():
    """After training: `kvasir calibrate`, without any option."""
    found = artefacts.read(MIMIR / FILE_NAME, artefacts.model_digest(MIMIR))
    assert found.retrieval_heads
    assert find_artefacts(Config(), MIMIR) == found


def test_the_bundled_heads_are_those_that_are_measured(mimir: Model):
    again = calibration.calibrate(mimir, "", bos=1, needles=())
    assert again.retrieval_heads == artefacts.read(MIMIR / FILE_NAME).retrieval_heads
    assert max(map(max, again.induction)) > 0.5, "a model that retrieves has a head that follows repetitions"
    assert again.filter_layer is None


def test_attention_written_out_is_that_of_the_kernels():
    torch.manual_seed(0)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(heads.transpose(0, 1) for heads in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    )
    seen = {}
    plain = calibration._Plain(lambda layer, q, k, probabilities: seen.update({layer: probabilities()}))
    out = plain.attend(5, q, k, v, scale=0.3, window=0, soft_cap=0.0)
    torch.testing.assert_close(out, expected.transpose(0, 1))
    torch.testing.assert_close(seen[5].sum(-1), torch.ones(4, 9))
    plain.attend(6, q, k, v, scale=0.3, window=3, soft_cap=2.0, sinks=torch.zeros(4))
    assert seen[6][0, 8].nonzero().flatten().tolist() == [6, 7, 8], "only the window is seen"
    assert float(seen[6][0, 8].sum()) < 1, "the sink takes its part"


def test_a_layer_is_as_good_as_what_it_keeps_of_the_needles(mimir: Model):
    ids = [100 + i % 50 for i in range(200)]
    everywhere = calibration.filter_recall(mimir, [calibration.Needle(ids, 0, 200)])
    torch.testing.assert_close(everywhere, torch.full((4,), calibration.KEPT_SHARE))
    at_the_end = calibration.filter_recall(mimir, [calibration.Needle(ids, 195, 200)])
    torch.testing.assert_close(at_the_end, torch.ones(4), msg="the newest tokens stay whatever their score")


def test_a_file_comes_back_as_it_was_written(tmp_path: Path):
    path = tmp_path / FILE_NAME
    artefacts.write(FOUND, path)
    assert artefacts.read(path, "digest") == FOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 5}, "was changed after it was made"),
        ({"version": 2}, "has version 2, this server reads 1"),
        ({"razor_attention": {}}, "is no file of `kvasir calibrate`: KeyError"),
        ({"gemfilter": None}, "is no file of `kvasir calibrate`: TypeError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path, change: dict, message: str):
    path = tmp_path / FILE_NAME
    artefacts.write(FOUND, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        artefacts.read(path)
    path.write_text("[1, 2")
    with pytest.raises(ConfigError, match="JSONDecodeError"):
        artefacts.read(path)


def test_a_file_for_other_weights_is_refused_where_it_was_asked_for_and_left_out_where_not(tmp_path: Path, caplog):
    shutil.copytree(MIMIR, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert find_artefacts(Config(), tmp_path / "model") is None
    assert "is for other weights" in caplog.text
    given = Config(cache=CacheConfig(kv_artefacts=str(MIMIR / FILE_NAME)))
    with pytest.raises(ConfigError, match="is for other weights: run `kvasir calibrate` for this model"):
        find_artefacts(given, tmp_path / "model")
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        find_artefacts(Config(cache=CacheConfig(kv_artefacts="nowhere.json")), MIMIR)
    assert find_artefacts(Config(runtime=RuntimeConfig(load_format="dummy")), MIMIR) is None


def test_a_file_for_another_shape_is_refused():
    with pytest.raises(ConfigError, match="4 layers of 2 kv heads, this model has 3 of 2"):
        Policies(CacheConfig(), KVSpec(3, 2, 32, 32), torch.float32, FOUND)


def test_policies_are_bound_and_a_request_keeps_its_own_choice():
    policies = Policies(CacheConfig(), KVSpec(4, 2, 32, 32), torch.float32, FOUND, has_yardsticks=True)

    def policy(**choice):
        return policies.resolve(choice, 5000).policy

    assert policy(name="razor_attention").retrieval_heads == FOUND.retrieval_heads
    assert policy(name="gemfilter").layer == 3
    assert policy(name="gemfilter", layer=1).layer == 1
    assert policy(name="first_turn", base="razor_attention").base.retrieval_heads == FOUND.retrieval_heads
    assert policy(name="snapkv").budget_for(100) == 1024
    without = Policies(CacheConfig(), KVSpec(4, 2, 32, 32), torch.float32)
    with pytest.raises(InvalidParameter, match="kvasir calibrate"):
        without.resolve({"name": "razor_attention"}, 5000)
    with pytest.raises(InvalidParameter, match="first_turn"):
        without.resolve({"name": "first_turn"}, 5000)


def test_the_command_writes_a_file_that_the_server_takes(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "NUM_NEEDLES", 2)
    monkeypatch.setattr(calibration, "REPEATED_TOKENS", 64)
    path = tmp_path / "own.json"
    assert cli.main(["calibrate", "mimir", "--out", str(path), "--threads", "1"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert len(artefacts.read(path).filter_recall) == 4
    config = Config(
        model=ModelConfig(max_model_len=128),
        cache=CacheConfig(num_blocks=64, kv_artefacts=str(path), kv_policy="razor_attention"),
        runtime=RuntimeConfig(threads=1),
    )
    build_core(config)
    assert cli.main(["calibrate", "mimir", "--out", str(tmp_path / "no" / "where.json"), "--threads", "1"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_context_too_short_to_repeat_in_is_refused(mimir: Model):
    class Short:
        max_model_len = 20

    with pytest.raises(ConfigError, match="takes 20 tokens"):
        calibration.head_scores(Short(), None)  # type: ignore[arg-type]


def test_layers_that_find_as_much_as_the_best_are_told_by_the_first(mimir: Model, monkeypatch):
    monkeypatch.setattr(calibration, "filter_recall", lambda model, needles: torch.tensor([0.1, 0.46, 0.5, 0.3]))
    monkeypatch.setattr(calibration, "head_scores", lambda *given: (torch.zeros(4, 4), torch.zeros(4, 4)))
    assert calibration.calibrate(mimir, "", None, [calibration.Needle([1], 0, 1)]).filter_layer == 1


def test_the_shape_of_a_bound_policy_is_checked_in_its_plan():
    wrong = dataclasses.replace(FOUND, retrieval_heads=((9, 0),)).bind(RazorAttention())
    with pytest.raises(ConfigError, match="calibrate it anew"):
        wrong.plan(100, SHAPE)
    assert isinstance(FOUND.bind(GemFilter()), GemFilter)
    FOUND.check(CacheShape(4, 2, 8, 8, 16), "here")
