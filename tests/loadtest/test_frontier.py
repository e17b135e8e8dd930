"""The frontier: where first turns end, and a quick run that writes a whole table and a picture per task."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine.launch import resolve_model_path
from loadtest.frontier.command import main
from loadtest.frontier.policies import Setting, settings
from loadtest.frontier.samples import TASKS, Sample, Writer, question_start
from server import cli

WRITER = Writer(resolve_model_path("mimir"))
BY_NAME = {task.name: task for task in TASKS}


@pytest.mark.parametrize("name", ["needle", "multi-key", "aggregation", "variables", "qa"])
def test_a_context_ends_before_its_question(name: str) -> None:
    for seed in range(6):
        sample = WRITER.sample(BY_NAME[name], "agnostic", seed)
        before = WRITER.tokenizer.decode(sample.token_ids[: sample.first_turn])
        after = WRITER.tokenizer.decode(sample.token_ids[sample.first_turn :])
        assert 0 < sample.first_turn < len(sample.token_ids)
        assert "?" not in before
        assert len(after) < 200
        assert after.rstrip().endswith("assistant")
        assert sample.token_ids == WRITER.sample(BY_NAME[name], "aware", seed).token_ids


def test_the_first_turn_of_a_conversation_is_up_to_its_first_answer() -> None:
    for seed in range(4):
        sample = WRITER.sample(BY_NAME["conversation"], "multi-turn", seed)
        before = WRITER.tokenizer.decode(sample.token_ids[: sample.first_turn])
        assert before.count("<|im_start|>user") == 1
        assert before.endswith("<|im_start|>assistant\n")
        assert sample.first_turn < len(sample.token_ids) - 10


def test_running_text_is_cut_in_the_middle() -> None:
    sample = WRITER.running_text(BY_NAME["perplexity"], 3)
    assert (len(sample.token_ids), sample.first_turn) == (512, 256)
    assert sample == WRITER.running_text(BY_NAME["perplexity"], 3)


@pytest.mark.parametrize(
    ("text", "has_context", "question"),
    [
        ("A is 1. B is 2.\n\nWhat is A?", True, "\n\nWhat is A?"),
        ("A is 1. B is 2. What is A?", True, " What is A?"),
        ("A is 1.\n\nB is 2.\nQuestion: What is A?", True, "\nQuestion: What is A?"),
        ("Tell me A. Value only, please.", False, "Tell me A. Value only, please."),
    ],
)
def test_a_question_is_told_from_its_context(text: str, has_context: bool, question: str) -> None:
    assert text[question_start(text, has_context) :] == question


def test_half_of_the_lines_is_half_of_the_answer() -> None:
    assert Sample([], 0, "a: 1\nb: 2").score("b: 2, I think") == 0.5


def test_every_setting_is_a_request_that_the_engine_knows() -> None:
    whole, first = Sample([0] * 200, 200), Sample([0] * 200, 100)
    assert Setting("full").choice(whole) is None
    assert Setting("kivi4").choice(whole) == {"name": "kivi", "bits": 4}
    assert Setting("razor_attention", 0.25).choice(whole) == {
        "name": "razor_attention",
        "min_recent": 46,
        "divisor": 1000.0,
    }
    assert Setting("snapkv", 0.25).choice(first) == {
        "name": "first_turn",
        "num_tokens": 100,
        "base": {"name": "snapkv", "ratio": 0.25},
    }
    assert [one.label for one in settings((0.5,), ("tova",))] == ["full", "random", "tova"]


def test_a_quick_run_writes_table_json_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quick", "--ratios", "0.25", "--policies", "snapkv", "gemfilter", "kivi4"]
    flags += ["--tasks", "needle", "conversation", "perplexity", "--out", str(tmp_path)]
    assert main(flags) == 0
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    lines = table.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| `full`", "| `random`", "| `snapkv`", "| `gemfilter`", "| `kivi4`",
    ]  # fmt: skip
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    rows = {row["policy"]: row for row in json.loads((tmp_path / "frontier.json").read_text())["rows"]}
    full, snapkv = rows["full"], rows["snapkv"]
    assert full["quality"]["needle/aware"]["kept"] == 1.0
    assert snapkv["quality"]["needle/agnostic"]["kept"] < 1
    assert snapkv["cost"]["steady_blocks"] < full["cost"]["steady_blocks"]
    assert snapkv["cost"]["peak_blocks"] <= full["cost"]["peak_blocks"]
    assert "needle/agnostic" not in rows["gemfilter"]["quality"]
    assert rows["kivi4"]["quality"]["perplexity/agnostic"]["quality"] > 1
    for task in ("needle", "conversation", "perplexity"):
        picture = ElementTree.fromstring((tmp_path / f"{task}.svg").read_text())
        texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
        assert {"full", "random", "snapkv"} <= set(texts)


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--ratios", "2"], ["--samples", "0"], ["--policies", "nonsense"], ["--tasks", "nonsense"]):
        with pytest.raises(SystemExit):
            main([*flags, "--out", str(tmp_path)])
    assert cli.main(["frontier", "--model", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err
