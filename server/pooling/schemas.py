"""Bodies of the routes that pool: embeddings, pooling, classify, score and rerank."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationInfo

from engine.errors import InvalidParameter
from server.fields import (
    INT32_MAX,
    Body,
    Flag,
    Integer,
    Label,
    Number,
    ShortText,
    Text,
    between,
    limit_of,
    one_of,
    token_ids,
    wrong_type,
    wrong_value,
)
from server.schemas import ChatFields

Input = str | list[int]


def _inputs(value: Any, info: ValidationInfo) -> tuple[Input, ...]:
    """The four shapes of `input` as a tuple of texts or of token id lists."""
    shapes = "a string, an array of strings, an array of token ids or an array of such arrays"
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list):
        raise wrong_type(shapes)
    kinds = {bool if isinstance(item, bool) else type(item) for item in items}
    if kinds and kinds <= {int, float}:
        return (token_ids(items),)
    _check_count(items, info)
    if kinds == {str}:
        inputs: tuple[Input, ...] = tuple(items)
    elif kinds == {list}:
        inputs = tuple(token_ids(item) for item in items)
    else:
        raise wrong_type(shapes)
    if not all(inputs):
        raise wrong_value("must not hold an empty text")
    return inputs


def _texts(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    """One text or several, each a string or an object with `text`."""
    items = value if isinstance(value, list) else [value]
    _check_count(items, info)
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    found = tuple(text for text in texts if isinstance(text, str))
    if len(found) != len(texts):
        raise wrong_type("a string, an object with text, or an array of these")
    if not all(found):
        raise wrong_value("must not hold an empty text")
    return found


def _text(value: Any, info: ValidationInfo) -> str:
    if isinstance(value, list):
        raise wrong_type("a string")
    return _texts(value, info)[0]


def _check_count(items: list[Any], info: ValidationInfo) -> None:
    limit = limit_of(info, "max_pooling_inputs")
    if not 1 <= len(items) <= limit:
        raise wrong_value(f"must have 1 to {limit} entries")


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Encoding = Annotated[Literal["float", "base64"], one_of("float", "base64")]


class PoolingFields(Body):
    """What all these routes have in common."""

    model: Text | None = None
    add_special_tokens: Flag = True
    truncate_prompt_tokens: Annotated[Integer, between(-1, INT32_MAX)] | None = None
    truncation_side: Annotated[Literal["left", "right"], one_of("left", "right")] = "right"
    use_activation: Flag | None = None
    priority: Annotated[Integer, between(-INT32_MAX, INT32_MAX)] = 0
    cache_salt: Label | None = None
    timeout: Annotated[Number, between(0, 86400, above=True)] | None = None
    user: ShortText | None = None  # accepted, has no meaning here

    def check(self) -> None:
        """Raises InvalidParameter."""
        if self.truncate_prompt_tokens == 0:
            raise InvalidParameter("truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens")


class InputFields(PoolingFields):
    """Routes that take `input`."""

    input: Annotated[tuple[Any, ...], BeforeValidator(_inputs)]
    encoding_format: Encoding = "float"
    embed_dtype: Annotated[str, one_of("float32")] = "float32"
    endianness: Annotated[str, one_of("native", "little")] = "native"

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.input


class EmbeddingRequest(InputFields):
    dimensions: Annotated[Integer, between(1, INT32_MAX)] | None = None
    normalize: Flag | None = None  # the same as use_activation
    prompt_name: ShortText | None = None  # of the model's own prompts; "" is none

    def check(self) -> None:
        super().check()
        if None not in (self.normalize, self.use_activation) and self.normalize != self.use_activation:
            raise InvalidParameter(
                "normalize and use_activation contradict each other; leave one out", param="normalize"
            )


class PoolingBody(EmbeddingRequest):
    task: Annotated[str, one_of("embed", "token_embed", "classify")] | None = None


class ChatEmbeddingRequest(PoolingBody, ChatFields):
    """One conversation in place of `input`."""

    input: Annotated[tuple[Any, ...], BeforeValidator(_inputs)] = ()
    add_special_tokens: Flag = False  # templates bring their own

    def check(self) -> None:
        super().check()
        self.check_prompt()
        if self.input:
            raise InvalidParameter("input and messages exclude each other; leave one out", param="messages")


class ClassifyRequest(InputFields):
    pass


class ScoreRequest(PoolingFields):
    """Peers have several names for the two lists of texts."""

    queries: Texts | None = None
    text_1: Texts | None = None
    data_1: Texts | None = None
    documents: Texts | None = None
    text_2: Texts | None = None
    data_2: Texts | None = None
    items: Texts | None = None
    max_tokens_per_doc: Annotated[Integer, between(1, INT32_MAX)] | None = None

    @property
    def first(self) -> tuple[str, ...]:
        return self._only("queries", "text_1", "data_1")

    @property
    def second(self) -> tuple[str, ...]:
        return self._only("documents", "text_2", "data_2", "items")

    def _only(self, *names: str) -> tuple[str, ...]:
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidParameter(
                f"exactly one of {', '.join(names)} is required",
                param=names[0],
                code="invalid_value" if given else "missing_required_parameter",
            )
        texts: tuple[str, ...] = getattr(self, given[0])
        return texts

    def check(self) -> None:
        super().check()
        num_first, num_second = len(self.first), len(self.second)
        if num_first not in (1, num_second):
            raise InvalidParameter(
                f"{num_first} queries for {num_second} documents; give one query, or as many as documents",
                param="queries",
            )


class RerankRequest(PoolingFields):
    query: Annotated[str, BeforeValidator(_text)]
    documents: Texts | None = None
    texts: Texts | None = None
    top_n: Annotated[Integer, between(0, INT32_MAX)] | None = None
    return_documents: Flag = True
    max_tokens_per_doc: Annotated[Integer, between(1, INT32_MAX)] | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        given = self.texts if self.documents is None else self.documents
        if given is None or (self.documents is not None and self.texts is not None):
            raise InvalidParameter(
                "exactly one of documents and texts is required",
                param="documents",
                code="missing_required_parameter" if given is None else "invalid_value",
            )
        return given

    def check(self) -> None:
        super().check()
        assert self.candidates
