"""The head behind the eagle drafter: it computes what was trained, sees true hidden states, and changes no output."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from engine.compression.artefacts import model_digest
from engine.core import EngineCore
from engine.errors import ConfigError, InvalidParameter
from engine.execution.eagle.files import CONFIG_FILE, WEIGHTS_FILE, read, write
from engine.execution.eagle.module import HeadModule
from engine.execution.eagle.runner import EagleRunner
from engine.execution.eagle.texts import FeatureReader
from engine.launch import wire
from engine.launch_speculation import DrafterSource
from engine.models import load_model
from engine.models.decoder import Decoder
from engine.speculation.draft_cache import DraftCache
from engine.speculation.eagle import Candidates, Eagle, HeadPass
from engine.types import EngineRequest
from tests.e2e.driving import Answer, request, run, tokens
from tests.speculation.heads import WIDTH, NotingRunner, config_for, random_head, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Decoder:
    found = load_model(folder, dtype="float32", deterministic=True)
    assert isinstance(found, Decoder)
    return found


@pytest.fixture(scope="module")
def head(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("head")
    write(random_head(model_digest(folder)), path, torch.float32)
    return path


def trained_module(head: Path) -> HeadModule:
    """The head as it is trained, with the weights of the file."""
    found = read(head)
    module = HeadModule(found.shape, 128)
    module.load_state_dict(found.weights)
    return module


# ---- passes


@pytest.mark.parametrize("is_native", [True, False])
def test_chains_are_what_the_trained_module_says_however_the_context_came(
    model: Decoder, head: Path, is_native: bool
) -> None:
    """Ragged contexts, added in pieces with drafts in between, of which nothing may be left."""
    runner = EagleRunner(model, read(head), num_blocks=40, block_size=4)
    if not is_native:
        runner._step = None
    assert (runner._step is not None) == is_native
    generator = np.random.default_rng(0)
    lengths, depth = (13, 1, 7), 4
    texts = [generator.integers(0, 300, size=length + 1).tolist() for length in lengths]
    hidden = [generator.normal(size=(length, WIDTH)).astype(np.float32) for length in lengths]
    tables = [list(range(1 + 9 * i, 10 + 9 * i)) for i in range(3)]
    pieces = [[(0, 6), (6, 9), (9, 13)], [(0, 1)], [(0, 3), (3, 7)]]
    found: dict[int, list[Candidates]] = {}
    for turn in range(3):
        active = [i for i in range(3) if turn < len(pieces[i])]
        passes = []
        for i in active:
            begin, end = pieces[i][turn]
            ids = texts[i][begin + 1 : end + 1]
            passes.append(HeadPass(ids, hidden[i][begin:end], begin, tables[i], 0.0, [None] * (depth - i), -np.inf))
        found.update(zip(active, runner.draft(passes, 2), strict=True))
    module = trained_module(head)
    for i, levels in found.items():
        assert len(levels) == depth - i
        drafted = [level.token_ids[0] for level in levels]
        ids = torch.tensor([texts[i][1:] + drafted[:-1]])
        # behind the true entries, a chain's entries see one drafted one of each depth before
        features = torch.from_numpy(np.concatenate((hidden[i], np.zeros((len(drafted) - 1, WIDTH), np.float32))))
        with torch.no_grad():
            expected = module(model.embed(ids[0])[None].float(), features[None], len(drafted))
            for level, candidates in enumerate(levels):
                logits = model.logits(expected[level][0, lengths[i] - 1 + level][None])[0]
                best = logits.log_softmax(-1).topk(2)
                assert list(candidates.token_ids) == best.indices.tolist()
                assert list(candidates.log_probs) == pytest.approx(best.values.tolist(), abs=1e-3)


def test_a_pass_of_many_long_contexts_is_cut_into_several(model: Decoder, head: Path) -> None:
    generator = np.random.default_rng(1)
    hidden = generator.normal(size=(400, WIDTH)).astype(np.float32)
    ids = generator.integers(0, 300, size=400).tolist()

    def draft(count: int) -> list[list[Candidates]]:
        runner = EagleRunner(model, read(head), num_blocks=300, block_size=8)
        runner.max_len = 1000
        passes = [
            HeadPass(ids[:200], hidden[:200], 0, list(range(1 + 30 * i, 31 + 30 * i)), 0.7, [11, 12], -np.inf)
            for i in range(count)
        ]
        return runner.draft(passes, 3)

    (alone,) = draft(1)
    for levels in draft(8):
        assert [level.token_ids for level in levels] == [level.token_ids for level in alone]


# ---- hidden states


def core_of(model: Decoder, folder: Path, head: Path | str, **options: int) -> EngineCore:
    core, _ = wire(model, config_for(folder, head, **options), torch.device("cpu"))
    return core


def guessing(requests: Sequence[EngineRequest], max_nodes: int = 8) -> list[EngineRequest]:
    choice = {"drafters": ["eagle"], "max_nodes": max_nodes}
    return [msgspec.structs.replace(one, speculative=choice) for one in requests]


def traffic() -> list[EngineRequest]:
    """Mixed kinds of rows, some with a shared beginning, one longer than a chunk."""
    generator = random.Random(7)
    shared = [generator.randrange(20, 300) for _ in range(19)]
    styles: list[dict[str, object]] = [
        {},
        {"temperature": 0.8, "seed": 11, "logprobs": 2},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 40},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.7, "seed": 3, "min_p": 0.05, "num_choices": 3},
        {"temperature": 1.2, "seed": 9, "stop_token_ids": tuple(range(0, 300, 29)), "min_tokens": 7},
        {"prompt_logprobs": 1},
        {"temperature": 0.9, "seed": 2},
    ]
    requests = []
    for i, style in enumerate(styles):
        own = [generator.randrange(20, 300) for _ in range((3, 8, 1, 40, 17, 5, 9, 16)[i])]
        prompt = shared + own if i % 2 == 0 else own
        requests.append(request(f"r{i}", prompt, **{"max_tokens": 24, **style}))
    return requests


@pytest.fixture(scope="module")
def expected(model: Decoder, folder: Path) -> dict[tuple[str, int], Answer]:
    return run(core_of(model, folder, "none"), traffic())


@pytest.mark.parametrize(
    "options", [{}, {"budget": 20}, {"num_blocks": 26}, {"num_blocks": 30, "budget": 17, "draft_tokens": 64}]
)
def test_outputs_are_the_same_with_a_head_in_mixed_batches_chunks_hits_and_preemption(
    model: Decoder, folder: Path, head: Path, expected: dict[tuple[str, int], Answer], options: dict[str, int]
) -> None:
    core = core_of(model, folder, head, **options)
    found = run(core, guessing(traffic()), stagger=2)
    assert tokens(found) == tokens(expected)
    assert [found[key].logprobs for key in found] == [expected[key].logprobs for key in found]
    stats = core.stats()
    assert stats.spec_proposed["eagle"] > 100
    assert core.scheduler.cache.pool.counts.active == 0
    if "num_blocks" in options:
        assert sum(answer.num_preemptions for answer in found.values()) > 0, "the pool was meant to be too small"
    drafter = core.speculation._drafters["eagle"]
    assert isinstance(drafter, Eagle)
    assert not drafter._contexts
    assert drafter._cache is not None
    assert drafter._cache.num_texts == 0


@pytest.mark.parametrize("options", [{}, {"budget": 20}, {"num_blocks": 26}])
def test_contexts_are_of_the_hidden_states_of_the_whole_text(
    model: Decoder, folder: Path, head: Path, options: dict[str, int]
) -> None:
    """Chunked prompts, prefix hits, preemption, forks: every hidden state that a head is given is its token's own."""
    core = core_of(model, folder, head, **options)
    runner = NotingRunner(num_blocks=200, vocab_size=300)
    drafter = core.speculation._drafter("eagle")
    assert isinstance(drafter, Eagle)
    drafter.attach(runner, DraftCache(200, runner.block_size))
    seen: dict[str, list[tuple[int, np.ndarray]]] = {}
    todo = drafter._todo

    def noting_todo(*args: object) -> HeadPass | None:
        entry = todo(*args)  # type: ignore[arg-type]
        if entry is not None:
            view = args[2]
            first = drafter._contexts[view.key].base + entry.start  # type: ignore[attr-defined]
            seen.setdefault(view.key, []).append((first, entry.hidden))  # type: ignore[attr-defined]
        return entry

    drafter._todo = noting_todo  # type: ignore[method-assign]
    answers = run(core, guessing(traffic()), stagger=2)
    prompts = {one.request_id: one.prompt_token_ids for one in traffic()}
    reader = FeatureReader(model, 1, 128)
    assert set(seen) == {f"{name}/{choice}" for name, choice in answers}
    num_of_prompts = 0
    for key, given in seen.items():
        name, _, choice = key.rpartition("/")
        (hidden,) = reader.read([[*prompts[name], *answers[name, int(choice)].token_ids]])
        for first, rows in given:
            assert np.allclose(rows, hidden[first : first + len(rows)].numpy(), atol=2e-3)
            num_of_prompts += max(0, len(prompts[name]) - first)
    assert num_of_prompts > 30, "prompts were meant to be seen too"


