"""16-bit checkpoints, and the mode in which the bits of a row do not depend on its batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.errors import ConfigError
from engine.models import load_model
from kernels import backend
from tests.e2e.driving import greedy
from tests.models.families import CASES, Case, save
from tests.models.paged_driver import PagedDriver, PagedRequest, prompt_logits

BY_NAME = {case.name: case for case in CASES}
TOLERANCE = 1e-3
PROMPTS = [list(range(3, 30)), list(range(100, 90, -1))]


@pytest.fixture(scope="module", params=["llama", "llama_tied_head_dim", "gemma2", "qwen2_moe"])
def case(request: pytest.FixtureRequest) -> Case:
    return BY_NAME[request.param]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_checkpoint_equals_transformers_on_the_same_values_in_fp32(
    case: Case, dtype: torch.dtype, tmp_path: Path
) -> None:
    save(case.build().to(dtype), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    model = load_model(tmp_path)
    assert model.dtype_name == str(dtype).removeprefix("torch.")
    for prompt, output in zip(PROMPTS, greedy(model, PROMPTS, 64), strict=True):
        token_ids = prompt + output[:-1]
        expected = reference(torch.tensor([token_ids]), use_cache=False).logits[0]
        torch.testing.assert_close(prompt_logits(model, token_ids, first_chunk=11), expected, rtol=0, atol=TOLERANCE)
        # Where the two disagree the candidates must be a near-tie.
        rows = expected[len(prompt) - 1 :]
        chosen = rows.gather(1, torch.tensor(output)[:, None])[:, 0]
        assert (rows.max(dim=1).values - chosen).max() < TOLERANCE


@torch.inference_mode()
def test_casting_while_loading_equals_a_cast_checkpoint(tmp_path: Path) -> None:
    reference = BY_NAME["llama"].build()
    save(reference, tmp_path / "fp32")
    save(reference.half(), tmp_path / "fp16")
    cast, stored = load_model(tmp_path / "fp32", dtype="float16"), load_model(tmp_path / "fp16")
    assert cast.weight_bytes == stored.weight_bytes
    actual, expected = (prompt_logits(model, PROMPTS[0], first_chunk=11) for model in (cast, stored))
    assert torch.equal(actual, expected)


@torch.inference_mode()
def test_bfloat16_rounds_what_enters_a_product_and_auto_does_not(case: Case, tmp_path: Path) -> None:
    save(case.build().bfloat16(), tmp_path)
    full, auto, rounded = (load_model(tmp_path, dtype=dtype) for dtype in ("float32", "auto", "bfloat16"))
    assert rounded.weight_bytes == auto.weight_bytes
    expected = prompt_logits(full, PROMPTS[0], first_chunk=11)
    auto_error, error = (
        (prompt_logits(model, PROMPTS[0], first_chunk=11) - expected).norm() / expected.norm()
        for model in (auto, rounded)
    )
    assert auto_error < 1e-4
    assert 1e-3 < error < 0.1  # random weights, in which nothing is redundant


@torch.inference_mode()
def test_routers_keep_their_activations_unrounded(tmp_path: Path) -> None:
    model = load_model(save(BY_NAME["qwen2_moe"].build(), tmp_path), dtype="bfloat16")
    if backend.select("linear", "cpu") != "cpp":
        pytest.skip("needs the native library")
    kinds = dict(entry.split(" ")[::-1] for entry in model.description()["linears"].split(", "))
    assert set(kinds) == {"panels_bf16_pairs", "panels_bf16"}
    num_moe = sum(layer.is_moe for layer in model.config.layers)
    assert int(kinds["panels_bf16"]) == 2 * num_moe  # the router and the gate of the shared expert


@torch.inference_mode()
def test_float32_keeps_16_bit_checkpoints_at_full_width(tmp_path: Path) -> None:
    save(BY_NAME["llama"].build().bfloat16(), tmp_path)
    auto, full = load_model(tmp_path), load_model(tmp_path, dtype="float32")
    assert full.weight_bytes > 1.7 * auto.weight_bytes
    torch.testing.assert_close(
        *(prompt_logits(model, PROMPTS[0], first_chunk=11) for model in (auto, full)), rtol=0, atol=TOLERANCE
    )


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "qwen2_moe", "olmoe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_rows_have_the_same_bits_in_any_batch_and_chunking(name: str, dtype: str, tmp_path: Path) -> None:
    model = load_model(save(BY_NAME[name].build(), tmp_path), dtype=dtype, deterministic=True)
    token_ids = PROMPTS[0]

    driver = PagedDriver(model)
    alone = PagedRequest(list(token_ids))
    steps = [driver.forward([(alone, 1)])[0] for _ in token_ids]
    expected = torch.cat([model.logits(hidden) for hidden in steps])

    driver = PagedDriver(model)
    request, mate = (PagedRequest(list(ids)) for ids in (token_ids, PROMPTS[1] * 4))
    first = driver.forward([(mate, 9), (request, 20)])[1]
    second = driver.forward([(request, 7), (mate, 17)])[0]
    assert torch.equal(model.logits(torch.cat([first, second])), expected)


def test_deterministic_mode_is_refused_where_no_kernel_can_keep_it(tmp_path: Path) -> None:
    save(BY_NAME["llama"].build(), tmp_path)
    with backend.using("torch"), pytest.raises(ConfigError, match="deterministic mode on CPU needs the native kernels"):
        load_model(tmp_path, deterministic=True)
