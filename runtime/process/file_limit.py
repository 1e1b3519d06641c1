"""The limit on open files. Torch-free."""

from __future__ import annotations

import resource


def raise_file_limit() -> None:
    """Raise the soft limit on open files to the hard one.

    The usual soft limit is 1,024, for programs that call select(). The sockets of a large run need more, and a rank
    must survive a thousand connections that another user opens to its port.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            return  # macOS reports a hard limit that it does not grant
