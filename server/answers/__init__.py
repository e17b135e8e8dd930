"""The form of every route's answer, for the OpenAPI document. The routes themselves answer with plain objects.

A test holds real answers against these types, closed: a member that is not told here fails it. UNSET: the member is
left out where it says nothing; null is told by the type.
"""

from __future__ import annotations

from msgspec import Struct

from server.answers import agents, generation, pooling, resources


def _posts(answer: type[Struct], *paths: str) -> dict[tuple[str, str], type[Struct]]:
    return {(path, "post"): answer for path in paths}


# (path, method) -> what a 200 holds; a route that is not here answers with an object of its own, with text or bytes
ANSWERS: dict[tuple[str, str], type[Struct]] = {
    **_posts(generation.ChatCompletion, "/v1/chat/completions"),
    **_posts(generation.Completion, "/v1/completions"),
    **_posts(agents.ResponseObject, "/v1/responses", "/v1/responses/{response_id}/cancel"),
    **_posts(agents.ResponseInputTokens, "/v1/responses/input_tokens"),
    ("/v1/responses/{response_id}", "get"): agents.ResponseObject,
    ("/v1/responses/{response_id}", "delete"): agents.DeletedResponse,
    ("/v1/responses/{response_id}/input_items", "get"): agents.ResponseInputItems,
    **_posts(agents.Message, "/v1/messages"),
    **_posts(agents.MessageTokens, "/v1/messages/count_tokens"),
    **_posts(pooling.Embeddings, "/v1/embeddings"),
    **_posts(pooling.Pooling, "/pooling"),
    **_posts(pooling.Classes, "/classify", "/v1/classify"),
    **_posts(pooling.Scores, "/score", "/v1/score"),
    **_posts(pooling.Ranking, "/rerank", "/v1/rerank", "/v2/rerank"),
    ("/v1/models", "get"): resources.Models,
    ("/v1/models/{model_id}", "get"): resources.Model,
    **_posts(resources.File, "/v1/files"),
    ("/v1/files", "get"): resources.Files,
    ("/v1/files/{file_id}", "get"): resources.File,
    ("/v1/files/{file_id}", "delete"): resources.DeletedFile,
    **_posts(resources.Batch, "/v1/batches", "/v1/batches/{batch_id}/cancel"),
    ("/v1/batches", "get"): resources.Batches,
    ("/v1/batches/{batch_id}", "get"): resources.Batch,
    **_posts(resources.Tokens, "/tokenize"),
    **_posts(resources.Detokenized, "/detokenize"),
    **_posts(resources.Drained, "/admin/drain"),
    ("/admin/drain", "delete"): resources.Drained,
    **_posts(resources.AbortedRequests, "/abort_requests"),
    **_posts(resources.LogLevel, "/admin/log_level"),
    **_posts(resources.Sleeping, "/sleep", "/wake_up"),
    ("/is_sleeping", "get"): resources.Sleeping,
    **{(path, "get"): resources.Status for path in ("/livez", "/readyz", "/health", "/health_generate")},
    ("/version", "get"): resources.Version,
    ("/load", "get"): resources.Load,
}
