"""zerotop plan: what each ZeRO stage takes per GPU and on the host, before anything is started. Never imports torch."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.advice import advise
from runtime.estimate import guess_shape, guess_units
from runtime.models.presets import PRESETS, GPTConfig, ModelError, load_model_config, preset, unit_parameters
from runtime.plan import Layout, Workload, find, plan, workload_document
from runtime.sizes import format_count, parse_count, parse_size
from runtime.workload import workload_of
from zerotop.commands import plan_text
from zerotop.output import CommandError, print_json, show

if TYPE_CHECKING:
    from runtime.config import Resolved

COUNT_SEQ_LEN = 2048
"""Sequence length for a bare parameter count."""

COUNT_VOCAB = 50304
"""Vocabulary for a bare parameter count: GPT-2's, padded."""


def register(subparsers: Any) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="say what each ZeRO stage would cost in memory and traffic",
        description="Memory per GPU and on the host, and traffic per step, for every ZeRO stage, against plain data "
        "parallelism.",
    )
    parser.add_argument("target", metavar="CONFIG|PRESET|COUNT", help=f"a config, {', '.join(PRESETS)}, or 7B")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs, one rank each (default: those of this machine, or 1)"
    )
    parser.add_argument("--vram", metavar="SIZE", help="memory of one GPU, for example 80GiB: what fits?")
    parser.add_argument("--host-ram", metavar="SIZE", help="memory of the host, for example 512GiB: does offload fit?")
    parser.add_argument(
        "--stage", type=int, choices=(0, 1, 2, 3), help="the stage you mean to run (a config has its own)"
    )
    parser.add_argument("--model", metavar="PRESET|COUNT", help="what a config with a script of its own trains")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Raises CommandError or ConfigError for bad usage."""
    vram_bytes, host_ram_bytes = _size(arguments.vram, "--vram"), _size(arguments.host_ram, "--host-ram")
    gpus, gpus_note = _gpus(arguments.gpus)
    overrides = list(arguments.set)
    if arguments.stage is not None:
        overrides.append(f"zero_optimization.stage={arguments.stage}")
    config = _config(arguments.target)
    resolved = _resolve(config, overrides, gpus)
    named = arguments.model or (None if isinstance(config, str) else arguments.target)
    workload, notes = _workload(named, resolved, gpus)
    layouts = plan(workload)
    chosen = _chosen(layouts, resolved, meant=isinstance(config, str) or arguments.stage is not None)
    advice = advise(workload, layouts, chosen, vram_bytes, host_ram_bytes)
    notes = gpus_note + notes
    if arguments.json:
        print_json(
            {
                "workload": workload_document(workload),
                "chosen": chosen.label if chosen else None,
                "vram_bytes": vram_bytes,
                "host_ram_bytes": host_ram_bytes,
                "layouts": [layout.document() | _verdict(layout, vram_bytes, host_ram_bytes) for layout in layouts],
                "estimated_categories": list(plan_text.ESTIMATED),
                "advice": advice,
                "notes": notes,
            }
        )
    else:
        show(plan_text.render(workload, layouts, chosen, advice, notes, vram_bytes), coloured=True)
    return 0


def _verdict(layout: Layout, vram_bytes: int | None, host_ram_bytes: int | None) -> dict[str, bool]:
    """Only what was asked for: a key per limit that was given."""
    verdict = {} if vram_bytes is None else {"fits_vram": layout.gpu_bytes <= vram_bytes}
    return verdict if host_ram_bytes is None else verdict | {"fits_host_ram": layout.host_bytes <= host_ram_bytes}


def _size(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise CommandError(f"{option}: {error}") from None


def _gpus(given: int | None) -> tuple[int, list[str]]:
    if given is not None:
        if given < 1:
            raise CommandError(f"--gpus: expected at least 1, got {given}")
        return given, []
    found = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in Path("/dev").glob("nvidia*"))
    return max(1, found), [] if found else ["No GPU here, so this is for one; --gpus N plans for N."]


def _config(target: str) -> str | dict[str, Any]:
    """The path of the config, or a config made up for a preset or a count."""
    config: dict[str, Any] = {"bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    if target.lower() in PRESETS:
        shape = PRESETS[target.lower()]
        return config | {"zerotop": {"model": {"preset": target.lower()}, "data": {"seq_len": shape.max_seq_len}}}
    if parse_count(target) is not None and not Path(target).exists():
        return config | {"zerotop": {"data": {"seq_len": COUNT_SEQ_LEN}}}
    if Path(target).exists() or target.endswith(".json") or "/" in target:
        return target
    near = plan_text.nearest(target, PRESETS)
    hint = f" Did you mean {near}?" if near else ""
    raise CommandError(
        f"{target!r} is no config file, preset or parameter count.{hint} "
        f"Expected a JSON file, one of {', '.join(PRESETS)}, or a count such as 7B"
    )


def _resolve(config: str | dict[str, Any], overrides: list[str], gpus: int) -> Resolved:
    from runtime.config import load  # pydantic takes longer than all the rest; usage errors above need not wait for it

    return load(config, overrides).resolve(gpus, "cuda")


def _workload(named: str | None, resolved: Resolved, gpus: int) -> tuple[Workload, list[str]]:
    """The workload, and notes on how it was found. `named`: a preset or a count; None: the config's own model."""
    shape, units, name, notes = _model(named, resolved, resolved.zerotop.data.seq_len)
    guessed = named is not None and parse_count(named) is not None
    workload = dataclasses.replace(workload_of(resolved, name, units, shape, gpus), shape_guessed=guessed)
    return workload, notes


