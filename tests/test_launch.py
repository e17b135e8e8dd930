"""Wiring: what "auto" becomes, and what is refused with a remedy before anything is served."""

from __future__ import annotations

import functools
import io
import logging
import re
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from engine import launch, resources
from engine.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from engine.errors import ConfigError
from engine.execution.runner import ModelRunner
from engine.models import load_model
from engine.models.batch import Model
from tests.e2e.driving import request, run
from tests.models.families import Case, save

CPU = torch.device("cpu")
MIB = 1024 * 1024
# keys and values of 3 layers, 2 heads of 16, in float32
TOKEN_BYTES = 2 * 3 * 2 * 16 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(Case("llama", "Llama").build(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder, dtype="float32")


def config(*, max_model_len: int | None = None, max_num_seqs: int = 4, **cache: object) -> Config:
    return Config(
        model=ModelConfig(max_model_len=max_model_len),
        cache=CacheConfig(**cache),  # type: ignore[arg-type]
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
    )


def size(model: Model, given: Config) -> resources.CacheSize:
    return resources.size_cache(given, model.spec, torch.float32, CPU, model.max_model_len)


def test_a_name_that_is_no_model_folder_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a folder; give a folder with config\.json .* mimir"):
        launch.resolve_model_path(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        launch.resolve_model_path(str(tmp_path))


def test_the_pool_is_what_was_asked_for_or_what_can_be_used_of_a_share_of_memory(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert size(model, config(num_blocks=40)).num_blocks == 40
    assert size(model, config(kv_cache_memory_mib=1)).num_blocks == MIB // (16 * TOKEN_BYTES)
    # 4 requests of 256 tokens in blocks of 16, and the null block: more could never be used
    assert size(model, config()).num_blocks == 4 * 16 + 1
    monkeypatch.setattr(resources, "free_memory", lambda _: MIB)
    share = size(model, config(kv_cache_memory_fraction=0.5, max_num_seqs=64))
    assert share.num_blocks == MIB // 2 // (16 * TOKEN_BYTES)


def test_a_pool_that_memory_or_a_request_does_not_fit_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="holds 16 tokens, too few to serve any request; raise"):
        size(model, config(num_blocks=2))
    with pytest.raises(ConfigError, match="fewer than max_model_len 200; lower --max-model-len"):
        size(model, config(num_blocks=12, max_model_len=200))
    with pytest.raises(ConfigError, match="max_model_len is 257, but the model declares 256 positions"):
        size(model, config(max_model_len=257))
    monkeypatch.setattr(resources, "free_memory", lambda _: MIB)
    with pytest.raises(ConfigError, match="2 MiB and 1 MiB are free; lower --num-blocks"):
        size(model, config(kv_cache_memory_mib=2))


def test_without_a_wish_the_context_shrinks_to_the_pool_and_says_so(
    model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert size(model, config(num_blocks=11)).max_model_len == 160
    assert "max_model_len reduced from 256 to 160" in caplog.text


def test_only_tensors_that_will_be_loaded_count_as_weights(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some checkpoints carry the same weights again in a file of another layout."""
    stored = (folder / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "consolidated.safetensors").symlink_to(folder / "model.safetensors")
    monkeypatch.setattr(resources, "free_memory", lambda _: stored)
    resources.check_weights_fit(tmp_path, CPU, Config())
    resources.check_weights_fit(tmp_path, CPU, Config(model=ModelConfig(dtype="float32")))  # as they are stored
    monkeypatch.setattr(resources, "free_memory", lambda _: stored // 2)
    resources.check_weights_fit(tmp_path, CPU, Config(model=ModelConfig(dtype="bfloat16")))
    with pytest.raises(ConfigError, match="of memory are free; free some memory or choose a smaller model"):
        resources.check_weights_fit(tmp_path, CPU, Config())


def test_the_container_limit_counts_without_cached_files(tmp_path: Path) -> None:
    assert resources.cgroup_headroom(tmp_path) is None
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "900\n"),
        ("memory.stat", "anon 300\ninactive_file 550\nactive_file 50\n"),
    ):
        (tmp_path / name).write_text(text)
    assert resources.cgroup_headroom(tmp_path) == 1000 - 900 + 550
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.cgroup_headroom(tmp_path) is None


def test_threads_follow_the_share_of_cores_that_a_container_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert resources.num_cores(tmp_path) == 8
    for text, cores in (("max 100000\n", 8), ("250000 100000\n", 2), ("50000 100000\n", 1), ("900000 100000\n", 8)):
        (tmp_path / "cpu.max").write_text(text)
        assert resources.num_cores(tmp_path) == cores


def test_a_cache_type_that_attention_cannot_read_is_refused(model: Model) -> None:
    class HalfPrecision:
        dtype = torch.bfloat16

    assert launch._resolve_cache_dtype("float16", CPU, model) == torch.float16
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is 'float16', but the model computes in torch\.bfloat16"):
        launch._resolve_cache_dtype("float16", CPU, HalfPrecision())  # type: ignore[arg-type]


@pytest.mark.parametrize(("block_size", "max_model_len"), [(1, 2), (1, 9), (3, 9), (16, 2)])
def test_the_smallest_configurations_warm_up_outside_the_null_block_and_serve(
    model: Model, block_size: int, max_model_len: int
) -> None:
    given = config(block_size=block_size, num_blocks=-(-max_model_len // block_size) + 1, max_model_len=max_model_len)
    core, info = launch.wire(model, given, CPU)
    assert isinstance(core.runner, ModelRunner)
    assert not core.runner.cache.k[0].any(), "the null block was written"
    assert info.max_model_len == max_model_len
    answers = run(core, [request("r", [5], max_tokens=100)])
    assert len(answers["r", 0].token_ids) == max_model_len - 1
    assert answers["r", 0].finish_reason == "length"


def test_loading_shows_a_bar_on_a_terminal_and_nowhere_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = Config(model=ModelConfig(model=str(folder)), cache=CacheConfig(num_blocks=40))
    launch.build_core(given)
    assert "weights" not in capsys.readouterr().err
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(launch, "tqdm", functools.partial(tqdm, file=terminal, ncols=80, mininterval=0))
    launch.build_core(given)
    assert re.search(r"weights: +\d+%\|", terminal.getvalue())


def test_a_foreign_distribution_with_our_import_name_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch._check_import_name()
    assert not caplog.records
    monkeypatch.setattr(launch.metadata, "version", lambda name: "0.9")
    launch._check_import_name()
    assert "pip uninstall kernels" in caplog.text
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="hides; run `pip uninstall kernels`"):
        launch._check_import_name()
