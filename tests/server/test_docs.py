"""docs/api.md names what exists, and the start-up report says what fits."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.routing import APIRoute

from server import chat, completions, health, models, tokenize
from server.app import make_context
from server.batches import routes as batches
from server.files import routes as files
from server.messages import routes as messages
from server.messages.schema import MessagesRequest
from server.report import startup_report
from server.responses import routes as responses
from server.responses.schema import ResponsesRequest
from server.schemas import ChatRequest, CompletionRequest
from server.validation import UNSUPPORTED
from tests.fakes_engine import FakeEngine
from tests.server.support import make_config

SECTIONS = re.compile(r"^## (?:Responses|Messages)$", re.MULTILINE)
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text("utf-8")


def test_every_route_is_documented() -> None:
    context = make_context(FakeEngine(), make_config())
    modules = (batches, chat, completions, files, health, messages, models, responses, tokenize)
    routers = [module.routes(context) for module in modules]
    for router in [*routers, health.metrics_routes(context)]:
        for route in router.routes:
            assert isinstance(route, APIRoute)
            path = re.sub(r"{(model|response|file|batch)_id(:path)?}", "{id}", route.path)
            assert f"{path}`" in PAGE, path


def test_every_field_is_documented_as_taken_or_refused() -> None:
    words = set(re.findall(r"`([a-z_]+)[`*]", PAGE))
    taken = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert taken <= words, taken - words
    prefixes = tuple(word for word in words if word.endswith("_"))
    undocumented = {name for name in UNSUPPORTED if name not in words and not name.startswith(prefixes)}
    assert undocumented <= {"guided_decoding", "logit_processors", "mm_processor_kwargs", "regex_schema"}


def test_every_field_of_the_other_apis_is_documented() -> None:
    _, responses_page, messages_page = (section.split("\n## ")[0] for section in SECTIONS.split(PAGE))
    for request, page in ((ResponsesRequest, responses_page), (MessagesRequest, messages_page)):
        words = set(re.findall(r"`([a-z_]+)[`*]", page))
        taken = set(request.model_fields) - {"model", "stream"}
        assert taken <= words, taken - words


def test_the_startup_report_says_what_fits() -> None:
    info = FakeEngine(generation_defaults={"temperature": 0.6}).info
    assert info is not None
    text = startup_report(info, "fake", "http://127.0.0.1:8000", max_num_seqs=8)
    assert "1008 tokens in blocks of 16" in text, "block 0 holds nothing"
    assert "3 of 256 tokens, 15 of 64 tokens, 63 of 16 tokens; at most 8 run in one step" in text
    assert "temperature=0.6" in text
    assert "http://127.0.0.1:8000/v1" in text
