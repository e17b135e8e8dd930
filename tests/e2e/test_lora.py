"""Low-rank adapters through the whole engine: equal to merged weights, alone and mixed, loaded and unloaded."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import kernels
from engine.config import CacheConfig, Config, LoraConfig, ModelConfig, SchedulerConfig
from engine.core import EngineCore
from engine.errors import ConfigError, InvalidParameter, ModelNotFound
from engine.launch import wire
from engine.models import load_model
from engine.models.batch import ForwardBatch, Model
from engine.models.decoder import Decoder
from engine.models.lora_file import read_adapter
from engine.scheduling.invariants import check_invariants
from engine.types import EngineRequest, ModelInfo
from tests.e2e.driving import Answer, request, run, tokens
from tests.models.families import CASES, VOCAB, Case, save
from tests.models.lora_adapters import ALL_LINEAR, random_adapter, write_adapter
from tests.models.paged_driver import PagedDriver, PagedRequest

CPU = torch.device("cpu")
LOGITS_TOLERANCE = 1e-4
NUM_TOKENS = 32
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# family -> what its adapter targets: everything, fused checkpoints, sandwich norms, attention of a mixture of experts
TARGETS = {
    "llama": ALL_LINEAR,
    "qwen2": ("k_proj", "v_proj", "down_proj"),
    "phi3": FUSED,
    "gemma2": ALL_LINEAR,
    "qwen3_moe": ("q_proj", "o_proj"),
}
FAMILIES = [case for case in CASES if case.name in TARGETS]


@dataclass
class Served:
    """A tiny model, its folder of adapters, and for each adapter the model with it merged in; "" is the base."""

    model: Model
    root: Path
    merged: dict[str, PreTrainedModel]


def build(case: Case, root: Path, adapters: Sequence[tuple[str, dict[str, object]]]) -> Served:
    reference = case.build()
    model = load_model(
        save(reference, root / "model"), dtype="float32", kind="native", max_model_len=case.max_model_len
    )
    merged = {"": reference}
    for seed, (name, options) in enumerate(adapters):
        given = {"targets": TARGETS[case.name], "seed": seed, **options}
        _, merged[name] = random_adapter(root / "adapters" / name, reference, **given)  # type: ignore[arg-type]
    return Served(model, root / "adapters", merged)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda case: case.name)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp(request.param.name)
    return build(request.param, root, [("a", {"rank": 8, "use_rslora": True}), ("b", {"rank": 3, "lora_alpha": 5})])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Served:
    ranks = {"a": 4, "b": 16, "c": 1, "d": 8}
    return build(FAMILIES[0], tmp_path_factory.mktemp("llama"), [(name, {"rank": r}) for name, r in ranks.items()])


def engine(
    served: Served, names: Sequence[str], *, num_blocks: int = 256, max_lora_adapters: int = 4, budget: int = 20
) -> tuple[EngineCore, ModelInfo]:
    config = Config(
        model=ModelConfig(max_model_len=min(128, served.model.max_model_len)),
        cache=CacheConfig(block_size=8, num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget),
        lora=LoraConfig(
            enable_lora=True,
            max_lora_adapters=max_lora_adapters,
            lora_root=str(served.root),
            lora_adapters=tuple(f"{name}={name}" for name in names),
        ),
    )
    return wire(served.model, config, CPU)


def with_adapter(info: ModelInfo, name: str, given: EngineRequest) -> EngineRequest:
    """ "" is the base model."""
    keys = {"": "", **{adapter.name: adapter.key for adapter in info.adapters}}
    return msgspec.structs.replace(given, adapter=keys[name])


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class AdaptedDriver(PagedDriver):
    """A PagedDriver whose requests run with the adapters of `index`, 0 where absent."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.index: dict[int, int] = {}  # by id() of the request

    def _batch(self, work: Sequence[tuple[PagedRequest, int]]) -> ForwardBatch:
        indices = [self.index.get(id(paged), 0) for paged, count in work for _ in range(count)]
        plan = kernels.plan_lora(indices) if any(indices) else None
        return dataclasses.replace(super()._batch(work), adapters=plan)


@torch.inference_mode()
def reference_logits(reference: PreTrainedModel, token_ids: list[int]) -> Tensor:
    return reference(torch.tensor([token_ids]), use_cache=False).logits[0]


