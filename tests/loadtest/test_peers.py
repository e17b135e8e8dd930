"""Peers are started as they must be, waited for, measured over all their processes, and gone afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from loadtest.peers import PEERS, PeerError, PeerServer, Settings, gguf, llama_cpp
from loadtest.peers.process_tree import members, peak_rss_bytes, stop_tree
from loadtest.peers.server import loopback, running

FAKE = Path(__file__).with_name("fake_peer.py")
MIB = 1 << 20


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(scratch=tmp_path / "scratch", threads=1, slots=4, context=256, ready_timeout_s=30.0)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every peer's command is the fake one."""
    monkeypatch.setattr(llama_cpp, "convert", lambda folder, out, weights: out)
    for name in ("vllm", "transformers", "llama-server"):
        command = tmp_path / "env" / "bin" / name
        command.parent.mkdir(parents=True, exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {FAKE} "$@"\n')
        command.chmod(0o755)
    return tmp_path / "env"


def fake(settings: Settings) -> Any:
    port, flags = loopback()
    return running("fake", [sys.executable, str(FAKE), *flags], settings, port=port, model="fake")


@pytest.mark.parametrize("name", PEERS)
def test_each_peer_serves_the_checkpoint_with_the_settings_of_all(
    name: str, environment: Path, settings: Settings, tmp_path: Path
) -> None:
    with PEERS[name](environment, tmp_path / "model", replace(settings, flags=("--further",))) as server:
        told = httpx.get(f"{server.url}/health").json()
        assert server.start_s > 0
    flags = " ".join(told["flags"])
    assert str(tmp_path / ("scratch" if name.startswith("llama_cpp") else "model")) in flags
    assert flags.endswith("--further")
    expected = {
        "llama_cpp": "-t 1 -tb 1 -np 4 -c 1024",
        "vllm": "--max-num-seqs 4 --max-model-len 256",
        "transformers": "--continuous-batching --device cpu",
    }
    assert expected[name.removesuffix("_bf16").removesuffix("_q8_0")] in flags
    if name == "vllm":
        assert len(told["env"]["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == settings.threads


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_peer_tells_how_to_get_it(name: str, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"no executable among .*(pip install|cmake)"):
        PEERS[name](tmp_path, tmp_path, settings).__enter__()


def test_the_text_only_peer_is_asked_in_its_own_way(environment: Path, settings: Settings, tmp_path: Path) -> None:
    with PEERS["transformers"](environment, tmp_path, settings) as server:
        assert not server.takes_token_ids
        assert not server.target.ignore_eos
        assert dict(server.target.extra) == {"generation_config": "{}"}


def test_a_peer_that_dies_shows_its_last_words(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_PEER", "dies")
    with pytest.raises(PeerError, match=r"exit code 1 before it was ready(.|\n)*the weights are not there"):
        fake(settings).__enter__()


def test_waiting_for_a_peer_is_bounded_and_leaves_nothing_behind(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PEER", "never")
    with pytest.raises(PeerError, match="not ready within 1 s"):
        fake(replace(settings, ready_timeout_s=1.0)).__enter__()
    assert not [process for process in psutil.Process().children() if str(FAKE) in " ".join(process.cmdline())]


def test_memory_is_the_highest_of_the_whole_tree(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(child_mib: int) -> int:
        monkeypatch.setenv("FAKE_CHILD_MIB", str(child_mib))
        with fake(settings) as server:
            assert server.peak_rss_bytes() >= psutil.Process(server.pid).memory_info().rss
            return server.peak_rss_bytes()

    # the child has given its memory back when it is measured: a snapshot would not see it
    assert peak(101) - peak(1) > 90 * MIB


def test_children_end_with_the_peer(settings: Settings) -> None:
    with fake(settings) as server:
        child = int(httpx.get(f"{server.url}/health").json()["child"])
        assert [member.pid for member in members(server.pid)] == [server.pid, child]
    assert members(server.pid) == []
    assert members(child) == []
    assert peak_rss_bytes(server.pid) == 0


def test_a_peer_that_ignores_the_polite_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.own_server.STOP_TIMEOUT_S", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        stop_tree(process)
    assert process.returncode == -9


def test_cpu_time_of_a_peer_is_that_of_its_first_process(settings: Settings) -> None:
    with fake(settings) as server:
        before = server.cpu_s()
        deadline = time.monotonic() + 20
        while server.cpu_s() == before and time.monotonic() < deadline:
            httpx.get(f"{server.url}/health")
        assert server.cpu_s() > before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: folder, "unknown GGUF type"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "model_type 'gpt2'"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    pytest.importorskip("gguf")
    change(tmp_path)
    weights = "f32" if (tmp_path / "config.json").exists() else "f8"
    with pytest.raises(ValueError, match=message):
        gguf.convert(tmp_path, tmp_path / "out.gguf", weights)


def test_without_the_gguf_package_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        gguf.convert(tmp_path, tmp_path / "out.gguf")


def test_an_interrupted_conversion_is_not_taken_for_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.partial").write_bytes(b"half")
    assert not (tmp_path / "model.gguf").exists()
    (tmp_path / "model.gguf").write_bytes(b"whole")
    assert gguf.convert(tmp_path, tmp_path / "model.gguf").read_bytes() == b"whole"


def test_a_running_peer_is_a_target(settings: Settings) -> None:
    server = PeerServer(name="x", url="http://127.0.0.1:1", model="m", pid=1, start_s=0.0)
    assert (server.target.url, server.target.model, server.target.ignore_eos) == (server.url, "m", True)