# ---- files and offers


def test_a_head_is_read_as_it_was_written(head: Path, folder: Path) -> None:
    original, found = random_head(model_digest(folder)), read(head, model_digest(folder))
    assert found.shape == original.shape
    assert found.acceptance == (0.5,)
    for name, weight in original.weights.items():
        assert torch.equal(found.weights[name], weight)


def test_a_head_for_other_weights_is_refused_and_in_the_models_own_folder_left_out(
    model: Decoder, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(random_head("0" * 64), tmp_path / "other")
    with pytest.raises(ConfigError, match="is for other weights than the model's: run `kvasir train-drafter`"):
        DrafterSource(config_for(folder, tmp_path / "other"), model)
    own = tmp_path / "model"
    own.mkdir()
    for path in folder.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    write(random_head("0" * 64), own / "eagle")
    assert "eagle" not in DrafterSource(config_for(own), model).names
    assert "is for other weights" in caplog.text
    write(random_head(model_digest(own)), own / "eagle")
    assert "eagle" in DrafterSource(config_for(own), model).names
    assert "eagle" not in DrafterSource(config_for(own, "none"), model).names


def test_a_head_of_another_width_is_refused(model: Decoder, folder: Path, tmp_path: Path) -> None:
    write(random_head(model_digest(folder), width=64), tmp_path)
    with pytest.raises(ConfigError, match="another width than the model's 32"):
        DrafterSource(config_for(folder, tmp_path), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(version=9), "has version 9, this server reads 1"),
        (lambda content: content.pop("target"), "is no file of `kvasir train-drafter`"),
        (lambda content: content["shape"].update(num_heads=1 << 40), "num_heads is"),
        (lambda content: content["shape"].update(num_heads=True), "num_heads is True"),
        (lambda content: content["shape"].update(intermediate_size=50), "does not fit eagle.json"),
        (lambda content: content["shape"].update(activation="relu"), "shape is"),
        (lambda content: content["shape"].update(unknown=1), "unknown"),
    ],
)
def test_a_changed_file_is_refused(head: Path, tmp_path: Path, change: object, message: str) -> None:
    content = json.loads((head / CONFIG_FILE).read_text())
    change(content)  # type: ignore[operator]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    (tmp_path / WEIGHTS_FILE).write_bytes((head / WEIGHTS_FILE).read_bytes())
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04garbage", None])
def test_weights_that_cannot_be_read_are_refused(head: Path, tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / CONFIG_FILE).write_bytes((head / CONFIG_FILE).read_bytes())
    if content is not None:
        (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


def test_a_request_for_the_drafter_without_a_head_is_told_what_there_is(model: Decoder, folder: Path) -> None:
    core = core_of(model, folder, "none")
    with pytest.raises(InvalidParameter, match=r"drafter 'eagle' needs a trained head, .*; choose from aded, goose"):
        core.add(guessing([request("r", [5, 6, 7], max_tokens=4)])[0])
