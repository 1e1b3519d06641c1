"""zerotop data: what a config trains on, before anything is started. Needs the trainer, so a process of its own reads
the data."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.config import Resolved

_DESCRIPTION = """\
Show what a config trains and evaluates on: files and their format, how many tokens are trained, what is truncated or
dropped, the lengths of samples, and examples as the model sees them, with the tokens marked that the loss counts. What
is prepared here is cached, and `zerotop launch` finds it."""
_EXAMPLES = """\
examples:
  zerotop data finetune.json
  zerotop data finetune.json --set zerotop.data.train_on=all --samples 1
  zerotop data finetune.json --json | jq '.reports[].trained_tokens'"""


def register(subparsers: Any) -> None:
    """Add `data` to the command line."""
    parser = subparsers.add_parser(
        "data",
        help="show what a config trains on",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="a config with zerotop.model.path and zerotop.data.files")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the config, e.g. zerotop.data.seq_len=1024",
    )
    parser.add_argument(
        "--samples", type=_samples, default=3, metavar="N", help="examples to show of each data set; default: 3"
    )
    parser.add_argument("--json", action="store_true", help="print the reports as one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Print the reports. Raises ConfigError for a config or data that cannot be used."""
    from runtime.wire.finetuning import DataReport
    from zerotop.commands.data_text import render_for_stdout
    from zerotop.launch.preparation import prepare
    from zerotop.output import CommandError, print_json, say, show

    resolved = _resolve(arguments.config, arguments.overrides)
    if resolved.zerotop.model.path is None:
        raise CommandError(
            f"{arguments.config}: zerotop.model.path is not set, so it trains the built-in GPT on plain text, every "
            "token of it; `zerotop data` shows the data of a Hugging Face model"
        )
    say("preparing the data")
    folder = Path(os.path.dirname(os.path.abspath(arguments.config)))
    documents = prepare(resolved, folder, arguments.config)["reports"]
    if arguments.json:
        print_json({"reports": documents})
        return 0
    reports = [DataReport.model_validate(document) for document in documents]
    show(render_for_stdout(reports, arguments.samples), coloured=True)
    return 0


def _resolve(config_path: str, overrides: list[str]) -> Resolved:
    """The config, resolved for a number of ranks that its batch sizes fit; the data is the same for every number."""
    from runtime.config import ConfigError, load

    config = load(config_path, overrides)
    micro = (config.train_micro_batch_size_per_gpu or 1) * (config.gradient_accumulation_steps or 1)
    fitting = (config.train_batch_size or micro) // micro
    try:
        return config.resolve(max(1, fitting), "cuda")
    except ConfigError:
        return config.resolve(1, "cuda")


def _samples(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of examples, 0 or more, got {text!r}")
    return int(text)
