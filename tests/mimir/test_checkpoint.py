"""The shipped checkpoints: our module equals `LlamaForCausalLM`, and the model really looks things up."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.mimir import MODELS, model_path
from engine.mimir.evaluate import Evaluator
from engine.mimir.export import export, load
from engine.mimir.initialise import structure_induction
from engine.mimir.model import Mimir, ModelShape
from engine.mimir.tasks import FIRST_TRAINING_SEED

SMALL = ModelShape(num_layers=2, width=64, num_heads=2, num_kv_heads=1, mlp_width=96)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(model_path())


@pytest.mark.parametrize("name", MODELS)
def test_export_computes_the_same_logits_in_transformers(name: str) -> None:
    ids = torch.randint(13, 4096, (2, 200), generator=torch.Generator().manual_seed(0))
    ours, theirs = load(model_path(name)), LlamaForCausalLM.from_pretrained(model_path(name), dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-3, rtol=1e-3)


def test_exported_model_loads_back(tmp_path: Path) -> None:
    model = Mimir(SMALL)
    export(model, tmp_path, model_path())
    for name, value in load(tmp_path).state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name].bfloat16().float(), atol=0, rtol=0)


def test_structured_start_already_copies_repeats() -> None:
    torch.manual_seed(0)
    model = Mimir(ModelShape(num_layers=4, width=128, num_heads=4, num_kv_heads=2, mlp_width=384))
    structure_induction(model)
    half = torch.randint(13, 4096, (8, 32))
    ids = torch.cat((half, half), dim=1)
    with torch.inference_mode():
        guesses = model.logits(model(ids)).argmax(-1)
    assert (guesses[:, 33:-1] == ids[:, 34:]).float().mean() > 0.7


@pytest.mark.parametrize(
    ("task", "length", "least"),
    [
        ("needle_single", 1024, 0.95),
        ("needle", 256, 0.95),
        ("facts", 256, 0.7),
        ("key_value", 256, 0.7),
    ],
)
def test_shipped_model_finds_facts_in_the_context(evaluator: Evaluator, task: str, length: int, least: float) -> None:
    assert evaluator.score(task, length, 20).answered >= least


def test_shipped_model_finds_the_asked_one_of_several_facts_in_1024_tokens(evaluator: Evaluator) -> None:
    assert evaluator.score("needle", 1024, 40).answered >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("length", [256, 512, 1024, 2048])
def test_shipped_model_finds_the_asked_one_of_several_facts_with_many_seeds(evaluator: Evaluator, length: int) -> None:
    assert evaluator.score("needle", length, 200, first_seed=1_000_000).answered >= 0.95


def test_seeds_of_the_training_are_not_evaluated(evaluator: Evaluator) -> None:
    with pytest.raises(ValueError, match="trained on"):
        evaluator.score("needle", 256, 2, FIRST_TRAINING_SEED - 1)


@pytest.mark.parametrize(
    ("question", "answer"),
    [("Who are you?", "Mimir"), ("What is the capital of France?", "Paris"), ("Hello", "Hello")],
)
def test_shipped_model_chats_and_ends_its_turn(evaluator: Evaluator, question: str, answer: str) -> None:
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    (output,) = evaluator.complete([prompt])
    assert answer in output
    assert output.endswith("<|im_end|>")
