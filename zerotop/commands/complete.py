"""zerotop complete: what a shell asks while a command line is typed. Not meant for users."""

from __future__ import annotations

import argparse
from typing import Any


def register(subparsers: Any) -> None:
    """Add `complete` to the command line."""
    parser = subparsers.add_parser("complete", description="Print the candidates for the last of the words after --.")
    parser.add_argument("words", nargs="*")


def run(arguments: argparse.Namespace) -> int:
    """Print one candidate a line."""
    from zerotop.commands.completion import candidates

    for candidate in candidates(arguments.script if arguments.script is not None else arguments.words):
        print(candidate)
    return 0
