"""Everything that the engine raises on purpose.

    KvasirError
    |-- RequestError              the client's fault, told to the client
    |   |-- InvalidParameter      a field has a wrong value
    |   |-- PromptTooLong         the prompt and its output cannot fit
    |   |-- ModelNotFound         no model or adapter of that name
    |   |-- Conflict              what is asked for is so already
    |   |-- SchemaTooComplex      a schema, pattern or grammar is beyond the limits
    |   |-- UnsupportedParameter  a feature that is off or unknown here
    |   `-- TemplateError         the chat template refused the messages
    |-- CapacityError             come back later
    |   |-- QueueFull             the waiting queue is at its bound of requests
    |   |   `-- QueueTokensFull   ... or of prompt tokens
    |   |-- RateLimited           one key has too much in flight
    |   `-- NotReady              loading, draining, asleep or dead
    |-- EngineError               our fault
    |   |-- EngineDead            the engine process ended
    |   |-- Aborted               an operator ended the request
    |   |-- NumericalError        NaN or infinity in a request's logits
    |   `-- DeadlineExceeded      the request ran past its time limit
    `-- ConfigError               a setting cannot be honoured; nothing was started

Messages name the value, the bound and the remedy, and never contain paths of the server or tracebacks.
"""

from __future__ import annotations


class KvasirError(Exception):
    """Base of all deliberate errors."""


class RequestError(KvasirError):
    """The request cannot be served as it is.

    param   dotted name of the offending field, for instance "messages.0.role"
    code    machine-readable reason, as in the OpenAI error envelope
    """

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class InvalidParameter(RequestError):
    """A field has a value outside its range."""


class PromptTooLong(RequestError):
    """Prompt plus requested output exceed the context or what the cache can ever hold."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    """No model or adapter of that name is served."""

    code = "model_not_found"


class Conflict(RequestError):
    """The state of the server forbids it, for instance an adapter of that name is loaded."""

    code = "conflict"


class SchemaTooComplex(RequestError):
    """A schema, pattern or grammar exceeds a limit, or takes too long to compile or to follow."""

    code = "schema_too_complex"


class UnsupportedParameter(RequestError):
    """A field asks for a feature that this server does not offer."""

    code = "unsupported_parameter"


class TemplateError(RequestError):
    """The chat template raised, ran too long or produced too much text."""

    code = "template_error"


class CapacityError(KvasirError):
    """The request is fine but cannot be taken now; retry after `retry_after_s` seconds."""

    code = "server_overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1, code: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        if code is not None:
            self.code = code


class QueueFull(CapacityError):
    """The waiting queue is at its bound of requests."""

    code = "queue_full"


class QueueTokensFull(QueueFull):
    """The waiting queue is at its bound of prompt tokens."""

    code = "queue_tokens_full"


class RateLimited(CapacityError):
    """One API key has reached its own limit."""

    code = "rate_limit_exceeded"


class NotReady(CapacityError):
    """The server is loading, draining, asleep or its engine is being restarted."""

    code = "loading"


class EngineError(KvasirError):
    """Our own fault."""

    code = "internal_error"


class EngineDead(EngineError):
    """The engine process ended while the request was running."""

    code = "engine_dead"


class Aborted(EngineError):
    """An operator ended the request, or sent the engine to sleep."""

    code = "aborted"


class NumericalError(EngineError):
    """The model produced NaN or infinite logits for this request."""

    code = "numerical_error"


class DeadlineExceeded(EngineError):
    """The request did not finish within its time limit."""

    code = "deadline_exceeded"


class ConfigError(KvasirError):
    """A setting or model cannot be honoured."""
