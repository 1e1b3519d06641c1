"""The Python that runs zerotop here, for other machines: `launch` writes its path to the state home, and SSH commands
read it.

A shell started by ssh has no virtual environment and often a short PATH, so `zerotop` is mostly not found there.
"""

from __future__ import annotations

import shlex
import sys

from runtime.process.atomic_file import replace_text
from zerotop.rundir.paths import RunError, make_private_folder, state_home

MARK = "zerotop-answers:"
"""Printed on its own line before the answer, because the start-up files of a login shell may print before it."""

# One line and no single quote in it, so that it survives inside the single quotes of any login shell.
_FIND = (
    'f="${XDG_STATE_HOME:-$HOME/.local/state}/zerotop/executable"; p=; if [ -r "$f" ]; then IFS= read -r p < "$f"; fi; '
    f'echo "{MARK}"; '
    # -P: a folder called zerotop in the home must not stand in for the package.
    'if [ -n "$p" ] && [ -x "$p" ]; then exec "$p" -P -m zerotop "$@"; fi; '
    'for z in zerotop "$HOME/.local/bin/zerotop"; do '
    'if command -v "$z" >/dev/null 2>&1; then exec "$z" "$@"; fi; done; '
    'echo "no zerotop found: $f names none, and there is none in PATH" >&2; exit 127'
)


def record_executable() -> None:
    """Write the path of this Python to STATE/executable. Raises RunError if the state home is not writable."""
    try:
        path = make_private_folder(state_home()) / "executable"
    except RunError as error:
        raise RunError(f"{error}: set XDG_STATE_HOME to a folder in which runs can be kept") from None
    try:
        replace_text(path, sys.executable + "\n")
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror}") from None


def shell_command(words: list[str]) -> str:
    """The command line that runs `zerotop WORDS...` in any login shell: prints MARK, then becomes zerotop."""
    return f"exec sh -c {shlex.quote(_FIND)} zerotop {shlex.join(words)}"
