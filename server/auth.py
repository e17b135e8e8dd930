"""API keys: reading them, and the guard that asks for one on every path that is not public."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.metrics import Metrics
from server.errors import ApiError
from server.rate_limits import KeyLimits, RateLimits, parse_key_line

MIN_KEY_CHARS = 32
PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health"})


class Keyring:
    """The accepted keys, as digests. Without any key everybody is let in, as tenant "".

    An operator's key opens everything, and alone opens the routes that change the server.
    """

    def __init__(
        self,
        keys: Iterable[str],
        admin_keys: Iterable[str] = (),
        limits: Mapping[str, KeyLimits] | None = None,
        secret: bytes | None = None,
    ) -> None:
        """`limits`: of those keys that have some of their own. With the same `secret` owners keep their names."""
        self._admin_digests = [_digest(key) for key in admin_keys]
        self._user_digests = [_digest(key) for key in keys]
        self._digests = self._user_digests + self._admin_digests
        self._secret = secret or secrets.token_bytes(32)
        self.rate_limits = RateLimits({self._name_of(_digest(key)): own for key, own in (limits or {}).items()})

    def __bool__(self) -> bool:
        """Whether users need a key."""
        return bool(self._user_digests)

    @property
    def has_admin_keys(self) -> bool:
        return bool(self._admin_digests)

    def is_admin(self, key: str) -> bool:
        """Whether it is an operator's key, in the same time for any key."""
        return _is_among(self._admin_digests, _digest(key))

    def tenant_of(self, key: str) -> str | None:
        """A name for the key's owner that does not give the key away; None for an unknown key.

        Takes the same time wherever and whether the key is found.
        """
        presented = _digest(key)
        if not _is_among(self._digests, presented):
            return None
        return self._name_of(presented)

    def _name_of(self, digest: bytes) -> str:
        return hmac.new(self._secret, digest, hashlib.sha256).hexdigest()[:32]


def load_keys(config: ServerConfig, secret: bytes | None = None) -> Keyring:
    """Keys of the options and of the key file. Raises ConfigError for a short key or an unreadable file."""
    defaults = KeyLimits(config.key_requests_per_minute, config.key_tokens_per_minute)
    limits = dict.fromkeys(config.api_keys, defaults)
    if config.api_key_file is not None:
        try:
            lines = Path(config.api_key_file).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"cannot read the API key file {config.api_key_file!r}: {reason}; name another with --api-key-file"
            ) from None
        from_file = dict(parse_key_line(line, defaults) for line in lines if line.strip())
        limits |= from_file
        if not from_file:
            raise ConfigError(f"the API key file {config.api_key_file!r} has no key; put one per line")
    for key in (*limits, *config.admin_api_keys):
        if len(key) < MIN_KEY_CHARS:
            raise ConfigError(
                f"an API key has {len(key)} characters; at least {MIN_KEY_CHARS} are needed (openssl rand -hex 32)"
            )
    return Keyring(limits, config.admin_api_keys, limits, secret)


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
                await _refusal().response(route_path(scope))(scope, receive, send)
                return
        scope["state"]["tenant"] = tenant
        await self._app(scope, receive, self._with_limits(send, tenant or ""))

    def _with_limits(self, send: Send, tenant: str) -> Send:
        """Tells the key's owner what is left of its limits, where it has some."""
        limits = self._keyring.rate_limits
        if not limits.headers(tenant):
            return send

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *limits.headers(tenant)]}
            await send(message)

        return send_with_limits

    def _tenant(self, scope: Scope) -> str | None:
        key = _presented_key(scope["headers"])
        return None if key is None else self._keyring.tenant_of(key)


def require_admin(request: Request, keyring: Keyring, config: ServerConfig) -> None:
    """Raises ApiError (403) unless the request carries an operator's key.

    Without any keys the server is its user's own, and nobody else's as long as it listens on loopback.
    """
    if keyring.has_admin_keys:
        key = _presented_key(request.scope["headers"])
        if key is not None and keyring.is_admin(key):
            return
        message = "this route needs an operator's key (--admin-api-keys)"
    elif not keyring and is_loopback(config.host):
        return
    else:
        message = "this route is closed: the server has no operator's key; start it with --admin-api-keys"
    raise ApiError(403, message, type="permission_error", code="admin_key_required")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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


def _is_among(digests: Iterable[bytes], presented: bytes) -> bool:
    is_known = False
    for digest in digests:
        is_known |= hmac.compare_digest(digest, presented)
    return is_known


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
