"""Embeddings through the real server process: beside generation on one decoder, and from an encoder alone."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from loadtest.own_server import own_server
from tests.conftest import SERVE_FLAGS
from tests.pooling_models import build, raw_tokenizer, sentence, sentence_transformers

TEXTS = ["The capital of France", "def add(a, b):", "x"]


@pytest.fixture(scope="module")
def embedding_mimir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("mimir") / "server.log"
    with (
        own_server((*SERVE_FLAGS, "--pooling", "mean", "--deterministic"), log=log) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
    assert "Traceback" not in log.read_text()


def embed(client: openai.OpenAI, texts: list[str]) -> list[list[float]]:
    return [item.embedding for item in client.embeddings.create(model="mimir", input=texts).data]


def test_one_process_generates_and_embeds_in_the_same_batches(embedding_mimir: openai.OpenAI) -> None:
    client = embedding_mimir

    def complete(i: int) -> str:
        answer = client.completions.create(
            model="mimir", prompt=f"Number {i} is", max_tokens=24, seed=i, temperature=0.7
        )
        return answer.choices[0].text

    texts, vectors = [complete(i) for i in range(4)], embed(client, TEXTS)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(complete, i) for i in range(4)]
        embeddings = [pool.submit(embed, client, TEXTS) for _ in range(6)]
        assert [answer.result() for answer in answers] == texts
        assert all(found.result() == vectors for found in embeddings)


def test_a_generative_model_without_the_flag_refuses_embeddings(server_url: str) -> None:
    response = httpx.post(f"{server_url}/v1/embeddings", json={"input": "a"}, timeout=30)
    assert response.status_code == 400
    assert "--pooling" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("bert")
    model = build("BertModel", folder)
    sentence_transformers(folder, "cls_token")
    return folder, model


@torch.no_grad()
def expected(model: PreTrainedModel, text: str) -> torch.Tensor:
    ids = raw_tokenizer().encode(text).ids
    return functional.normalize(model(torch.tensor([ids])).last_hidden_state[0, 0], dim=0)


@pytest.mark.slow
def test_an_encoder_serves_embeddings_and_tells_what_it_cannot_do(
    bert: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, model = bert
    # the third step kills the engine: the request that it served runs again in the next process
    flags = ("--model", str(folder), "--served-model-name", "tiny", "--threads", "1", "--faults", "engine_kill:3:1")
    with (
        own_server(flags, log=tmp_path / "server.log") as url,
        httpx.Client(base_url=url, timeout=300) as http,
    ):
        for seed in range(3):
            text = sentence(seed, 5 + seed)
            body = http.post("/v1/embeddings", json={"input": text}).json()
            assert (torch.tensor(body["data"][0]["embedding"]) - expected(model, text)).abs().max() < 1e-4
        restarts = [line for line in http.get("/metrics").text.splitlines() if "engine_restarts_total{" in line]
        assert [line.rpartition(" ")[2] for line in restarts] == ["1.0"]
        for path, fields in (
            ("/v1/completions", {"prompt": "w1"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "w1"}]}),
        ):
            response = http.post(path, json=fields)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "model"), response.text
            assert "generates no text" in response.json()["error"]["message"]
        assert http.get("/health_generate").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 64
    log = (tmp_path / "server.log").read_text()
    assert "Traceback" not in log
    assert "embeddings of 32 numbers, of length one, by cls (sentence-transformers; no generation)" in log
