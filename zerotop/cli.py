"""The zerotop command. Every subcommand is a module of zerotop.commands, imported only when it is called."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from runtime.process.garbage import collect_less_often
from zerotop.commands.examples import add_examples
from zerotop.commands.table import COMMANDS, Parser

_UTF8 = "PYTHONUTF8"
EXITS = "Exit codes: 0 done; 1 the run failed or the command was rejected; 2 bad usage, an unknown run or a bad value."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if argv is None:
        _speak_utf8()
        collect_less_often()
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale that lacks a character must not end in a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run(words)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has seen enough. Python would complain once more when it flushes.
        sys.stdout = None
        return 0
    except Exception as error:
        exit_code = _exit_code(error)
        if exit_code is None:
            raise
        _report(str(error), words)
        return exit_code


def _speak_utf8() -> None:
    """Start again in Python's UTF-8 mode if the locale has another encoding: run.json, logs and messages of the
    ranks are UTF-8, and under an ASCII locale no other name could even be passed on."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get(_UTF8) != "1" and sys.executable:
        os.environ[_UTF8] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _run(words: list[str]) -> int:
    command = words[0] if words else ""
    if command and not command.startswith("-") and command not in COMMANDS:
        near = difflib.get_close_matches(
            command, [name for name, (_, line) in COMMANDS.items() if line], n=1, cutoff=0.7
        )
        hint = f" Did you mean {near[0]}?" if near else " zerotop --help lists them."
        _report(f"zerotop has no command {command!r}.{hint}", words)
        return 2
    if not words and sys.stdin.isatty() and sys.stdout.isatty():
        from zerotop.commands.home import show_runs

        return show_runs()
    parser = _parser(command)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    own_words, script = _split(words)
    arguments = parser.parse_args(own_words)
    arguments.script = script
    module = importlib.import_module(f"zerotop.commands.{COMMANDS[arguments.command][0]}")
    result: int = module.run(arguments)
    return result


def _split(words: list[str]) -> tuple[list[str], list[str] | None]:
    """Before `--`, and the script with its arguments after it, or the words that a shell completes: argparse must not
    see them."""
    if words[0] not in ("launch", "complete") or "--" not in words:
        return words, None
    place = words.index("--")
    return words[:place], words[place + 1 :]


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        # argparse's own version action wants the text beforehand, and package metadata take longer than --help.
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"zerotop {version('zerotop')}")
        except PackageNotFoundError:
            print("zerotop (run from its source, not installed)")
        parser.exit(0)


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser with `command`'s own arguments; the other commands only as lines of the help."""
    parser = Parser(
        prog="zerotop", description="Launch, watch and steer ZeRO training runs from a terminal.", epilog=EXITS
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    if command in COMMANDS:
        module = importlib.import_module(f"zerotop.commands.{COMMANDS[command][0]}")
        module.register(subparsers)
        add_examples(subparsers.choices[command], command)
        return parser
    add_examples(parser, "")
    for name, (_, line) in COMMANDS.items():
        if line:
            subparsers.add_parser(name, help=line)
    return parser


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error that is meant for the user; None for a bug, which deserves its traceback."""
    # Imported here, because a good call needs none of them.
    from runtime.config import ConfigError
    from runtime.config.knobs import KnobError
    from runtime.wire.codec import ProtocolError
    from zerotop.output import CommandError
    from zerotop.rundir.paths import RunError
    from zerotop.source.base import SourceError

    if isinstance(error, CommandError):
        return error.exit_code
    return 2 if isinstance(error, ConfigError | KnobError | ProtocolError | RunError | SourceError) else None


def _report(message: str, words: list[str]) -> None:
    """Print an error to stderr; with --json also as one document to stdout."""
    from zerotop.output import say

    say(f"zerotop: {message}")
    own_words = words[: words.index("--")] if "--" in words else words
    if "--json" in own_words:
        from zerotop.output import print_json

        print_json({"error": message})


if __name__ == "__main__":
    sys.exit(main())
