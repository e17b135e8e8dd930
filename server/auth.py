"""API keys: reading them, and the guard that asks for one on every path that is not public."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.metrics import Metrics
from server.errors import ApiError

MIN_KEY_CHARS = 32
PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health"})


class Keyring:
    """The accepted keys, as digests. Without any key everybody is let in, as tenant ""."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]
        self._secret = secrets.token_bytes(32)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant_of(self, key: str) -> str | None:
        """A name for the key's owner that does not give the key away; None for an unknown key.

        Takes the same time wherever and whether the key is found.
        """
        presented = _digest(key)
        is_known = False
        for digest in self._digests:
            is_known |= hmac.compare_digest(digest, presented)
        return hmac.new(self._secret, presented, hashlib.sha256).hexdigest()[:32] if is_known else None


def load_keys(config: ServerConfig) -> Keyring:
    """Keys of the options and of the key file. Raises ConfigError for a short key or an unreadable file."""
    keys = list(config.api_keys)
    if config.api_key_file is not None:
        try:
            lines = Path(config.api_key_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"cannot read the API key file {config.api_key_file!r}: {reason}; name another with --api-key-file"
            ) from None
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise ConfigError(f"the API key file {config.api_key_file!r} has no key; put one per line")
    for key in keys:
        if len(key) < MIN_KEY_CHARS:
            raise ConfigError(
                f"an API key has {len(key)} characters; at least {MIN_KEY_CHARS} are needed (openssl rand -hex 32)"
            )
    return Keyring(keys)


class AuthGuard:
    """Outermost wall before the routes: looks at nothing but `scope["path"]` and the key, and denies by default."""

    def __init__(self, app: ASGIApp, keyring: Keyring, metrics: Metrics) -> None:
        self._app = app
        self._keyring = keyring
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        tenant: str | None = ""
        if self._keyring:
            tenant = self._tenant(scope)
            if tenant is None and route_path(scope) not in PUBLIC_PATHS:
                self._metrics.http.rejected("auth")
                await _refusal().response()(scope, receive, send)
                return
        scope["state"]["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        key = _presented_key(scope["headers"])
        return None if key is None else self._keyring.tenant_of(key)


def route_path(scope: Scope) -> str:
    """The path below the proxy's prefix, cut off as Starlette's router does it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) :].startswith("/"):
        return path[len(root) :]
    return path


def _presented_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    key = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, credentials = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                return credentials.strip()
        elif name == b"x-api-key":
            key = value.decode("latin-1").strip()
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _refusal() -> ApiError:
    return ApiError(
        401,
        "a valid API key is needed; send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
