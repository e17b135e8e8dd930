"""Embeddings, pooling, classify, score and rerank over HTTP: with a scripted engine, and with tiny real models."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import openai
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from engine.errors import EngineError, QueueFull, UnsupportedParameter
from engine.submission import require_generation
from engine.types import PooledOutput, PoolingInfo, PoolingRequest
from server.app import make_context
from server.pooling import embeddings, scoring
from server.pooling.schemas import ClassifyRequest, PoolingBody, RerankRequest, ScoreRequest
from tests.fakes_engine import FakeEngine
from tests.pooling_models import LocalEngine, build, raw_tokenizer, sentence, sentence_transformers
from tests.server.support import App, app, error_of, eventually, make_config

EMBEDDER = PoolingInfo(
    tasks=["embed", "token_embed"], method="mean", normalize=True, embedding_size=4, matryoshka_dimensions=[2]
)
CROSS_ENCODER = PoolingInfo(
    tasks=["classify"], method="last", normalize=True, embedding_size=4, labels=["fits"], activation="sigmoid"
)
THREE_CLASSES = PoolingInfo(tasks=["classify"], method="last", normalize=True, embedding_size=4, labels=["a", "b", "c"])
EMBEDDINGS = "/v1/embeddings"
TOLERANCE = 1e-4


@contextlib.asynccontextmanager
async def embedder(pooling: PoolingInfo | None = EMBEDDER, **limits: Any) -> AsyncIterator[App]:
    async with app(FakeEngine(pooling=pooling), make_config(limits=limits)) as it:
        yield it


async def vectors(it: App, path: str = EMBEDDINGS, **fields: Any) -> list[Any]:
    response = await it.post(path, fields)
    assert response.status_code == 200, response.text
    return [item.get("embedding", item.get("data")) for item in response.json()["data"]]


async def test_the_four_shapes_of_input_give_one_embedding_each_in_order() -> None:
    async with embedder() as it:
        ids = [256, *b"ab"]
        for given, count in (("ab", 1), (["ab"], 1), (ids, 1), ([ids], 1), (["ab", "c"], 2), ([ids, [5]], 2)):
            response = await it.post(EMBEDDINGS, {"input": given})
            body = response.json()
            assert [item["index"] for item in body["data"]] == list(range(count))
            assert body["data"][0]["embedding"] == (await vectors(it, input="ab"))[0]
        assert body["object"] == "list"
        assert body["id"].startswith("embd-")
        assert body["model"] == "fake"
        assert {item["object"] for item in body["data"]} == {"embedding"}


async def test_usage_counts_the_tokens_of_all_inputs() -> None:
    async with embedder() as it:
        usage = (await it.post(EMBEDDINGS, {"input": ["ab", "cde"]})).json()["usage"]
    assert usage == {"prompt_tokens": 7, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0}}


async def test_base64_holds_the_same_numbers_as_float() -> None:
    async with embedder() as it:
        floats = await vectors(it, input=["ab", "caf\u00e9"])
        packed = await vectors(it, input=["ab", "caf\u00e9"], encoding_format="base64")
    assert [np.frombuffer(base64.b64decode(data), "<f4").tolist() for data in packed] == floats


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": 5}, "input"),
        ({"input": [True]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [[5], [258]]}, "input.1"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "truncation_side": "middle"}, "truncation_side"),
        ({"input": "a", "embed_dtype": "float16"}, "embed_dtype"),
        ({"input": "a", "endianness": "big"}, "endianness"),
        ({"input": "a", "normalize": True, "use_activation": False}, "normalize"),
        ({"input": "a", "messages": [{"role": "user", "content": "b"}]}, "messages"),
        ({"input": "x" * 256}, "input"),
        ({"input": ["a", "x" * 256]}, "input.1"),
    ],
)
async def test_bad_embedding_requests_name_the_field(fields: dict[str, Any], param: str) -> None:
    async with embedder() as it:
        response = await it.post(EMBEDDINGS, fields)
        assert response.status_code == 400, response.text
        assert error_of(response)["param"] == param


async def test_the_number_of_inputs_is_bounded() -> None:
    async with embedder() as it:
        assert (await it.post(EMBEDDINGS, {"input": ["a"] * 2048})).status_code == 200
        response = await it.post(EMBEDDINGS, {"input": ["a"] * 2049})
        assert (response.status_code, error_of(response)["param"]) == (400, "input")
        assert len(it.engine.pooled) == 2048


async def test_over_long_input_is_refused_unless_it_may_be_cut() -> None:
    async with embedder() as it:
        assert error_of(await it.post(EMBEDDINGS, {"input": "x" * 256}))["code"] == "context_length_exceeded"
        cut = await it.post(EMBEDDINGS, {"input": "x" * 256, "truncate_prompt_tokens": -1})
        assert cut.json()["usage"]["prompt_tokens"] == 256


async def test_dimensions_cut_only_what_was_trained_for_it() -> None:
    async with embedder() as it:
        (whole,) = await vectors(it, input="Az", normalize=False)
        (cut,) = await vectors(it, input="Az", dimensions=2)
        assert cut == pytest.approx(functional.normalize(torch.tensor(whole[:2]), dim=0).tolist())
        assert len((await vectors(it, input="Az", dimensions=4))[0]) == 4
    fixed = PoolingInfo(tasks=["embed"], method="mean", normalize=True, embedding_size=4)
    async with embedder(fixed) as it:
        error = error_of(await it.post(EMBEDDINGS, {"input": "a", "dimensions": 2}))
        assert (error["param"], error["code"]) == ("dimensions", "unsupported_parameter")
        assert "--matryoshka" in error["message"]


@pytest.mark.parametrize("path", [EMBEDDINGS, "/pooling", "/classify", "/v1/classify", "/score", "/rerank"])
async def test_a_generative_model_says_which_flag_makes_it_embed(path: str) -> None:
    async with embedder(None) as it:
        body = {"input": "a", "queries": "a", "query": "a"}
        if path in ("/score", "/rerank"):
            body["documents"] = "b"
        response = await it.post(path, body)
        assert response.status_code == 400
        assert error_of(response)["code"] == "unsupported_parameter"
        assert "--pooling" in error_of(response)["message"]


async def test_pooling_serves_each_task_and_refuses_others() -> None:
    async with embedder() as it:
        body = (await it.post("/pooling", {"input": ["ab", "c"]})).json()
        assert [item["object"] for item in body["data"]] == ["pooling", "pooling"]
        assert body["data"][0]["data"] == (await vectors(it, input="ab"))[0]
        packed = (await it.post("/pooling", {"input": "ab", "encoding_format": "base64"})).json()["data"][0]
        assert packed["shape"] == [4]
        assert error_of(await it.post("/pooling", {"input": "a", "task": "classify"}))["param"] == "model"
        assert error_of(await it.post("/pooling", {"input": "a", "task": "plugin"}))["param"] == "task"
    async with embedder(THREE_CLASSES) as it:
        assert await vectors(it, "/pooling", input="ab") == [[3.0]], "a classifier's own task is the default"


async def test_messages_are_embedded_through_the_chat_template() -> None:
    async with embedder() as it:
        response = await it.post(EMBEDDINGS, {"messages": [{"role": "user", "content": "hi"}]})
        assert response.status_code == 200
        assert len(response.json()["data"]) == 1


async def test_rerank_sorts_by_score_and_keeps_the_order_of_equals() -> None:
    async with embedder(CROSS_ENCODER) as it:
        documents = ["aa", {"text": "aaaa"}, "bb", "a"]
        for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
            body = (await it.post(path, {"query": "q", "documents": documents})).json()
            assert [result["index"] for result in body["results"]] == [1, 0, 2, 3]
            scores = [result["relevance_score"] for result in body["results"]]
            assert scores == sorted(scores, reverse=True)
        assert body["results"][0]["document"] == {"text": "aaaa"}
        assert body["usage"]["total_tokens"] == 5 + 7 + 5 + 4
        top = (
            await it.post("/rerank", {"query": "q", "texts": ["a", "bbb"], "top_n": 1, "return_documents": False})
        ).json()
        assert top["results"] == [{"index": 1, "relevance_score": 6.0}]
        everything = (await it.post("/rerank", {"query": "q", "documents": ["a", "b"], "top_n": 0})).json()
        assert len(everything["results"]) == 2


async def test_scores_are_one_to_many_or_pair_by_pair_under_every_name() -> None:
    async with embedder(CROSS_ENCODER) as it:
        for first in ("queries", "text_1", "data_1"):
            for second in ("documents", "text_2", "data_2", "items"):
                one = (await it.post("/score", {first: "q", second: ["a", "bb"]})).json()
                assert [item["score"] for item in one["data"]] == [4.0, 5.0]
        pairs = (await it.post("/v1/score", {"queries": ["q", "qqq"], "documents": ["a", "bb"]})).json()
        assert [(item["index"], item["object"], item["score"]) for item in pairs["data"]] == [
            (0, "score", 4.0),
            (1, "score", 7.0),
        ]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/score", {"queries": "a"}, "documents"),
        ("/score", {"documents": "a"}, "queries"),
        ("/score", {"queries": "a", "text_1": "b", "documents": "c"}, "queries"),
        ("/score", {"queries": ["a", "b"], "documents": ["c"]}, "queries"),
        ("/score", {"queries": ["a", "b"], "documents": ["c", "d", "e"]}, "queries"),
        ("/score", {"queries": "", "documents": "c"}, "queries"),
        ("/score", {"queries": "a", "documents": [1]}, "documents"),
        ("/rerank", {"documents": ["a"]}, "query"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": ["a"], "documents": ["a"]}, "query"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "texts": ["b"]}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "max_tokens_per_doc": 0}, "max_tokens_per_doc"),
        ("/rerank", {"query": "a", "documents": ["b", "x" * 300]}, "documents.1"),
        ("/classify", {"input": ""}, "input"),
    ],
)
async def test_bad_score_requests_name_the_field(path: str, fields: dict[str, Any], param: str) -> None:
    async with embedder(CROSS_ENCODER) as it:
        response = await it.post(path, fields)
        assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_several_classes_are_no_score() -> None:
    async with embedder(THREE_CLASSES) as it:
        response = await it.post("/score", {"queries": "a", "documents": "b"})
        assert response.status_code == 400
        assert "3 classes" in error_of(response)["message"]


async def test_one_failing_input_ends_the_whole_request() -> None:
    async with embedder() as it:
        it.engine.error, it.engine.error_after = EngineError("no"), 3
        assert (await it.post(EMBEDDINGS, {"input": ["a"] * 20})).status_code == 500
        assert it.engine.num_active == 0
        assert it.context.gate.num_in_flight == 0


async def test_a_client_that_leaves_ends_its_embeddings() -> None:
    async with embedder() as it:
        it.engine.hold = asyncio.Event()
        task = asyncio.create_task(it.post(EMBEDDINGS, {"input": ["a"] * 5}))
        await eventually(lambda: it.engine.num_active > 0)
        task.cancel()
        await eventually(lambda: it.engine.num_active == 0)
        assert it.context.gate.num_in_flight == 0


async def test_a_queue_that_others_fill_is_waited_for_once_work_has_begun() -> None:
    class Busy(FakeEngine):
        async def pool(self, request: PoolingRequest) -> PooledOutput:
            if len(self.pooled) in (3, 4, 5):
                self.pooled.append(request)
                raise QueueFull("full")
            return await super().pool(request)

    async with app(Busy(pooling=EMBEDDER)) as it:
        assert len(await vectors(it, input=["a"] * 10)) == 10

    class Full(FakeEngine):
        async def pool(self, request: PoolingRequest) -> PooledOutput:
            raise QueueFull("full", retry_after_s=7)

    async with app(Full(pooling=EMBEDDER)) as it:
        response = await it.post(EMBEDDINGS, {"input": "a"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "7")


async def test_pooled_requests_are_counted() -> None:
    async with embedder() as it:
        await vectors(it, input=["ab", "c"])
        await it.post(EMBEDDINGS, {"input": "x" * 256})
        lines = (await it.metrics()).splitlines()
    finished = [line for line in lines if line.startswith("kvasir_requests_total") and 'finish_reason="stop"' in line]
    tokens = [line for line in lines if line.startswith("kvasir_request_prompt_tokens_sum")]
    assert (len(finished), finished[0].rpartition(" ")[2]) == (1, "2.0")
    assert tokens[0].rpartition(" ")[2] == "5.0"


async def test_the_prompts_of_a_model_go_before_texts() -> None:
    prompted = msgspec.structs.replace(
        EMBEDDER, prompts={"query": "Q: ", "passage": "P: ", "other": "O: "}, default_prompt="other"
    )
    async with embedder(prompted) as it:
        for name, text in ((None, "O: hi"), ("query", "Q: hi"), ("", "hi")):
            await vectors(it, input="hi", prompt_name=name)
            assert it.engine.pooled.pop().prompt == text
        assert error_of(await it.post(EMBEDDINGS, {"input": "hi", "prompt_name": "no"}))["param"] == "prompt_name"
        await it.post("/rerank", {"query": "a", "documents": ["b"]})
        assert [request.prompt for request in it.engine.pooled] == ["Q: a", "P: b"]


def test_every_route_and_field_is_documented() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text("utf-8")
    context = make_context(FakeEngine(), make_config())
    paths = {route.path for module in (embeddings, scoring) for route in module.routes(context).routes}  # type: ignore[attr-defined]
    assert {path for path in paths if f"{path}`" not in page} == set()
    section = page.split("## Embeddings, scores and classes")[1].split("\n## ")[0]
    words = set(re.findall(r"`([a-z_0-9]+)`", section))
    fields = {
        name for kind in (PoolingBody, ClassifyRequest, ScoreRequest, RerankRequest) for name in kind.model_fields
    }
    assert fields <= words, fields - words


# ---- tiny real models behind the same routes


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("bert")
    model = build("BertModel", folder)
    sentence_transformers(folder, "mean_tokens")
    return folder, model


@torch.no_grad()
def mean_embedding(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    return functional.normalize(model(torch.tensor([ids])).last_hidden_state[0].mean(0), dim=0)


async def test_embeddings_and_scores_of_a_real_encoder(bert: tuple[Path, PreTrainedModel]) -> None:
    folder, model = bert
    texts = [sentence(seed, length) for seed, length in ((1, 3), (2, 17), (3, 40))]
    expected = torch.stack([mean_embedding(model, raw_tokenizer().encode(text).ids) for text in texts])
    async with app(LocalEngine(folder)) as it:
        got = torch.tensor(await vectors(it, input=texts))
        assert (got - expected).abs().max() < TOLERANCE
        usage = (await it.post(EMBEDDINGS, {"input": texts})).json()["usage"]
        assert usage["prompt_tokens"] == 3 + 17 + 40 + 3 * 2
        cosine = (expected[0] * expected[1:]).sum(1)
        scored = (await it.post("/score", {"queries": texts[0], "documents": texts[1:]})).json()
        assert [item["score"] for item in scored["data"]] == pytest.approx(cosine.tolist(), abs=TOLERANCE)
        ranked = (await it.post("/rerank", {"query": texts[0], "documents": texts[1:]})).json()["results"]
        assert [result["index"] for result in ranked] == cosine.argsort(descending=True).tolist()


async def test_an_encoder_is_probed_by_an_embedding_and_refuses_to_generate(bert: tuple[Path, PreTrainedModel]) -> None:
    async with app(LocalEngine(bert[0])) as it:
        assert (await it.http.get("/health_generate")).status_code == 200
        info = it.engine.info
    assert info is not None
    with pytest.raises(UnsupportedParameter, match="generates no text; it serves embeddings"):
        require_generation(info)


async def test_cutting_keeps_the_special_tokens(bert: tuple[Path, PreTrainedModel]) -> None:
    folder, model = bert
    words = sentence(4, 90)
    ids = raw_tokenizer().encode(words, add_special_tokens=False).ids
    async with app(LocalEngine(folder)) as it:
        assert error_of(await it.post(EMBEDDINGS, {"input": words}))["code"] == "context_length_exceeded"
        for side, kept in (("right", ids[:8]), ("left", ids[-8:])):
            (got,) = await vectors(it, input=words, truncate_prompt_tokens=10, truncation_side=side)
            assert (torch.tensor(got) - mean_embedding(model, [2, *kept, 3])).abs().max() < TOLERANCE
        (whole,) = await vectors(it, input=words, truncate_prompt_tokens=-1)
        assert (torch.tensor(whole) - mean_embedding(model, [2, *ids[:62], 3])).abs().max() < TOLERANCE


async def test_a_real_cross_encoder_scores_pairs_and_cuts_documents(tmp_path: Path) -> None:
    model = build("BertForSequenceClassification", tmp_path, num_labels=1)
    query, documents = sentence(1, 5), [sentence(seed, 20 * seed) for seed in (1, 2, 3)]

    @torch.no_grad()
    def score(first: list[int], second: list[int]) -> float:
        ids = [2, *first, 3, *second, 3]
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        return float(model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits.sigmoid())

    first, *seconds = [raw_tokenizer().encode(text, add_special_tokens=False).ids for text in (query, *documents)]
    async with app(LocalEngine(tmp_path)) as it:
        body = (await it.post("/score", {"queries": query, "documents": documents[:2]})).json()
        expected = [score(first, second) for second in seconds[:2]]
        assert [item["score"] for item in body["data"]] == pytest.approx(expected, abs=TOLERANCE)
        response = await it.post("/rerank", {"query": query, "documents": documents})
        assert error_of(response)["param"] == "documents.2"
        body = (await it.post("/rerank", {"query": query, "documents": documents, "max_tokens_per_doc": 7})).json()
        scores = {result["index"]: result["relevance_score"] for result in body["results"]}
        assert scores == pytest.approx({i: score(first, seconds[i][:7]) for i in range(3)}, abs=TOLERANCE)
        body = (
            await it.post("/score", {"queries": query, "documents": documents[2], "truncate_prompt_tokens": -1})
        ).json()
        assert body["data"][0]["score"] == pytest.approx(score(first, seconds[2][: 64 - 8]), abs=TOLERANCE)


async def test_a_real_classifier_names_its_best_label(tmp_path: Path) -> None:
    model = build("LlamaForSequenceClassification", tmp_path, id2label={0: "low", 1: "mid", 2: "high"}, num_labels=3)
    text = sentence(1, 9)
    with torch.no_grad():
        ids = raw_tokenizer(is_encoder=False).encode(text).ids
        expected = model(torch.tensor([ids])).logits[0].softmax(0)
    async with app(LocalEngine(tmp_path)) as it:
        for path in ("/classify", "/v1/classify"):
            (item,) = (await it.post(path, {"input": text})).json()["data"]
            assert item["probs"] == pytest.approx(expected.tolist(), abs=TOLERANCE)
            assert item["label"] == ["low", "mid", "high"][int(expected.argmax())]
            assert (item["index"], item["num_classes"]) == (0, 3)
        raw = (await it.post("/pooling", {"input": text, "use_activation": False})).json()["data"][0]["data"]
        assert torch.tensor(raw).softmax(0).tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)


async def test_the_openai_client_decodes_our_embeddings(bert: tuple[Path, PreTrainedModel]) -> None:
    folder, model = bert
    texts = [sentence(1, 3), sentence(2, 9)]
    async with app(LocalEngine(folder)) as it:
        transport = httpx.ASGITransport(app=it.asgi)
        async with openai.AsyncOpenAI(
            api_key="none", base_url="http://test/v1", http_client=httpx.AsyncClient(transport=transport), max_retries=0
        ) as client:
            answer = await client.embeddings.create(model="fake", input=texts)
            for item, text in zip(answer.data, texts, strict=True):
                expected = mean_embedding(model, raw_tokenizer().encode(text).ids)
                assert (torch.tensor(item.embedding) - expected).abs().max() < TOLERANCE
            assert answer.usage.total_tokens == 3 + 9 + 4
            floats = await client.embeddings.create(model="fake", input=texts, encoding_format="float")
            assert [item.embedding for item in floats.data] == [item.embedding for item in answer.data]
            with pytest.raises(openai.BadRequestError, match="dimensions"):
                await client.embeddings.create(model="fake", input=texts, dimensions=3)
