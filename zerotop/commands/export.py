"""zerotop export: a checkpoint as Hugging Face safetensors. Needs torch, so a process of its own does it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Write the weights of a checkpoint as a folder that Hugging Face's libraries read: model.safetensors (in shards with an
index when it is large), config.json, the tokenizer with its chat template, and a model card (README.md) when they are
known. Of a model with peft's LoRA adapters, these alone, as peft reads them, or with --merge the base model with the
adapters added to its weights. Optimizer states stay behind. It takes memory for about one shard, and no GPU."""
_EXAMPLES = """\
examples:
  zerotop export q1 out/                         the newest complete checkpoint of run q1
  zerotop export q1/step-200 out/ --dtype fp16   the one of step 200, in another precision
  zerotop export checkpoints/step-00000200 out/ --shard-size 2GiB
  zerotop export lora1 out/ --merge              adapters and base model in one"""


def register(subparsers: Any) -> None:
    """Add `export` to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint as Hugging Face safetensors",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder, a folder of some, RUN, or RUN/step-100"
    )
    parser.add_argument("out", metavar="OUT", help="a folder that is empty or not there yet")
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="default: auto, the precision that the run computed in",
    )
    parser.add_argument(
        "--shard-size", default="5GiB", metavar="SIZE", help="largest file, and memory taken; default: 5GiB"
    )
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters to the weights of the base model")
    parser.add_argument(
        "--base",
        metavar="FOLDER",
        help="folder with the base model's files, for --merge; default: the one that the run trained from",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it holds an exported model")
    parser.add_argument("--json", action="store_true", help="print what was written as one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Export the checkpoint. Raises CommandError for bad usage and for errors of the export."""
    from runtime.checkpoint.format.manifest import CheckpointError
    from runtime.export.target import check_target
    from runtime.wire.sizes import parse_size
    from zerotop.output import CommandError, print_json, show
    from zerotop.rundir.checkpoints import find_checkpoint

    try:
        shard_bytes = parse_size(arguments.shard_size)
    except ValueError as error:
        raise CommandError(f"--shard-size: {error}") from None
    try:
        checkpoint = find_checkpoint(arguments.checkpoint)
        out = check_target(Path(arguments.out), checkpoint, arguments.overwrite)
    except CheckpointError as error:
        raise CommandError(str(error)) from None
    _check_installed()
    words = [str(checkpoint), str(out), "--dtype", arguments.dtype, "--shard-bytes", str(shard_bytes)]
    words += ["--merge"] if arguments.merge else []
    words += ["--base", str(_base(arguments))] if arguments.base is not None else []
    document = _in_child([*words, *(["--overwrite"] if arguments.overwrite else [])])
    if arguments.json:
        print_json(document)
    else:
        show(_text(document))
    return 0


def _base(arguments: argparse.Namespace) -> Path:
    """The folder that --base names."""
    from zerotop.output import CommandError

    folder = Path(arguments.base).expanduser().resolve()
    if not arguments.merge:
        raise CommandError("--base: it is only read with --merge")
    if not folder.is_dir():
        raise CommandError(f"--base: there is no folder {folder}")
    return folder


def _check_installed() -> None:
    import importlib.util

    from runtime.process.extras import INSTALL_TRAINING
    from zerotop.output import CommandError

    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:  # a top-level name is found without running it
        raise CommandError(f"export needs {' and '.join(missing)}, not installed here: {INSTALL_TRAINING} adds it")


def _in_child(words: Sequence[str]) -> dict[str, Any]:
    """Run the export, whose progress lines go to our stderr; its document. Raises CommandError with its error."""
    from zerotop.launch.child import child_process
    from zerotop.launch.torchrun import with_import_path
    from zerotop.output import CommandError

    command = [sys.executable, "-P", "-m", "runtime.export", *words]
    with child_process(command, with_import_path(dict(os.environ))) as child:
        output, _ = child.communicate()
    try:
        document: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            why = f"it was killed by {name}" + (" (out of memory? try a smaller --shard-size)" * (name == "SIGKILL"))
        elif child.returncode == 130:
            why = "it was interrupted"
        else:
            why = f"see its error above (exit code {child.returncode})"
        raise CommandError(f"nothing was exported: {why}", exit_code=1) from None
    if child.returncode != 0:
        raise CommandError(document["error"], exit_code=child.returncode)
    return document


def _text(document: dict[str, Any]) -> str:
    from zerotop.format import bytes_text, count_text

    files = document["files"]
    weights = [name for name in files if name.endswith(".safetensors")]
    others = [name for name in files if name not in weights and not name.endswith(".index.json")]
    lines = [
        f"{document['out']}: {count_text(document['parameters'])} parameters in {document['dtype']}, "
        f"{bytes_text(document['tensor_bytes'])} in {len(weights)} file{'s' * (len(weights) > 1)}"
        f"{''.join(f', {name}' for name in others)}; step {document['step']} of {document['checkpoint']}"
    ]
    if document["adapters"]:
        lines.append("These are the adapters alone: peft's PeftModel.from_pretrained(base_model, OUT) reads them.")
    elif "config.json" not in others:
        lines.append("The checkpoint knows no config: the model is neither Hugging Face's nor the built-in GPT.")
    return "\n".join(lines)
