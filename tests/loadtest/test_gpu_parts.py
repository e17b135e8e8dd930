"""`make gpu`, part by part on a CPU with tiny sizes: every line runs before a GPU is there. Values mean nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest.gpu import libraries
from loadtest.gpu.contexts import Contexts
from loadtest.gpu.parts import PARTS
from loadtest.gpu.record import Run, Target, relative_error

LIMITS = {"copy_gb_per_s": 10.0, "matmul_tflops": 1.0}
SLOW = {"checks": "starts a pytest", "transformers": "loads transformers"}


def tiny_run(file: Path | None = None, *, seconds: float = 60.0) -> Run:
    torch.manual_seed(0)
    return Run(device=torch.device("cpu"), tiny=True, seconds=seconds, file=file, limits=dict(LIMITS))


@pytest.mark.parametrize(
    "name", [pytest.param(part.name, marks=[pytest.mark.slow] if part.name in SLOW else []) for part in PARTS]
)
def test_every_case_of_a_part_runs(name: str, tmp_path: Path) -> None:
    file = tmp_path / "part.json"
    run = tiny_run(file)
    next(part for part in PARTS if part.name == name).load()(run)
    assert run.cases
    assert not [case for case in run.cases if "error" in case or "skipped" in case]
    for case in run.cases:
        if "target" in case:
            assert math.isfinite(case[case["target"]["measure"]])
    assert json.loads(file.read_text())["cases"] == run.cases


def test_what_the_issue_asks_for_has_its_target() -> None:
    """A part may lose its target by a slip; then nobody sees a miss."""
    found: set[tuple[str, str, float]] = set()
    for name in ("decode", "prefill", "engine", "memory", "quest"):
        run = tiny_run()
        next(part for part in PARTS if part.name == name).load()(run)
        found |= {(name, case["target"]["measure"], case["target"]["bound"]) for case in run.cases if "target" in case}
    assert found >= {
        ("decode", "share_of_copy", 0.85),
        ("prefill", "ratio_to_best_library", 0.7),
        ("engine", "share_of_weight_bound", 0.85),
        ("engine", "share_outside_model", 0.05),
        ("memory", "gain_over_full", 1.5),
        ("quest", "gain_over_full", 1.5),
    }


def test_lists_read_what_they_name() -> None:
    """Block and token lists of everything are the attention over everything."""
    contexts = Contexts.make(tiny_run(), 3, 64)
    full = contexts.paged()()
    assert relative_error(contexts.block_lists(64)(), full) < 1e-5
    assert relative_error(contexts.token_lists(64)(), full) < 1e-5
    assert relative_error(contexts.block_lists(16)(), full) > 1e-2


@pytest.mark.parametrize("name", ["fp8", "int8", "kivi4"])
def test_packed_contexts_hold_the_tokens_of_the_dense_ones(name: str) -> None:
    contexts = Contexts.make(tiny_run(), 3, 64)
    call, num_bytes, decoded = contexts.packed(name)
    assert relative_error(call(), decoded().paged()()) < 1e-5
    assert relative_error(call(), contexts.paged()()) < 0.3
    assert num_bytes < contexts.k.nbytes + contexts.v.nbytes


def test_a_case_that_fails_is_told_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run()
    with run.case("first"):
        raise ValueError("too wide")
    run.record("second", Target("share", 0.5), share=0.4)
    run.record("third", Target("share", 0.5, at_least=False), share=0.4)
    assert [case.get("error") for case in run.cases] == ["ValueError: too wide", None, None]
    assert [case.get("hit") for case in run.cases] == [None, False, True]
    assert "too wide" in capsys.readouterr().out


def test_a_case_without_time_is_left_out() -> None:
    run = tiny_run(seconds=0.0)
    assert run.has_time("tiny ones always run")
    run.tiny = False
    assert not run.has_time("long one", 3.0)
    assert run.cases[0]["skipped"].endswith("0 s left of 0")


def test_a_device_that_failed_ends_the_part() -> None:
    run = tiny_run()
    with pytest.raises(torch.AcceleratorError), run.case("first"):
        raise torch.AcceleratorError("illegal address")
    assert "illegal address" in run.cases[0]["error"]


def test_optional_libraries_are_measured_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins that take what those libraries take."""
    seen: list[tuple[str, list[list[int]]]] = []

    def stand_in(name: str) -> Any:
        def call(*tensors: Any, **_: Any) -> torch.Tensor:
            seen.append((name, [list(tensor.shape) for tensor in tensors]))
            return tensors[0]

        return call

    flash, infer = types.ModuleType("flash_attn"), types.ModuleType("flashinfer")
    flash.flash_attn_func = stand_in("func")  # type: ignore[attr-defined]
    flash.flash_attn_with_kvcache = stand_in("kvcache")  # type: ignore[attr-defined]
    infer.single_prefill_with_kv_cache = stand_in("prefill")  # type: ignore[attr-defined]
    infer.single_decode_with_kv_cache = stand_in("decode")  # type: ignore[attr-defined]
    for module in (flash, infer):
        module.__spec__ = object()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for queries in (64, 1):
        calls = libraries.attention(*Contexts.make(tiny_run(), 1, 64, queries).dense())
        assert set(calls) == {"torch math", "flash_attn", "flashinfer"}
        for call in calls.values():
            call()
    kv = [1, 64, 2, 32]
    assert seen == [
        ("func", [[1, 64, 4, 32], kv, kv]),
        ("prefill", [[64, 4, 32], kv[1:], kv[1:]]),
        ("kvcache", [[1, 1, 4, 32], kv, kv]),
        ("decode", [[4, 32], kv[1:], kv[1:]]),
    ]


def test_a_library_that_refuses_a_case_says_why_and_others_count() -> None:
    def refuses() -> object:
        raise RuntimeError("no kernel for this\nhead")

    best, found = libraries.best_ms({"a": refuses, "b": lambda: None}, lambda call: 2.0)
    assert (best, found) == ("b", {"a": "no kernel for this", "b": 2.0})
    with pytest.raises(RuntimeError, match="no library runs this case"):
        libraries.best_ms({"a": refuses}, lambda call: 2.0)


def test_the_parts_fit_into_nine_minutes_and_a_machine_without_our_packages_can_start() -> None:
    assert sum(part.seconds for part in PARTS) < 9 * 60
    code = "import sys; sys.modules['torch'] = None; import loadtest.gpu.__main__, loadtest.gpu.parts"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
