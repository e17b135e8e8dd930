"""The servers of a measurement: those that run already, or started for it. Knows what they say about their model."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from engine.errors import ConfigError
from engine.launch import resolve_model_path
from loadtest.client import CONNECT_TIMEOUT_S, Target
from loadtest.measure import Endpoint
from loadtest.own_server import ServerStartError, own_server
from loadtest.peers import OWN, PEERS, PeerError, PeerServer, Settings

DEFAULT_MODEL = "mimir"
DEFAULT_CONTEXT = 2048  # when neither the server nor the user says
OWN_NAME = "kvasir"


class BenchError(RuntimeError):
    """A measurement cannot begin; the message says what to do."""


@dataclass(frozen=True)
class Served:
    """Servers that are ready. `context`: tokens of prompt plus answer that all of them take."""

    endpoints: list[Endpoint]
    context: int
    takes_token_ids: bool = True


@contextmanager
def served(arguments: argparse.Namespace, slots: int) -> Iterator[Served]:
    """Starts what has to be started, for `slots` requests at once. Raises BenchError."""
    if arguments.url and arguments.peer:
        raise BenchError("--peer starts all servers itself on the same weights; leave out --url")
    with ExitStack() as stack:
        try:
            if arguments.url:
                yield _running(arguments)
            elif arguments.peer:
                yield _with_peers(stack, arguments, slots)
            else:
                flags = ["--model", arguments.model or DEFAULT_MODEL, *arguments.serve_args.split()]
                url = stack.enter_context(own_server(flags))
                name, context = model_card(url, None, None)
                target = _target(arguments, url, name)
                yield Served([Endpoint(OWN_NAME, target)], arguments.context or context)
        except (PeerError, ConfigError, ServerStartError) as error:
            raise BenchError(str(error)) from error


def _running(arguments: argparse.Namespace) -> Served:
    endpoints, contexts = [], []
    for given in arguments.url:
        before, separator, after = given.partition("=")
        is_named = bool(separator) and "/" not in before
        url = (after if is_named else given).rstrip("/").removesuffix("/v1")
        name, context = model_card(url, arguments.api_key, arguments.model)
        endpoints.append(Endpoint(before if is_named else url.partition("//")[2], _target(arguments, url, name)))
        contexts.append(context)
    if len({endpoint.name for endpoint in endpoints}) < len(endpoints):
        raise BenchError("two servers have the same name; give NAME=URL")
    return Served(endpoints, arguments.context or min(contexts))


def _with_peers(stack: ExitStack, arguments: argparse.Namespace, slots: int) -> Served:
    folder = resolve_model_path(arguments.model or DEFAULT_MODEL)
    chosen = [_peer(given) for given in arguments.peer]
    context = arguments.context or DEFAULT_CONTEXT
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    settings = Settings(scratch=scratch, threads=arguments.threads, slots=slots, context=context)
    own = Settings(**{**settings.__dict__, "flags": tuple(arguments.serve_args.split())})
    servers = [stack.enter_context(OWN(Path(sys.executable), folder, own))]
    servers += [stack.enter_context(PEERS[name](path, folder, settings)) for name, path in chosen]
    endpoints = [Endpoint(server.name, _peer_target(arguments, server)) for server in servers]
    return Served(endpoints, context, all(server.takes_token_ids for server in servers))


def _peer(given: str) -> tuple[str, Path]:
    name, separator, path = given.partition("=")
    if name not in PEERS or not separator:
        raise BenchError(f"--peer {given}: give NAME=PATH with one of {', '.join(PEERS)}")
    return name, Path(path)


def _target(arguments: argparse.Namespace, url: str, model: str, extra: dict[str, Any] | None = None) -> Target:
    return Target(
        url=url,
        model=model,
        api_key=arguments.api_key,
        ignore_eos=not arguments.honour_eos,
        extra=extra or {},
        stream=not arguments.no_stream,
        temperature=arguments.temperature,
        timeout_s=arguments.timeout_s,
    )


def _peer_target(arguments: argparse.Namespace, server: PeerServer) -> Target:
    target = _target(arguments, server.url, server.model, dict(server.request_fields))
    ignore_eos = target.ignore_eos and server.takes_ignore_eos
    return Target(**{**target.__dict__, "ignore_eos": ignore_eos, "sends_done": server.sends_done})


def model_card(url: str, api_key: str | None, wanted: str | None) -> tuple[str, int]:
    """The name of the wanted or first model, and its context. Raises BenchError when the server does not say."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=CONNECT_TIMEOUT_S)
        response.raise_for_status()
        cards = response.json()["data"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise BenchError(f"cannot reach {url} ({type(error).__name__}: {error}); start a server first") from error
    names = [str(card["id"]) for card in cards]
    if not names or (wanted is not None and wanted not in names):
        raise BenchError(f"{url} does not serve {wanted or 'any model'}; it serves {', '.join(names) or 'nothing'}")
    card = cards[names.index(wanted) if wanted is not None else 0]
    context = card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx_train") or DEFAULT_CONTEXT
    return str(card["id"]), int(context)


def names_of(endpoints: Sequence[Endpoint]) -> str:
    return ", ".join(f"{endpoint.name} ({endpoint.target.model} at {endpoint.target.url})" for endpoint in endpoints)
