"""python -I -S end_with_supervisor.py COMMAND...: becomes COMMAND, which the kernel ends with SIGTERM when the
supervisor, which has started it, dies. Imports little: it is on the way of every wrapped command."""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Never returns, unless the command can't be run: then the exit code is a shell's."""
    parent = os.getppid()
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        print(f"zerotop: {sys.argv[1]}: {error.strerror}", file=sys.stderr)
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


if __name__ == "__main__":
    main()
