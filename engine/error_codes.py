"""From the machine-readable code that crossed the process border back to an exception of engine.errors."""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import CapacityError, EngineError, KvasirError, RequestError

MESSAGES = {
    "deadline_exceeded": "the request did not finish within its time limit; ask for less or raise the limit",
    "server_overloaded": "the request waited too long for a place in the batch; retry later",
    "numerical_error": "the model produced values that are not finite for this request; sending it again will not help",
    "engine_dead": "the engine process ended while the request was running; it is being restarted, retry",
    "schema_too_complex": "the constraint became too complex to follow while the answer was written; simplify it",
    "internal_error": "the engine failed on this request",
    "draining": "the server is shutting down",
    "aborted": "the request was ended by an operator",
}


def _all_subclasses(root: type[KvasirError]) -> Iterator[type[KvasirError]]:
    for child in root.__subclasses__():
        yield child
        yield from _all_subclasses(child)


def to_exception(
    code: str, message: str | None = None, *, retry_after_s: int = 1, param: str | None = None
) -> KvasirError:
    """The exception that carries `code`; an EngineError with that code when no class claims it.

    message   what to tell the client; default: the standing text for the code
    param     the request's field that is at fault
    """
    text = message if message is not None else MESSAGES.get(code, MESSAGES["internal_error"])
    # classes that only inherit a code come after the one that declares it: prefer the declaring one, then the derived
    classes = [cls for cls in _all_subclasses(KvasirError) if getattr(cls, "code", None) == code]
    declaring = [cls for cls in classes if "code" in cls.__dict__] or classes
    error_type = declaring[0] if declaring else EngineError
    if issubclass(error_type, CapacityError):
        return error_type(text, retry_after_s=retry_after_s)
    if issubclass(error_type, RequestError):
        return error_type(text, param=param)
    error = error_type(text)
    if isinstance(error, EngineError):
        error.code = code
    return error
