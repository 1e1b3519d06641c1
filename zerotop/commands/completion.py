"""zerotop completion: the scripts with which shells complete zerotop's commands, and the candidates they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

_INSTALL = """\
examples:
  eval "$(zerotop completion bash)"                                        in ~/.bashrc
  eval "$(zerotop completion zsh)"                                         in ~/.zshrc, after compinit
  zerotop completion fish > ~/.config/fish/completions/zerotop.fish"""
_BASH = """\
_zerotop() {
    local IFS=$'\\n'
    COMPREPLY=($(zerotop complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -o nosort -F _zerotop zerotop 2>/dev/null || complete -o default -F _zerotop zerotop
"""
_ZSH = """\
_zerotop() {
    local -a found
    found=("${(@f)$(zerotop complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[*]}" ]]; then compadd -Q -a found; else _files; fi
}
compdef _zerotop zerotop
"""
_FISH = """\
function __zerotop_complete
    set -l words (commandline -opc) (commandline -ct)
    zerotop complete -- $words[2..-1] 2>/dev/null
end
complete -c zerotop -a '(__zerotop_complete)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_RUN_METAVARS = frozenset({"RUN", "A", "B", "TARGET", "RUN[@STEP]"})


def register(subparsers: Any) -> None:
    """Add `completion` to the command line."""
    parser = subparsers.add_parser(
        "completion",
        help="print the script that completes zerotop's commands in a shell",
        description="Print the script that completes commands, options and the names of runs in a shell.",
        epilog=_INSTALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS))


def run(arguments: argparse.Namespace) -> int:
    """Print the script."""
    print(SCRIPTS[arguments.shell], end="")
    return 0


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of the words after `zerotop` may become; none where the shell completes file names."""
    from zerotop.commands.table import COMMANDS, command_parser

    *before, current = words or [""]
    if not before:
        found = [name for name, (_, line) in COMMANDS.items() if line]
        return [name for name in found if name.startswith(current)]
    if before[0] not in COMMANDS or "--" in before:
        return []
    actions = command_parser(before[0])._actions
    options = {name: action for action in actions for name in action.option_strings}
    last = options.get(before[-1])
    if last is not None and last.nargs != 0:
        found = [str(choice) for choice in last.choices or ()]
    elif current.startswith("-"):
        found = [name for name in options if name.startswith("--") or len(current) == 1]
    else:
        found = _positional(actions, options, before[1:])
    return [name for name in found if name.startswith(current)]


def _positional(
    actions: Sequence[argparse.Action], options: dict[str, argparse.Action], before: Sequence[str]
) -> list[str]:
    """The values of the positional argument that comes next."""
    places = [action for action in actions if not action.option_strings]
    taken, skip = 0, False
    for word in before:
        action = options.get(word)
        if skip:
            skip = False
        elif action is not None:
            skip = action.nargs != 0
        elif not word.startswith("-"):
            taken += 1
    if not places:
        return []
    repeats = places[-1].nargs in ("*", "+") and places[-1].metavar in _RUN_METAVARS
    if taken >= len(places) and not repeats:
        return []
    place = places[min(taken, len(places) - 1)]
    if place.choices:
        return [str(choice) for choice in place.choices]
    return _run_names() if place.metavar in _RUN_METAVARS else []


def _run_names() -> list[str]:
    from zerotop.rundir.paths import RunError, runs_home

    try:
        return sorted(path.parent.name for path in runs_home().glob("*/run.json"))
    except (OSError, RunError):
        return []
