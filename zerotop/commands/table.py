"""All commands, and the parser of one of them. Imports none of them: the help and completion must be quick."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NoReturn

COMMANDS = {
    "launch": ("launch", "start a run and open the live screen on it"),
    "run": ("run", "run any training command and watch it"),
    "attach": ("attach", "open the screen on a run, here or on another machine over SSH"),
    "web": ("web", "show the screen in a browser on this machine"),
    "replay": ("replay", "play a run's recording on the same screen, or export it"),
    "compare": ("compare", "compare two runs: loss, speed, memory, config, and a verdict"),
    "branch": ("branch", "start a new run from a checkpoint of another one"),
    "note": ("note", "keep a remark with a run"),
    "rm": ("rm", "delete runs that are over"),
    "ls": ("ls", "list runs"),
    "status": ("status", "show where a run is: step, loss, and every rank"),
    "logs": ("logs", "print what the ranks wrote"),
    "stream": ("stream", "print what a run says as JSON lines, until it ends"),
    "pause": ("control", "pause the run at the next step boundary"),
    "resume": ("control", "resume a paused run"),
    "checkpoint": ("control", "write a checkpoint at the next step boundary"),
    "set": ("control", "change a setting of the running run"),
    "stop": ("control", "write a checkpoint, then end the run"),
    "abort": ("control", "end the run at once, without a checkpoint"),
    "stacks": ("control", "dump the stacks of all ranks, also of a run that is stuck"),
    "profile": ("control", "profile the next steps with torch.profiler, while the run goes on"),
    "trace": ("trace", "export phases and collectives of the last minutes for Perfetto"),
    "snapshot": ("control", "write what every rank's memory is used for, by category, unit and tensor"),
    "report": ("report", "pack what is known of a run into one file for a bug report"),
    "plan": ("plan", "estimate memory and traffic of each ZeRO stage"),
    "data": ("data", "show what a config trains on, token by token"),
    "export": ("export", "write a checkpoint as Hugging Face safetensors"),
    "config": ("config", "show your settings and where they come from, or the config of a run"),
    "completion": ("completion", "print the script that completes zerotop's commands in a shell"),
    "doctor": ("doctor", "check this machine and suggest fixes"),
    "resolve": ("resolve", ""),
    "complete": ("complete", ""),
}
"""Command -> (module of zerotop.commands, its line in the help; empty: not in the help)."""


class Parser(argparse.ArgumentParser):
    """Usage errors in two lines, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")


def command_parser(command: str) -> argparse.ArgumentParser:
    """The parser of one command alone."""
    subparsers = Parser().add_subparsers(parser_class=Parser)
    importlib.import_module(f"zerotop.commands.{COMMANDS[command][0]}").register(subparsers)
    parser: argparse.ArgumentParser = subparsers.choices[command]
    return parser
