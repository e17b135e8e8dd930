"""Embeddings and class scores through the whole engine, compared with transformers and plain torch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.errors import ConfigError
from engine.models.fields import Fields
from engine.models.pooling_config import has_language_head, is_encoder
from engine.types import EngineRequest
from tests.e2e.driving import request
from tests.pooling_models import build, core_of, pooling_request, run, sentence_transformers, vector

TOLERANCE = 1e-4
METHODS = ("last", "mean", "cls", "weighted")
LENGTHS = (1, 5, 30, 61)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [[int(i) for i in np.random.RandomState(n).randint(4, 128, n)] for n in lengths]


def pooled(hidden: Tensor, method: str) -> Tensor:
    """The definition: hidden states [n, C] -> [C]."""
    weights = torch.arange(1, hidden.shape[0] + 1, dtype=hidden.dtype)
    return {
        "last": hidden[-1],
        "mean": hidden.mean(0),
        "cls": hidden[0],
        "weighted": (hidden * weights[:, None]).sum(0) / weights.sum(),
    }[method]


@torch.no_grad()
def hidden_of(model: torch.nn.Module, ids: list[int]) -> Tensor:
    base = getattr(model, "model", model)
    return base(torch.tensor([ids])).last_hidden_state[0]


def close(got: np.ndarray, expected: Tensor) -> None:
    assert got.shape == tuple(expected.shape)
    assert np.abs(got - expected.numpy()).max() < TOLERANCE


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, build("LlamaForCausalLM", folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_generative_decoder_embeds_by_any_method_whatever_the_chunks(
    llama: tuple[Path, torch.nn.Module], method: str
) -> None:
    folder, model = llama
    core, info = core_of(folder, pooling=method, budget=16)
    assert info.can_generate
    outputs = run(core, [pooling_request(str(i), ids, method=method) for i, ids in enumerate(prompts())])
    for i, ids in enumerate(prompts()):
        close(vector(outputs[str(i)]), functional.normalize(pooled(hidden_of(model, ids), method), dim=0))
    assert outputs["2"][0].num_cached_tokens == 0


def test_token_embeddings_are_the_hidden_states(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, model = llama
    core, _ = core_of(folder, pooling="mean", budget=16)
    ids = prompts()[2]
    options = {"task": "token_embed", "method": "mean", "activate": False}
    got = vector(run(core, [pooling_request("a", ids, **options)])["a"])
    close(got, hidden_of(model, ids))
    halves = vector(run(core, [pooling_request("b", ids, **{**options, "dimensions": 32, "activate": True})])["b"])
    close(halves, functional.normalize(hidden_of(model, ids)[:, :32], dim=1))


def test_results_have_the_same_bits_in_every_batch_and_chunking(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = llama
    seen: dict[str, bytes] = {}
    for budget, stagger in ((512, 0), (16, 0), (7, 0), (16, 3)):
        core, _ = core_of(folder, pooling="mean", budget=budget, deterministic=True)
        requests = [
            pooling_request(f"{method} {i}", ids, method=method)
            for method, (i, ids) in itertools.product(METHODS, enumerate(prompts()))
        ]
        for name, outputs in run(core, requests, stagger=stagger).items():
            data = vector(outputs).tobytes()
            assert seen.setdefault(name, data) == data, (name, budget, stagger)


def test_prefix_hits_serve_the_last_token_and_nothing_else(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = llama
    core, _ = core_of(folder, pooling="last", deterministic=True)
    ids = prompts()[3]
    first = {m: run(core, [pooling_request("a", ids, method=m)])["a"] for m in METHODS}
    again = {m: run(core, [pooling_request("b", ids, method=m)])["b"] for m in METHODS}
    for method in METHODS:
        assert vector(first[method]).tobytes() == vector(again[method]).tobytes()
    assert {m: outputs[0].num_cached_tokens for m, outputs in again.items()} == {
        "last": 56,
        "mean": 0,
        "cls": 0,
        "weighted": 0,
    }
    tokens = run(core, [request("t", ids, max_tokens=1)])["t"]
    assert tokens[0].num_cached_tokens == 56, "a mean bypasses the cache and still feeds it"


def test_generation_keeps_its_tokens_beside_embeddings(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = llama

    def generating() -> list[EngineRequest]:
        return [request(f"g{i}", ids, max_tokens=12, temperature=0.8, seed=i) for i, ids in enumerate(prompts())]

    core, _ = core_of(folder, pooling="mean", deterministic=True)
    alone = {name: [t for o in outs for t in o.token_ids] for name, outs in run(core, generating()).items()}
    embedding = [pooling_request(f"e{i}", ids, method=METHODS[i % 4]) for i, ids in enumerate(prompts() * 2)]
    mixed = [item for pair in itertools.zip_longest(generating(), embedding) for item in pair if item is not None]
    core, _ = core_of(folder, pooling="mean", deterministic=True)
    both = run(core, mixed, stagger=1)
    assert {name: [t for o in both[name] for t in o.token_ids] for name in alone} == alone
    assert all(vector(both[e.request_id]).shape == (64,) for e in embedding)


def test_preempted_embeddings_start_over_and_come_out_the_same(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = llama
    long = [[int(i) for i in np.random.RandomState(n).randint(4, 128, 57)] for n in range(3)]
    requests = [pooling_request(f"e{i}", ids, method="mean") for i, ids in enumerate(long)]
    core, _ = core_of(folder, pooling="mean", deterministic=True, prefix_cache=False, max_model_len=64)
    calm = {name: vector(outputs).tobytes() for name, outputs in run(core, requests).items()}
    core, _ = core_of(folder, pooling="mean", deterministic=True, num_blocks=12, prefix_cache=False, max_model_len=64)
    generating = [request(f"g{i}", [5 + i] * 40, max_tokens=16) for i in range(2)]
    urgent = [EngineRequest(**{**_fields(g), "priority": -1}) for g in generating]
    tight = run(core, [requests[0], *urgent, *requests[1:]], stagger=1)
    assert {name: vector(tight[name]).tobytes() for name in calm} == calm
    assert sum(tight[name][0].num_preemptions for name in calm) > 0


def _fields(item: EngineRequest) -> dict[str, object]:
    return {name: getattr(item, name) for name in item.__struct_fields__}


def test_an_aborted_embedding_leaves_nothing_behind(llama: tuple[Path, torch.nn.Module]) -> None:
    folder, _ = llama
    core, _ = core_of(folder, pooling="mean", budget=8)
    core.add(pooling_request("gone", prompts()[3], method="mean"))
    core.step()
    core.abort("gone")
    outputs = run(core, [pooling_request("next", prompts()[1], method="mean")])
    vector(outputs["next"])
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_active) == (0, 0, 0)


def test_a_decoder_that_classifies_scores_as_transformers_does(tmp_path: Path) -> None:
    for name, options in (("Llama", {}), ("Qwen3", {"head_dim": 16})):
        folder = tmp_path / name
        model = build(f"{name}ForSequenceClassification", folder, num_labels=3, **options)
        core, info = core_of(folder)
        assert not info.can_generate
        assert info.pooling is not None
        assert (info.pooling.tasks, info.pooling.activation) == (["classify"], "softmax")
        outputs = run(core, [pooling_request(str(i), ids, task="classify") for i, ids in enumerate(prompts())])
        for i, ids in enumerate(prompts()):
            with torch.no_grad():
                close(vector(outputs[str(i)]), model(torch.tensor([ids])).logits[0].softmax(0))


def test_a_bare_decoder_embeds_by_its_last_token(tmp_path: Path) -> None:
    model = build("Qwen3Model", tmp_path, head_dim=16)
    core, info = core_of(tmp_path)
    assert (info.can_generate, info.pooling and info.pooling.method) == (False, "last")
    outputs = run(core, [pooling_request("a", prompts()[2])])
    close(vector(outputs["a"]), functional.normalize(hidden_of(model, prompts()[2])[-1], dim=0))


def test_a_language_model_with_sentence_transformers_modules_embeds_and_generates(tmp_path: Path) -> None:
    """The layout of Qwen3-Embedding: last token, length one."""
    model = build("Qwen3ForCausalLM", tmp_path, head_dim=16, tie_word_embeddings=True)
    sentence_transformers(tmp_path, "lasttoken")
    core, info = core_of(tmp_path)
    assert info.can_generate
    outputs = run(core, [pooling_request("a", prompts()[2]), request("g", prompts()[1], max_tokens=3)])
    close(vector(outputs["a"]), functional.normalize(hidden_of(model, prompts()[2])[-1], dim=0))
    assert len([t for o in outputs["g"] for t in o.token_ids]) == 3


def test_a_decoder_behind_the_transformers_adapter_embeds_too(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    model = build("GPT2LMHeadModel", tmp_path, **sizes)
    core, info = core_of(tmp_path, pooling="mean")
    assert info.can_generate
    outputs = run(core, [pooling_request("a", prompts()[2], method="mean"), request("g", prompts()[1], max_tokens=3)])
    hidden = hidden_of(model.transformer, prompts()[2])
    close(vector(outputs["a"]), functional.normalize(hidden.mean(0), dim=0))
    assert len([t for o in outputs["g"] for t in o.token_ids]) == 3


def test_what_a_folder_is_follows_from_its_architecture() -> None:
    expected = {
        "LlamaForCausalLM": (False, True),
        "LlamaModel": (False, False),
        "LlamaForSequenceClassification": (False, False),
        "GPT2LMHeadModel": (False, True),
        "GPT2Model": (True, False),
        "BertModel": (True, False),
        "BertForMaskedLM": (True, False),
        "BertForSequenceClassification": (True, False),
        "BloomForCausalLM": (False, True),
        "Gemma3TextModel": (False, False),
    }
    found = {}
    for name in expected:
        fields = Fields({"architectures": [name]}, "config.json")
        found[name] = is_encoder(fields), has_language_head(fields)
    assert found == expected
    both_ways = Fields({"architectures": ["Gemma3TextModel"], "use_bidirectional_attention": True}, "config.json")
    assert is_encoder(both_ways), "a decoder that attends in both directions is no decoder"


ROBERTA = {"pad_token_id": 1, "type_vocab_size": 1}
ENCODERS = {"BertModel": {}, "RobertaModel": ROBERTA, "XLMRobertaModel": ROBERTA}


@pytest.mark.parametrize("name", [*ENCODERS, "ModernBertModel"])
def test_encoders_embed_as_transformers_does_in_padded_batches(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path, **ENCODERS.get(name, {}))
    core, info = core_of(tmp_path, pooling="mean", budget=128)
    assert not info.can_generate
    requests = [pooling_request(f"{i} {m}", ids, method=m) for i, ids in enumerate(prompts()) for m in METHODS]
    outputs = run(core, requests)
    for i, ids in enumerate(prompts()):
        for method in METHODS:
            close(vector(outputs[f"{i} {method}"]), functional.normalize(pooled(hidden_of(model, ids), method), dim=0))
    assert core.stats().num_steps["prefill"] < len(requests), "texts share steps"


def test_the_pooler_of_a_bert_is_used_when_the_checkpoint_has_it(tmp_path: Path) -> None:
    model = build("BertModel", tmp_path)
    core, info = core_of(tmp_path)
    assert info.pooling is not None
    assert info.pooling.method == "head"
    with torch.no_grad():
        expected = model(torch.tensor([prompts()[1]])).pooler_output[0]
    got = vector(run(core, [pooling_request("a", prompts()[1], method="head")])["a"])
    close(got, functional.normalize(expected, dim=0))


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token", "weightedmean_tokens"])
def test_the_modules_of_sentence_transformers_decide(mode: str, tmp_path: Path) -> None:
    model = build("BertModel", tmp_path)
    weight = sentence_transformers(tmp_path, mode, dense=12, normalize=mode != "cls_token")
    core, info = core_of(tmp_path)
    assert info.pooling is not None
    method = {"mean_tokens": "mean", "cls_token": "cls", "weightedmean_tokens": "weighted"}[mode]
    facts = (info.pooling.method, info.pooling.normalize, info.pooling.embedding_size)
    assert facts == (method, mode != "cls_token", 12)
    ids = prompts()[2]
    expected = torch.tanh(functional.linear(pooled(hidden_of(model, ids), method), weight, torch.full((12,), 0.1)))
    options = {"method": method, "activate": info.pooling.normalize}
    cut = pooling_request("cut", ids, method=method, dimensions=5)
    outputs = run(core, [pooling_request("a", ids, **options), cut])
    close(vector(outputs["a"]), functional.normalize(expected, dim=0) if info.pooling.normalize else expected)
    close(vector(outputs["cut"]), functional.normalize(expected[:5], dim=0))


@pytest.mark.parametrize("name", ["Bert", "Roberta", "ModernBert"])
def test_a_cross_encoder_reads_pairs_as_transformers_does(name: str, tmp_path: Path) -> None:
    model = build(f"{name}ForSequenceClassification", tmp_path, num_labels=1, **ENCODERS.get(f"{name}Model", {}))
    core, info = core_of(tmp_path, budget=128)
    assert info.pooling is not None
    assert (info.pooling.tasks, info.pooling.activation) == (["classify"], "sigmoid")
    firsts = {ids[0]: len(ids) // 2 for ids in prompts((4, 9, 30))}
    requests = [
        pooling_request(str(ids[0]), ids, task="classify", num_first_tokens=firsts[ids[0]])
        for ids in prompts((4, 9, 30))
    ]
    outputs = run(core, requests)
    for ids in prompts((4, 9, 30)):
        types = torch.tensor([[int(i >= firsts[ids[0]]) for i in range(len(ids))]])
        kwargs = {"token_type_ids": types} if name == "Bert" else {}
        with torch.no_grad():
            expected = model(torch.tensor([ids]), **kwargs).logits[0].sigmoid()
        close(vector(outputs[str(ids[0])]), expected)


def test_encoder_results_do_not_depend_on_the_batch_in_deterministic_mode(tmp_path: Path) -> None:
    build("BertModel", tmp_path)
    seen: dict[str, bytes] = {}
    for budget, stagger in ((512, 0), (64, 0), (64, 2)):
        core, _ = core_of(tmp_path, pooling="mean", budget=budget, deterministic=True)
        requests = [pooling_request(str(i), ids, method="mean") for i, ids in enumerate(prompts())]
        for name, outputs in run(core, requests, stagger=stagger).items():
            assert seen.setdefault(name, vector(outputs).tobytes()) == vector(outputs).tobytes()


def test_a_text_as_long_as_the_context_runs_even_where_a_step_is_shorter(tmp_path: Path) -> None:
    build("BertModel", tmp_path)
    core, info = core_of(tmp_path, pooling="mean", budget=8)
    ids = prompts((info.max_model_len,))[0]
    vector(run(core, [pooling_request("a", ids, method="mean")])["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max_tokens is not supported"),
        ({"pooling_mode_cls_token": True}, "cls_token, mean_tokens"),
        ({"include_prompt": False}, "prompt's tokens"),
    ],
)
def test_a_pooling_that_is_not_ours_is_refused_at_load(change: dict[str, bool], message: str, tmp_path: Path) -> None:
    build("BertModel", tmp_path)
    sentence_transformers(tmp_path, "mean_tokens")
    file = tmp_path / "1_Pooling" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        core_of(tmp_path)


def test_modules_outside_of_the_folder_or_unknown_are_refused(tmp_path: Path) -> None:
    build("BertModel", tmp_path)
    sentence_transformers(tmp_path, "mean_tokens")
    file = tmp_path / "modules.json"
    modules = json.loads(file.read_text())
    for field, value, message in (("path", "../1_Pooling", "inside"), ("type", "x.models.LSTM", "'LSTM'")):
        file.write_text(json.dumps([modules[0], {**modules[1], field: value}]))
        with pytest.raises(ConfigError, match=message):
            core_of(tmp_path)


def test_prompts_are_read_and_checked(tmp_path: Path) -> None:
    build("BertModel", tmp_path)
    sentence_transformers(tmp_path, "mean_tokens")
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps({"prompts": {"query": "Q: ", "document": ""}, "default_prompt_name": "query"}))
    _, info = core_of(tmp_path)
    assert info.pooling is not None
    assert (info.pooling.prompts, info.pooling.default_prompt) == ({"query": "Q: "}, "query")
    file.write_text(json.dumps({"prompts": {}, "default_prompt_name": "query"}))
    with pytest.raises(ConfigError, match="default_prompt_name"):
        core_of(tmp_path)


def test_missing_and_wrong_weights_of_a_pooler_are_named(tmp_path: Path) -> None:
    build("BertModel", tmp_path)
    sentence_transformers(tmp_path, "mean_tokens", dense=12)
    file = tmp_path / "2_Dense" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "out_features": 13}))
    with pytest.raises(ConfigError, match=r"linear.weight.*\[12, 32\] instead of \[13, 32\]"):
        core_of(tmp_path)


def test_an_encoder_cannot_be_told_not_to_pool(tmp_path: Path) -> None:
    build("BertModel", tmp_path)
    with pytest.raises(ConfigError, match="generates no text"):
        core_of(tmp_path, pooling="none")