def _model(
    named: str | None, resolved: Resolved, seq_len: int
) -> tuple[GPTConfig, list[tuple[str, int]], str, list[str]]:
    """Shape, units, name, and what to say about them."""
    count = parse_count(named) if named else None
    if count is not None:
        vocab = COUNT_VOCAB if count > 10 * COUNT_VOCAB * 128 else 320
        shape = guess_shape(count, vocab, seq_len)
        notes = [
            f"The shape behind {format_count(count)} parameters is a guess: {shape.layers} layers of width "
            f"{shape.dim}, {shape.vocab_size:,} tokens. States do not depend on it; activations, logits and buffers do."
        ]
        return shape, guess_units(count, shape), format_count(count), notes
    if named is not None:
        try:
            shape = dataclasses.replace(preset(named.lower()), max_seq_len=seq_len)
        except ModelError:
            expected = f"one of {', '.join(PRESETS)}, or a count such as 7B"
            raise CommandError(f"--model: expected {expected}; got {named!r}") from None
        return shape, unit_parameters(shape, resolved.persistence_threshold), named.lower(), []
    section = resolved.zerotop.model
    if section.path is not None:
        raise CommandError(
            f"zerotop.model.path: {section.path} cannot be planned by name; say how large it is, for example --model 7B"
        )
    tokens, notes = _vocabulary(resolved.zerotop.data.tokenizer, section.preset)
    shape = load_model_config(section, tokens, seq_len)
    if any(note.startswith("zerotop.model:") for note in resolved.notes):
        notes.append(
            f"The config names no model, so this is for the built-in {section.preset}; --model 7B plans for another."
        )
    return shape, unit_parameters(shape, resolved.persistence_threshold), str(section.preset), notes


def _vocabulary(tokenizer: str, preset_name: str | None) -> tuple[int | None, list[str]]:
    """Tokens of the config's tokenizer; None, and a note, when it is not on this machine."""
    from runtime.data.vocab import count_tokens

    try:
        return count_tokens(tokenizer, Path.cwd()), []
    except (OSError, ValueError):
        missing = f"zerotop.data.tokenizer: cannot read {tokenizer} here"
        return None, [f"{missing}, so this counts {preset_name}'s own vocabulary."]


def _chosen(layouts: list[Layout], resolved: Resolved, meant: bool) -> Layout | None:
    """The layout of the config, where the user `meant` a stage or --set switched offload on; else None."""
    offload = resolved.offload_optimizer is not None
    return find(layouts, resolved.stage, offload) if meant or offload else None
