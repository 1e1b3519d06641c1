"""Writes the tutorial's data: the dialogues of the package chitchat-dataset as JSONL of OpenAI's messages.

    python tools/tutorial.py OUT.jsonl

The person who writes first becomes the user, the other one the assistant; what someone writes in a row is one message.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def dialogues() -> Iterator[list[dict[str, str]]]:
    """The messages of each dialogue that has an answer."""
    found = importlib.util.find_spec("chitchat_dataset")  # the package's own import needs more than its data
    if found is None or found.origin is None:
        sys.exit("tutorial: chitchat-dataset is not installed: pip install --no-deps -r tests/material.txt")
    stored: dict[str, Any] = json.loads((Path(found.origin).parent / "dataset.json").read_text())
    for dialogue in stored.values():
        roles: dict[str, str] = {}
        messages: list[dict[str, str]] = []
        for turn in dialogue["messages"]:
            lines = [line["text"].strip() for line in turn if line["text"].strip()]
            if not lines:
                continue
            role = roles.setdefault(turn[0]["sender"], "assistant" if roles else "user")
            if messages and messages[-1]["role"] == role:
                messages[-1]["content"] += "\n" + "\n".join(lines)
            else:
                messages.append({"role": role, "content": "\n".join(lines)})
        if len(messages) > 1:
            yield messages


def main(out: Path) -> None:
    """Write the file, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    with part.open("w", encoding="utf-8") as file:
        found = list(dialogues())
        file.writelines(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in found)
    part.rename(out)
    print(f"{out}: {len(found):,} dialogues, {out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/tutorial.py OUT.jsonl")
    main(Path(sys.argv[1]))
