"""Kernel benchmarks: every kernel runs, compares like with like, and is held against limits of the same process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loadtest.micro import __main__ as command
from loadtest.micro import attention, bench, matrices, rows, sampling
from loadtest.micro.bench import Bench, Limits, measure
from loadtest.micro.setup import Setup, cpu_setup

LIMITS = Limits(gb_per_s=10.0, gflops=100.0)


@pytest.fixture
def setup() -> Setup:
    torch.manual_seed(0)
    return replace(cpu_setup(), hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=32, vocab=500, tokens=64)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "FMA_COUNT", 1000)
    monkeypatch.setattr(bench, "ROUNDS", 1)


def test_every_kernel_has_a_line_and_json(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "cpu_setup", lambda: setup)
    out = tmp_path / "micro.json"
    assert command.main(["--seconds", "0", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    kernels = {row["kernel"].split()[0] for row in found["kernels"]}
    assert kernels == (set(command.KERNELS) - {"decode", "prefill"}) | {"paged_attention", "add_rms_norm"}
    assert all(row["us"] > 0 and row["bound_us"] > 0 and row["best_library"] for row in found["kernels"])
    assert found["limits"]["gb_per_s"] > 0 < found["limits"]["gflops"]
    assert "of bound" in capsys.readouterr().out


def test_only_named_kernels_run(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "cpu_setup", lambda: setup)
    assert command.main(["top_slots", "--seconds", "0"]) == 0
    assert "rms_norm" not in capsys.readouterr().out


def test_the_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    reading = Bench("x", "", lambda: None, num_bytes=10**9, num_flops=10**9)
    computing = replace(reading, num_flops=10**11)
    assert (LIMITS.bound_by(reading), LIMITS.bound_s(reading)) == ("memory", pytest.approx(0.1))
    assert (LIMITS.bound_by(computing), LIMITS.bound_s(computing)) == ("arithmetic", pytest.approx(1.0))


def test_the_fastest_library_operation_is_the_yardstick() -> None:
    spin = torch.randn(300, 300)
    run = Bench(
        "x", "", lambda: None, num_bytes=1, library={"slow": lambda: [spin @ spin for _ in range(9)], "fast": int}
    )
    result = measure(run, LIMITS, 0.01, torch.device("cpu"))
    assert result.best_library == "fast"
    assert result.speedup == result.library_us["fast"] / result.us


def test_calls_take_turns() -> None:
    seen: list[int] = []
    take = bench.timed([lambda: seen.append(0), lambda: seen.append(1)], torch.device("cpu"))
    for _ in range(4):
        take()
    assert seen == [0, 1, 0, 1]


@pytest.mark.parametrize("make", [rows.rms_norm, rows.act_and_mul, rows.embedding, sampling.sampling, rows.top_slots])
def test_library_and_kernel_do_the_same_work(setup: Setup, make: object) -> None:
    assert callable(make)
    one = make(setup)[0]
    (library,) = one.library.values()
    own = one.run().float().clone()  # both may write into one output
    torch.testing.assert_close(own, library().float(), rtol=1e-4, atol=1e-4)


def test_products_agree_with_those_of_the_library(setup: Setup) -> None:
    for one in matrices.linear(setup, rows=(1, 5)):
        own = one.run[0]()
        torch.testing.assert_close(own, one.library["F.linear"][0](), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own, one.library["mm"][0]().t(), rtol=1e-4, atol=1e-4)


def test_products_of_bfloat16_agree_with_those_of_the_library(setup: Setup) -> None:
    for one in matrices.bf16_linear(setup, rows=(1, 5)):
        (library,) = one.library.values()
        torch.testing.assert_close(one.run[0](), library[0]().float(), rtol=2e-2, atol=2e-2)  # it rounds its result too


def test_attention_agrees_with_that_of_the_library(setup: Setup) -> None:
    for one in (*attention.decode(setup, ((3, 64),)), *attention.prefill(setup, (48,))):
        found = one.library["sdpa"]().transpose(1, 2).reshape(-1, setup.heads, setup.head_dim)
        torch.testing.assert_close(one.run(), found, rtol=1e-4, atol=1e-4)


def test_scores_agree_with_those_of_the_library(setup: Setup) -> None:
    """Of the last query alone, which sees everything; the library's formula masks nothing."""
    (one,) = attention.attention_scores(setup, context=64)
    scores = one.run()
    assert scores.shape == (1, 1, setup.kv_heads, 64)
    assert scores.sum() == pytest.approx(setup.heads * attention.SCORE_QUERIES * 1.0, rel=1e-3)
