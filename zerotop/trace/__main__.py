"""python -m zerotop.trace RUN NUMBER RANK=PATH...: merges the parts of a profile, as the supervisor asks for it.

Prints one JSON document: path, bytes and steps of the merged trace, or the problem.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from zerotop.output import print_json
from zerotop.trace.merge import merge


def main(words: list[str]) -> int:
    """Merge, at idle priority."""
    os.nice(19)
    run, number = Path(words[0]), int(words[1])
    parts = {int(rank): run / path for rank, path in (word.split("=", 1) for word in words[2:])}
    try:
        document = merge(run, number, parts)
    except (OSError, ValueError) as error:
        document = {"problem": f"{type(error).__name__}: {error}"}
    print_json(document)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
