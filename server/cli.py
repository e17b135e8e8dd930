"""The `kvasir` command: serve, batch, chat, complete, calibrate, train-drafter, frontier, bench, version.

Translates flags into calls; no more.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import logs
from engine.config import Config
from engine.config_load import add_flags, load, unknown_variables
from engine.errors import ConfigError
from engine.version import __version__

logger = logging.getLogger("server.cli")

DEFAULT_URL = "http://127.0.0.1:8000"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    os.umask(0o077)
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["bench"]:  # its flags are those of `loadtest.run`
            return _bench(argv[1:])
        if argv[:1] == ["frontier"]:  # those of `loadtest.frontier`
            return _frontier(argv[1:])
        arguments = _parser().parse_args(argv)
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"kvasir: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvasir",
        allow_abbrev=False,  # a cut-off or misspelled flag must not set another option
        description="Kvasir: an OpenAI-compatible LLM server whose KV cache is a programmable resource.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        allow_abbrev=False,
        usage="kvasir serve [-h] [--config FILE] [OPTIONS] [MODEL]",
        help="start the HTTP server",
        description="Start the HTTP server. Options come from --config, then KVASIR_* variables, then flags; the later "
        "one wins: --max-model-len 4096 equals KVASIR_MAX_MODEL_LEN=4096.",
    )
    serve.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    serve.add_argument("--config", metavar="FILE", help="TOML file, see configs/")
    add_flags(serve)
    serve.set_defaults(run=_serve)

    batch = commands.add_parser(
        "batch",
        allow_abbrev=False,
        usage="kvasir batch [-h] -o OUT [--config FILE] [OPTIONS] FILE",
        help="run a file of requests without a server",
        description="Run a file of requests (JSONL, as for /v1/batches) without a server. Started again with the same "
        "OUT it goes on where it was interrupted, and tries errors again. Options are those of `kvasir serve`. Exit "
        "code: 0 when all requests have answers, 1 when some have errors.",
    )
    batch.add_argument("file", metavar="FILE", help="one request per line: custom_id, method, url, body")
    batch.add_argument("-o", "--output", metavar="OUT", required=True, help="where the results go")
    batch.add_argument("--config", metavar="CONFIG", help="TOML file, see configs/")
    add_flags(batch)
    batch.set_defaults(run=_batch, positional_model=None)

    chat = commands.add_parser("chat", allow_abbrev=False, help="talk to a running server in the terminal")
    _add_client_flags(chat)
    chat.add_argument("--system", help="system message")
    chat.add_argument("message", nargs="*", help="one message; without it, an interactive conversation")
    chat.set_defaults(run=_chat)

    complete = commands.add_parser("complete", allow_abbrev=False, help="complete one text with a running server")
    _add_client_flags(complete)
    complete.add_argument("prompt", nargs="*", help="the text; without it, standard input")
    complete.set_defaults(run=_complete)

    calibrate = commands.add_parser(
        "calibrate",
        allow_abbrev=False,
        usage="kvasir calibrate [-h] [--out FILE] [--config FILE] [OPTIONS] [MODEL]",
        help="measure what cache policies need to know of a model",
        description="Measure the heads that retrieve (razor_attention) and the layer that finds (gemfilter), and write "
        "them to one file, by default beside the weights, where `kvasir serve` finds it. Options are those of `kvasir "
        "serve`.",
    )
    calibrate.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    calibrate.add_argument("--out", metavar="FILE", help="default: kv_artefacts.json in the model's folder")
    calibrate.add_argument("--config", metavar="CONFIG", help="TOML file, see configs/")
    add_flags(calibrate)
    calibrate.set_defaults(run=_calibrate)

    train = commands.add_parser(
        "train-drafter",
        allow_abbrev=False,
        usage="kvasir train-drafter [-h] [--out FOLDER] [--minutes M] [--prompts FILE] [--tokens N] [--config FILE] "
        "[OPTIONS] [MODEL]",
        help="train a head that guesses ahead for a model (the drafter eagle)",
        description="The model answers prompts, and a layer learns to guess its next hidden state from the last one. "
        "The head is written to one folder, by default beside the weights, where `kvasir serve` finds it. Options are "
        "those of `kvasir serve`.",
    )
    train.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    train.add_argument("--out", metavar="FOLDER", help="default: the folder eagle in the model's")
    train.add_argument("--minutes", type=float, default=20.0, help="for everything (default: %(default)g)")
    train.add_argument(
        "--prompts", metavar="FILE", help='a prompt in each line: text, {"prompt": ...} or {"messages": [...]}; '
        "default: the corpus of a bundled model",
    )  # fmt: skip
    train.add_argument(
        "--tokens", type=int, default=250_000, help="that the model writes at most (default: %(default)d)"
    )
    train.add_argument("--config", metavar="CONFIG", help="TOML file, see configs/")
    add_flags(train)
    train.set_defaults(run=_train_drafter)

    commands.add_parser("bench", help="measure an OpenAI-compatible server")
    commands.add_parser("frontier", help="measure what cache policies cost in quality, and what they save")

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=lambda arguments: print(__version__) or 0)
    return parser


def _add_client_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", default=os.environ.get("KVASIR_URL", DEFAULT_URL), help="server (default: %(default)s)"
    )
    parser.add_argument("--api-key", default=os.environ.get("KVASIR_API_KEY"), help="key, or KVASIR_API_KEY")
    parser.add_argument("--model", help="served model; default: the first one")
    parser.add_argument("--max-tokens", type=int, help="longest answer in tokens; default: the server's")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: the server's")
    parser.add_argument("--seed", type=int, help="for a reproducible answer")


def _serve(arguments: argparse.Namespace) -> int:
    config = _config_of(arguments)
    logs.setup(config.server.log_level, config.server.log_format)
    for name in unknown_variables(os.environ):
        logger.warning("%s is not an option and has no effect; `kvasir serve --help` lists them", name)
    from server.lifecycle import run

    return run(config)


def _batch(arguments: argparse.Namespace) -> int:
    config = _config_of(arguments)
    logs.setup("warning" if config.server.log_level == "info" else config.server.log_level, config.server.log_format)
    from server.batches.command import run

    return run(config, Path(arguments.file), Path(arguments.output))


def _calibrate(arguments: argparse.Namespace) -> int:
    config = _config_of(arguments)
    logs.setup("warning" if config.server.log_level == "info" else config.server.log_level, config.server.log_format)
    from engine.launch_calibration import calibrate

    print(calibrate(config, None if arguments.out is None else Path(arguments.out)))
    return 0


def _train_drafter(arguments: argparse.Namespace) -> int:
    config = _config_of(arguments)
    logs.setup("warning" if config.server.log_level == "info" else config.server.log_level, config.server.log_format)
    from engine.launch_drafter import DrafterTraining, train_drafter

    training = DrafterTraining(
        minutes=arguments.minutes,
        num_tokens=arguments.tokens,
        prompts=None if arguments.prompts is None else Path(arguments.prompts),
        seed=config.runtime.seed,
    )
    print(train_drafter(config, None if arguments.out is None else Path(arguments.out), training))
    return 0


def _config_of(arguments: argparse.Namespace) -> Config:
    flags: dict[str, Any] = vars(arguments).copy()
    if arguments.positional_model is not None:
        flags["model"] = arguments.positional_model
    return load(flags, file=arguments.config, environ=os.environ)


def _chat(arguments: argparse.Namespace) -> int:
    from server.terminal import chat

    return chat(_client(arguments), system=arguments.system, message=" ".join(arguments.message))


def _complete(arguments: argparse.Namespace) -> int:
    from server.terminal import complete

    prompt = " ".join(arguments.prompt) if arguments.prompt else sys.stdin.read()
    return complete(_client(arguments), prompt)


def _client(arguments: argparse.Namespace) -> Any:
    from server.terminal import Client

    options = {
        name: value for name in ("max_tokens", "temperature", "seed") if (value := getattr(arguments, name)) is not None
    }
    return Client(arguments.url, arguments.api_key, arguments.model, options)


def _frontier(argv: Sequence[str]) -> int:
    from loadtest.frontier.command import main as frontier

    return frontier(argv)


def _bench(argv: Sequence[str]) -> int:
    from loadtest.run import main as bench

    return bench(argv)


if __name__ == "__main__":
    sys.exit(main())
