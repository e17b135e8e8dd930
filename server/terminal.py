"""`kvasir chat` and `kvasir complete`: a terminal client of any OpenAI-compatible server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from engine.errors import ConfigError

TIMEOUT_S = 600.0
HELP = "Type a message; /reset forgets the conversation, /exit or Ctrl-D ends it."


class Client:
    """Streams answers from one server. Every failure becomes a ConfigError with one clear line."""

    def __init__(self, url: str, api_key: str | None, model: str | None, options: dict[str, Any]) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = base
        try:
            self._http = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(TIMEOUT_S, connect=5.0))
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise ConfigError(f"the URL {url!r} or the API key cannot be used: {error}") from None
        self._options = options
        self.model = model or self._first_model()

    def stream_chat(self, messages: list[dict[str, str]]) -> Iterator[str]:
        body = {"model": self.model, "messages": messages, "stream": True, **self._options}
        for event in self._stream("/v1/chat/completions", body):
            for choice in event.get("choices", []):
                yield choice["delta"].get("content") or ""

    def stream_completion(self, prompt: str) -> Iterator[str]:
        body = {"model": self.model, "prompt": prompt, "stream": True, **self._options}
        for event in self._stream("/v1/completions", body):
            for choice in event.get("choices", []):
                yield choice["text"]

    def _first_model(self) -> str:
        response = self._request("GET", "/v1/models")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ConfigError(f"{self.url} lists no model; is it an OpenAI-compatible server?") from None

    def _request(self, method: str, path: str) -> httpx.Response:
        try:
            response = self._http.request(method, path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != httpx.codes.OK:
            raise ConfigError(f"{self.url} answered {response.status_code}: {_error_text(response)}")
        return response

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    raise ConfigError(f"{self.url} answered {response.status_code}: {_error_text(response)}")
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ConfigError(event["error"]["message"])
                    yield event
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: httpx.HTTPError) -> ConfigError:
        return ConfigError(
            f"cannot reach {self.url} ({type(error).__name__}); start a server with `kvasir serve` or give --url"
        )


def chat(client: Client, *, system: str | None, message: str) -> int:
    """One answer when there is a message, otherwise a conversation until end of input."""
    start = [{"role": "system", "content": system}] if system else []
    if message:
        _print_stream(client.stream_chat([*start, {"role": "user", "content": message}]))
        return 0
    print(f"{client.model} at {client.url}. {HELP}")
    messages = list(start)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        if text == "/exit":
            return 0
        if text == "/reset":
            messages = list(start)
            continue
        if text:
            question = {"role": "user", "content": text}
            try:
                answer = _print_stream(client.stream_chat([*messages, question]))
            except ConfigError as error:  # one message that failed, for instance a full context, is not the end
                print(f"kvasir: {error}", file=sys.stderr)
                continue
            messages += [question, {"role": "assistant", "content": answer}]


def complete(client: Client, prompt: str) -> int:
    if not prompt:
        raise ConfigError("there is no prompt; give it as an argument or on standard input")
    _print_stream(client.stream_completion(prompt))
    return 0


def _print_stream(pieces: Iterator[str]) -> str:
    answer = ""
    for piece in pieces:
        answer += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return answer


def _error_text(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or response.reason_phrase