@torch.inference_mode()
def test_logits_equal_those_of_merged_weights(family: Served) -> None:
    """Base and both adapters interleaved in one batch, in two chunks."""
    assert isinstance(family.model, Decoder)
    room = family.model.enable_adapters(2)
    for index, name in enumerate(("a", "b"), start=1):
        room.add(index, read_adapter(family.root / name, room.targets, max_rank=64))
    driver = AdaptedDriver(family.model)
    prompts = [PagedRequest(random_ids(count, seed=count)) for count in (21, 30, 17)]
    driver.index = {id(paged): index for index, paged in enumerate(prompts)}
    first = driver.forward([(prompts[1], 12), (prompts[0], 5), (prompts[2], 16)])
    second = driver.forward([(prompts[0], 16), (prompts[2], 1), (prompts[1], 18)])
    hidden = [torch.cat(parts) for parts in ((first[1], second[0]), (first[0], second[2]), (first[2], second[1]))]
    base = reference_logits(family.merged[""], prompts[1].token_ids)
    for name, paged, states in zip(("", "a", "b"), prompts, hidden, strict=True):
        expected = reference_logits(family.merged[name], paged.token_ids)
        torch.testing.assert_close(family.model.logits(states), expected, rtol=0, atol=LOGITS_TOLERANCE)
    assert (base - reference_logits(family.merged["a"], prompts[1].token_ids)).abs().max() > 0.1


@torch.inference_mode()
def test_greedy_tokens_equal_those_of_merged_weights(family: Served) -> None:
    core, info = engine(family, ["a", "b"])
    prompts = {name: random_ids(count, seed=count) for name, count in (("a", 17), ("b", 26), ("", 9))}
    requests = [
        with_adapter(info, name, request(name or "base", prompt, max_tokens=NUM_TOKENS))
        for name, prompt in prompts.items()
    ]
    answers = run(core, requests, stagger=3)
    for name, prompt in prompts.items():
        output = answers[name or "base", 0].token_ids
        logits = reference_logits(family.merged[name], prompt + output[:-1])
        assert output == logits[len(prompt) - 1 :].argmax(dim=-1).tolist()


