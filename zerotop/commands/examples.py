"""Examples in the help of commands that have none of their own."""

from __future__ import annotations

import argparse

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "zerotop                                        the runs here; Enter opens one",
        "zerotop launch config.json                     train, and watch",
        "zerotop attach user@gpu-box                    watch a run on another machine, over SSH",
        "zerotop plan config.json --gpus 8 --vram 80GiB what fits, at which ZeRO stage",
    ),
    "launch": (
        "zerotop launch config.json --nproc 4",
        "zerotop launch config.json --set zerotop.train.steps=50 --name try --detach",
        "zerotop launch --resume --name try",
        "zerotop launch config.json -- train.py --my-argument",
    ),
    "attach": ("zerotop attach", "zerotop attach q1 --read-only", "zerotop attach user@gpu-box:q1"),
    "ls": ("zerotop ls", "zerotop ls user@gpu-box", "zerotop ls --json | jq '.[].name'"),
    "status": ("zerotop status", "zerotop status q1 --json"),
    "logs": ("zerotop logs q1 -f", "zerotop logs q1 --rank 1"),
    "stream": ("zerotop stream q1", "zerotop stream q1 --from-start --kind step | jq .loss"),
    "pause": ("zerotop pause q1", "zerotop pause q1 --release    and give the GPU's memory back"),
    "resume": ("zerotop resume q1",),
    "checkpoint": ("zerotop checkpoint q1 --wait",),
    "set": ("zerotop set q1 lr_factor=0.5", "zerotop set q1 log_interval=1 log_level=debug"),
    "stop": ("zerotop stop q1",),
    "abort": ("zerotop abort q1 --yes",),
    "stacks": ("zerotop stacks q1", "zerotop stacks q1 --rank 1 --native"),
    "profile": ("zerotop profile q1 --steps 3",),
    "trace": ("zerotop trace q1 --last 5m", "zerotop trace q1 out.json.gz --steps 100:120"),
    "snapshot": ("zerotop snapshot q1",),
    "report": ("zerotop report q1",),
    "plan": ("zerotop plan config.json --gpus 8 --vram 80GiB", "zerotop plan 7B --gpus 8"),
    "doctor": ("zerotop doctor", "zerotop doctor --json"),
}
"""Command -> lines of examples; "": of zerotop itself."""


class ExamplesFormatter(argparse.HelpFormatter):
    """Fills paragraphs, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        before, mark, examples = text.partition("examples:\n")
        filled = super()._fill_text(before, width, indent) if before.strip() else ""
        return filled + ("\n\n" if filled and mark else "") + mark + examples


def add_examples(parser: argparse.ArgumentParser, command: str) -> None:
    """Add the examples of `command` to the help of its parser, unless that has some."""
    if command not in EXAMPLES or "examples:" in (parser.epilog or ""):
        return
    lines = "\n".join(f"  {line}" for line in EXAMPLES[command])
    parser.epilog = f"{parser.epilog or ''}\n\nexamples:\n{lines}".strip()
    if parser.formatter_class is argparse.HelpFormatter:
        parser.formatter_class = ExamplesFormatter
