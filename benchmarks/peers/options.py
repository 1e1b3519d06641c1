"""The options of a run that bench_train.py has and compare.py passes on."""

from __future__ import annotations

import argparse
import json
from typing import Any

CLEAN_STEPS_WANTED = 10


def run_options() -> argparse.ArgumentParser:
    """For `parents=` of a parser. No name may be the beginning of one of torchrun's: it would take the option."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("the run")
    group.add_argument("--steps", type=int, default=15, help="at least so many optimizer steps")
    group.add_argument("--warm", type=int, default=3, help="steps at the start that are not timed")
    group.add_argument("--max-steps", type=int, default=30, help=f"waiting for {CLEAN_STEPS_WANTED} clean steps ends")
    group.add_argument("--clean", type=float, default=0.10, help="CPUs that others use in a clean step; 0: don't wait")
    group.add_argument("--layers", type=int, default=8)
    group.add_argument("--width", type=int, default=512, help="of the model")
    group.add_argument("--heads", type=int, default=8)
    group.add_argument("--seq", type=int, default=256, help="tokens of a sample")
    group.add_argument("--mb", type=int, default=2, help="samples of a micro-batch")
    group.add_argument("--ga", type=int, default=4, help="micro-batches of a step")
    group.add_argument("--lr", type=float, default=1e-4)
    group.add_argument("--clip", type=float, default=1.0, help="global norm")
    group.add_argument("--foreach", action="store_true", help="torch's AdamW with foreach instead of fused")
    group.add_argument("--zero-json", type=_json_object, default={}, metavar="JSON", help="more for zero_optimization")
    return parser


def check_run_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program with the parser's usage error where nothing could be measured."""
    if not 0 <= options.warm < options.steps:
        parser.error(f"--steps {options.steps} leaves nothing to time after --warm {options.warm}")
    for name in ("layers", "width", "heads", "seq", "mb", "ga"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")


def as_arguments(options: argparse.Namespace) -> list[str]:
    """The run's options among `options`, as command line arguments."""
    arguments = []
    for name in vars(run_options().parse_args([])):
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [flag] if value else []
        else:
            arguments += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value