def mixed_load(info: ModelInfo) -> list[EngineRequest]:
    """Prompts that share beginnings across adapters, with chunks, samplers and several choices."""
    shared = random_ids(20, seed=5)
    load = []
    for i, name in enumerate(["a", "", "b", "c", "a", "d", "", "b"]):
        prompt = shared[: 8 + 4 * (i % 3)] + random_ids(3 + 5 * (i % 4), seed=i)
        options = {"temperature": 0.9, "seed": i} if i % 2 else {}
        given = request(f"{i}{name}", prompt, max_tokens=12, num_choices=1 + i // 7, logprobs=2, **options)
        load.append(with_adapter(info, name, given))
    return load


@pytest.fixture(scope="module")
def alone(llama: Served) -> dict[tuple[str, int], Answer]:
    """Each request of the mixed load in an engine of its own."""
    _, info = engine(llama, "abcd")
    answers: dict[tuple[str, int], Answer] = {}
    for given in mixed_load(info):
        core, _ = engine(llama, "abcd")
        answers |= run(core, [given])
    return answers


@pytest.mark.parametrize("num_blocks", [256, 18], ids=["room", "preemption"])
def test_adapters_and_base_in_one_batch_give_what_each_gives_alone(
    llama: Served, alone: dict[tuple[str, int], Answer], num_blocks: int
) -> None:
    core, info = engine(llama, "abcd", num_blocks=num_blocks)
    together = run(core, mixed_load(info), stagger=1)
    assert tokens(together) == tokens(alone)
    if kernels.backend.select("lora", CPU) == "cpp":
        assert all(together[key].logprobs == alone[key].logprobs for key in together), "bits depend on the batch"
    assert any(answer.num_preemptions for answer in together.values()) == (num_blocks == 18)
    check_invariants(core.scheduler)


def test_the_base_model_has_the_same_bits_as_without_adapters(
    llama: Served, alone: dict[tuple[str, int], Answer]
) -> None:
    config = Config(model=ModelConfig(max_model_len=128), cache=CacheConfig(block_size=8, num_blocks=256))
    core, info = wire(llama.model, config, CPU)
    assert info.adapters == []
    plain = [given for given in mixed_load(engine(llama, "abcd")[1]) if not given.adapter]
    answers = run(core, plain)
    assert len(answers) == 2
    assert all(answers[key] == alone[key] for key in answers)
    with pytest.raises(ModelNotFound):
        core.add(msgspec.structs.replace(plain[0], adapter="a@0"))


def test_cached_prefixes_belong_to_one_version_of_one_adapter(llama: Served) -> None:
    core, info = engine(llama, "ab")
    prompt = random_ids(40, seed=3)

    def num_cached(serial: int, key: str) -> int:
        given = msgspec.structs.replace(request(f"r{serial}", prompt, max_tokens=1), adapter=key)
        return run(core, [given])[f"r{serial}", 0].num_cached_tokens

    keys = ["", *(adapter.key for adapter in info.adapters)]
    assert [num_cached(i, key) for i, key in enumerate(keys)] == [0, 0, 0]
    assert [num_cached(3 + i, key) for i, key in enumerate(keys)] == [32, 32, 32]
    other = load(core, "a", "c", replaces=keys[1])
    assert num_cached(6, other) == 0


def load(core: EngineCore, name: str, path: str, replaces: str = "") -> str:
    answer = core.controls.call("load_adapter", {"name": name, "path": path, "replaces": replaces})
    key: str = answer["adapter"]["key"]
    return key


def test_an_adapter_that_is_unloaded_serves_its_requests_to_their_end(
    llama: Served, alone: dict[tuple[str, int], Answer]
) -> None:
    core, info = engine(llama, "abcd")
    running = [given for given in mixed_load(info) if given.request_id in ("0a", "4a", "7b")]
    rows = core.runner._adapters  # type: ignore[attr-defined]
    num_bytes = rows.num_bytes
    for given in running:
        core.add(given)
    outputs = [output for _ in range(4) for output in core.step()]
    keys = {adapter.name: adapter.key for adapter in info.adapters}
    for name in "ab":
        core.controls.call("unload_adapter", {"key": keys[name]})
        with pytest.raises(ModelNotFound, match="not loaded any more"):
            core.add(with_adapter(info, name, request("late", [5, 6], max_tokens=1)))
    assert rows.num_bytes == num_bytes
    check_invariants(core.scheduler)
    while core.has_work:
        outputs += core.step()
        check_invariants(core.scheduler)
    for given in running:
        for choice in range(given.num_choices):
            seen = [o.token_ids for o in outputs if (o.request_id, o.choice) == (given.request_id, choice)]
            assert list(itertools.chain(*seen)) == alone[given.request_id, choice].token_ids
    assert core.scheduler.adapters.num_loaded == 2
    sizes = {adapter.name: adapter.num_bytes for adapter in info.adapters}
    assert rows.num_bytes == sizes["c"] + sizes["d"]


def test_an_abort_lets_go_of_an_adapter_too(llama: Served) -> None:
    core, info = engine(llama, "ab")
    for serial, name in enumerate("aab"):
        core.add(with_adapter(info, name, request(f"r{serial}", random_ids(9, serial), max_tokens=20, num_choices=2)))
    core.step()
    for adapter in info.adapters:
        core.controls.call("unload_adapter", {"key": adapter.key})
    for serial in range(3):
        assert core.scheduler.adapters.num_loaded == (2 if serial < 2 else 1)
        core.abort(f"r{serial}")
        check_invariants(core.scheduler)
    assert core.scheduler.adapters.num_loaded == 0
    assert not core.has_work


def test_adapters_are_loaded_replaced_and_bounded_while_the_engine_runs(
    llama: Served, alone: dict[tuple[str, int], Answer]
) -> None:
    core, _ = engine(llama, [], max_lora_adapters=2)
    key = load(core, "a", "a")
    assert load(core, "a", "a", replaces=key) == key  # the same files: nothing changes
    given = msgspec.structs.replace(mixed_load(engine(llama, "abcd")[1])[0], adapter=key)
    core.add(given)
    outputs = core.step()
    other = load(core, "b", "b")
    with pytest.raises(InvalidParameter, match="2 adapters are loaded, the limit is 2; unload one"):
        load(core, "c", "c")
    newer = load(core, "a", "d", replaces=key)  # in place, also in a full table
    core.controls.call("unload_adapter", {"key": key})
    with pytest.raises(InvalidParameter, match="1 of them until their last requests end"):
        load(core, "c", "c")
    while core.has_work:
        outputs += core.step()
    assert [token for output in outputs for token in output.token_ids] == alone[given.request_id, 0].token_ids
    assert newer != key
    assert core.scheduler.adapters.num_loaded == 2
    core.controls.call("unload_adapter", {"key": other})
    load(core, "c", "c")


@pytest.fixture
def outside(llama: Served, tmp_path: Path) -> Iterator[Path]:
    """An adapter outside of the root, and links to it and to one of its files inside."""
    folder, _ = random_adapter(tmp_path / "secret", llama.merged[""], rank=2)
    link, half = llama.root / "link", llama.root / "half"
    link.symlink_to(folder)
    half.mkdir()
    (half / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    (half / "adapter_model.safetensors").symlink_to(folder / "adapter_model.safetensors")
    yield folder
    link.unlink()
    (half / "adapter_model.safetensors").unlink()
    (half / "adapter_config.json").unlink()
    half.rmdir()


def test_nothing_outside_of_the_root_can_be_loaded_or_told_apart(llama: Served, outside: Path) -> None:
    core, _ = engine(llama, [])
    load(core, "inside", str(llama.root / "a"))
    paths = [str(outside), "../../secret", "../model", "link", "half", "absent", "", ".", "a/../..", "a\0b", "x" * 5000]
    messages = set()
    for path in paths:
        with pytest.raises(InvalidParameter) as error:
            load(core, "x", path)
        assert error.value.param == "lora_path"
        messages.add(str(error.value))
    assert messages <= {
        "lora_path is no folder below the one that the operator has set for adapters",
        "adapter_config.json of model folder 'adapters' cannot be read: No such file or directory",
    }
    for name in ("", "../x", "a b", "a" * 129, "-a", "a@b"):
        with pytest.raises(InvalidParameter, match="name of an adapter"):
            load(core, name, "a")


def test_settings_that_cannot_be_honoured_end_the_start(llama: Served, tmp_path: Path) -> None:
    for names, reason in (
        (["absent"], "cannot be read"),
        (["a", "a"], "names 'a' twice"),
        ([".."], "cannot be loaded"),
    ):
        with pytest.raises(ConfigError, match=reason):
            engine(llama, names)
    with pytest.raises(ConfigError, match="2 adapters are loaded, the limit is 2"):
        engine(llama, ["a", "b", "c"], max_lora_adapters=2)
    with pytest.raises(ConfigError, match="need --enable-lora"):
        wire(llama.model, Config(lora=LoraConfig(lora_root="x")), CPU)
    with pytest.raises(ConfigError, match="write name=folder"):
        wire(llama.model, Config(lora=LoraConfig(enable_lora=True, lora_adapters=("a",))), CPU)
    adapted = load_model(tmp_path_model(llama), kind="transformers")
    with pytest.raises(ConfigError, match="needs a native decoder"):
        wire(adapted, Config(lora=LoraConfig(enable_lora=True)), CPU)
    core, _ = wire(llama.model, Config(model=ModelConfig(max_model_len=64), lora=LoraConfig(enable_lora=True)), CPU)
    with pytest.raises(InvalidParameter, match="no --lora-root"):
        load(core, "a", "a")


def tmp_path_model(served: Served) -> Path:
    return served.root.parent / "model"


def test_a_broken_adapter_leaves_the_loaded_ones_alone(llama: Served) -> None:
    core, info = engine(llama, "a", max_lora_adapters=2)
    write_adapter(llama.root / "broken", {}, use_dora=True)
    with pytest.raises(InvalidParameter, match="use_dora") as error:
        load(core, "broken", "broken")
    assert error.value.param == "lora_path"
    assert core.scheduler.adapters.num_loaded == 1
    given = with_adapter(info, "a", request("r", [5, 6, 7], max_tokens=4))
    assert len(run(core, [given])["r", 0].token_ids) == 4
