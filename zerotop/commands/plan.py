"""zerotop plan: what each ZeRO stage takes per GPU and on the host, before anything is started. Never imports torch."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime.config.presets import PRESETS, GPTConfig, ModelError, load_model_config, preset, unit_parameters
from runtime.diagnose.advice import advise
from runtime.plan import Layout, find, plan
from runtime.plan.arithmetic import Arithmetic, arithmetic_of
from runtime.plan.estimate import context_bytes, guess_adapters, guess_shape, guess_units
from runtime.plan.peaks import KNOWN, peak_of
from runtime.plan.pretrained import pretrained
from runtime.plan.workload import Workload, pretrained_workload, workload_document, workload_of
from runtime.wire.sizes import parse_count, parse_size
from zerotop.commands import plan_text
from zerotop.format import count_text, flops_text, ms_text
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
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="where the ranks train (cpu: --gpus counts ranks)"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"the GPUs' name, for bounds on the step time: {', '.join(KNOWN)}"
    )
    parser.add_argument("--vram", metavar="SIZE", help="memory of one GPU, for example 80GiB: what fits?")
    parser.add_argument("--host-ram", metavar="SIZE", help="memory of the host, for example 512GiB: does offload fit?")
    parser.add_argument(
        "--stage", type=int, choices=(0, 1, 2, 3), help="the stage you mean to run (a config has its own)"
    )
    parser.add_argument("--model", metavar="PRESET|COUNT", help="what a script trains, or a model that is not here")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config (repeatable)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Raises CommandError or ConfigError for bad usage."""
    vram_bytes, host_ram_bytes = _size(arguments.vram, "--vram"), _size(arguments.host_ram, "--host-ram")
    if vram_bytes is not None and arguments.device == "cpu":
        raise CommandError("--vram: ranks on the CPU have none; --host-ram SIZE asks whether the host is enough")
    if arguments.gpu is not None and arguments.device == "cpu":
        raise CommandError("--gpu: ranks on the CPU have none")
    if arguments.gpu is not None and peak_of(arguments.gpu) is None:
        raise CommandError(f"--gpu: expected one of {', '.join(KNOWN)}, got {arguments.gpu!r}")
    gpus, gpus_note = _gpus(arguments.gpus, arguments.device)
    overrides = list(arguments.set)
    if arguments.stage is not None:
        overrides.append(f"zero_optimization.stage={arguments.stage}")
    config = _config(arguments.target)
    resolved, left_out = _resolve(config, overrides, gpus, arguments.device)
    named = arguments.model or (None if isinstance(config, str) else arguments.target)
    folder = Path.cwd() if isinstance(config, dict) else Path(config).absolute().parent
    workload, notes = _workload(named, arguments.model is not None, resolved, gpus, vram_bytes, folder)
    layouts = plan(workload)
    chosen = _chosen(layouts, resolved, meant=isinstance(config, str) or arguments.stage is not None)
    arithmetic = arithmetic_of(workload, arguments.gpu)
    advice = advise(workload, layouts, chosen, vram_bytes, host_ram_bytes)
    if arguments.device == "cpu":  # where offload moves nothing
        layouts = [one for one in layouts if one is chosen or not (one.offload or one.offload_parameters)]
    notes = gpus_note + left_out + _defaults(resolved) + notes
    if arguments.json:
        print_json(
            {
                "workload": workload_document(workload),
                "chosen": chosen.label if chosen else None,
                "arithmetic": None if arithmetic is None else dataclasses.asdict(arithmetic),
                "vram_bytes": vram_bytes,
                "host_ram_bytes": host_ram_bytes,
                "layouts": [layout.document() | _verdict(layout, vram_bytes, host_ram_bytes) for layout in layouts],
                "estimated_categories": list(plan_text.ESTIMATED),
                "advice": advice,
                "notes": notes,
            }
        )
    else:
        show(plan_text.render(workload, layouts, chosen, advice, _speed(arithmetic) + notes, vram_bytes), coloured=True)
    return 0


def _speed(arithmetic: Arithmetic | None) -> list[str]:
    """FLOPs per token, and the bounds on the step time where the GPU is known."""
    if arithmetic is None:
        return []
    text = f"Arithmetic: {flops_text(arithmetic.model_flops_per_token)} per token, forward and backward"
    if arithmetic.hardware_flops_per_token > arithmetic.model_flops_per_token:
        text += f" ({flops_text(arithmetic.hardware_flops_per_token)} with the recomputed activations)"
    if arithmetic.gpu is not None and arithmetic.peak_tflops is None:
        return [f"{text}; {arithmetic.gpu} has no matrix units for {arithmetic.precision}, so there is no bound."]
    if arithmetic.gpu is None:
        return [f"{text}; --gpu NAME gives bounds on the step time."]
    return [
        f"{text}. {arithmetic.gpu}, {arithmetic.peak_tflops:g} TFLOPS in {arithmetic.precision}: a step takes at least "
        f"{ms_text(arithmetic.bound_ms)} at 100% MFU, which no GPU reaches, and "
        f"{ms_text(arithmetic.bound_at_40_ms)} at 40%. These are bounds by arithmetic alone, without communication, "
        "offload and data."
    ]


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


def _gpus(given: int | None, device: str) -> tuple[int, list[str]]:
    if given is not None:
        if given < 1:
            raise CommandError(f"--gpus: expected at least 1, got {given}")
        return given, []
    if device == "cpu":
        return 1, ["This is for one rank; --gpus N plans for N."]
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
    near = f"{target}B" if parse_count(f"{target}B") else plan_text.nearest(target, PRESETS)
    hint = f" Did you mean {near}?" if near else ""
    raise CommandError(
        f"{target!r} is no config file, preset or parameter count.{hint} "
        f"Expected a JSON file, one of {', '.join(PRESETS)}, or a count such as 7B"
    )


_OF_NO_WEIGHT = ("autotuning", "curriculum_learning", "data_efficiency", "eigenvalue", "progressive_layer_drop")
"""Sections that no run can have here, and that a plan doesn't depend on."""


def _resolve(
    config: str | dict[str, Any], overrides: list[str], gpus: int, device: Literal["cuda", "cpu"]
) -> tuple[Resolved, list[str]]:
    """The config for so many ranks, and notes on what was left out of it."""
    from runtime.config import ConfigError, load  # pydantic takes longer than all the rest: usage errors come first

    try:
        return load(config, overrides).resolve(gpus, device), []
    except ConfigError as error:
        off = [key for key in _OF_NO_WEIGHT if any(f"{key}: " in problem for problem in error.problems)]
        if not off:
            raise
    resolved = load(config, [*overrides, *(f"{key}.enabled=false" for key in off)]).resolve(gpus, device)
    return resolved, [f"{key}: `zerotop launch` refuses it; it makes no difference to these figures." for key in off]


_ABOUT_MEMORY = ("train_micro_batch_size_per_gpu:", "bf16.", "fp16.", "zero_optimization.")
"""Beginnings of the notes on a config that say what was planned for."""


def _defaults(resolved: Resolved) -> list[str]:
    """What the config leaves open and was filled in."""
    notes = [note for note in resolved.notes if note.startswith(_ABOUT_MEMORY)]
    data = resolved.zerotop.data
    if "seq_len" not in data.model_fields_set:
        notes.append(
            f"zerotop.data.seq_len: {data.seq_len} tokens, the default; --set zerotop.data.seq_len=N plans for another."
        )
    return notes


def _workload(
    named: str | None, stands_in: bool, resolved: Resolved, gpus: int, vram_bytes: int | None, folder: Path
) -> tuple[Workload, list[str]]:
    """The workload, and notes on how it was found. `named`: a preset or a count; None: the config's own model.
    stands_in: it stands for the model of a script, or one that is not here. folder: where the config's relative paths
    start."""
    names_none = any(note.startswith("zerotop.model:") for note in resolved.notes)
    foreign = bool(resolved.zerotop.units) and (stands_in or (named is None and names_none))
    if foreign:
        resolved = resolved.model_copy(update={"zerotop": resolved.zerotop.model_copy(update={"units": None})})
    if named is None and resolved.zerotop.model.path is not None:
        workload, notes = _of_pretrained(resolved, gpus, folder)
    else:
        shape, units, name, notes = _model(named, resolved, resolved.zerotop.data.seq_len)
        guessed = named is not None and parse_count(named) is not None
        workload = dataclasses.replace(workload_of(resolved, name, units, shape, gpus), shape_guessed=guessed)
        if resolved.zerotop.model.path is not None:
            workload = _standing_in(workload, resolved, shape, notes)
    if foreign:
        notes.append("zerotop.units names modules of the script's model; the one that this plans is cut into blocks.")
    if workload.vram_reserve_bytes is not None and workload.device == "cuda":
        if vram_bytes is None:
            notes.append(
                "zerotop.offload.vram_reserve_gib keeps states on the GPU as far as there is room: --vram SIZE says "
                "how much there is. Without it this counts all of them as offloaded."
            )
        else:
            workload = dataclasses.replace(workload, free_vram_bytes=max(0, vram_bytes - context_bytes(gpus)))
    return workload, notes


def _of_pretrained(resolved: Resolved, gpus: int, folder: Path) -> tuple[Workload, list[str]]:
    """The workload of the Hugging Face model of zerotop.model.path."""
    try:
        model = pretrained(resolved, folder)
    except ModelError as error:
        raise CommandError(str(error)) from None
    notes = []
    if model.shape is None:
        notes.append("config.json does not say enough to estimate activations and logits, which count as 0 here.")
    if resolved.zerotop.model.new_tokens:
        notes.append("zerotop.model.new_tokens: this counts a row of the embedding for each.")
    return pretrained_workload(resolved, model, gpus), notes


def _standing_in(workload: Workload, resolved: Resolved, shape: GPTConfig, notes: list[str]) -> Workload:
    """`workload`, of the model that stands for a Hugging Face model that is not here, fine-tuned as the config says."""
    workload = dataclasses.replace(
        workload,
        chunked_loss=resolved.zerotop.model.cross_entropy != "whole",
        offload_activations=resolved.zerotop.model.offload_activations,
    )
    lora = resolved.zerotop.lora
    if lora is None:
        return workload
    notes.append(f"zerotop.lora: this guesses adapters of rank {lora.r} on every linear layer of the blocks.")
    adapters = guess_adapters(shape, lora.r, resolved.persistence_threshold)
    names = dict.fromkeys([*(("small",) if "small" in adapters else ()), *(name for name, _ in workload.units)])
    return dataclasses.replace(
        workload,
        units=tuple((name, adapters.get(name, 0)) for name in names),
        frozen=workload.units,
        arrivals=(),
        trains_head=False,
    )


def _model(
    named: str | None, resolved: Resolved, seq_len: int
) -> tuple[GPTConfig, list[tuple[str, int]], str, list[str]]:
    """Shape, units, name, and what to say about them."""
    count = parse_count(named) if named else None
    if count is not None:
        vocab = COUNT_VOCAB if count > 10 * COUNT_VOCAB * 128 else 320
        shape = guess_shape(count, vocab, seq_len)
        notes = [
            f"The shape behind {count_text(count)} parameters is a guess: {shape.layers} layers of width "
            f"{shape.dim}, {shape.vocab_size:,} tokens. States do not depend on it; activations, logits and buffers do."
        ]
        return shape, guess_units(count, shape), count_text(count), notes
    if named is not None:
        try:
            shape = dataclasses.replace(preset(named.lower()), max_seq_len=seq_len)
        except ModelError:
            expected = f"one of {', '.join(PRESETS)}, or a count such as 7B"
            raise CommandError(f"--model: expected {expected}; got {named!r}") from None
        return shape, _units(shape, resolved), named.lower(), []
    section = resolved.zerotop.model
    tokens, notes = _vocabulary(resolved.zerotop.data.tokenizer, section.preset)
    shape = load_model_config(section, tokens, seq_len)
    if any(note.startswith("zerotop.model:") for note in resolved.notes):
        notes.append(
            f"The config names no model, so this is for the built-in {section.preset}; --model 7B plans for another."
        )
    return shape, _units(shape, resolved), str(section.preset), notes


def _units(shape: GPTConfig, resolved: Resolved) -> list[tuple[str, int]]:
    """As the engine cuts the model under this config."""
    try:
        return unit_parameters(shape, resolved.persistence_threshold, resolved.zerotop.units)
    except ModelError as error:
        raise CommandError(str(error)) from None


def _vocabulary(tokenizer: str, preset_name: str | None) -> tuple[int | None, list[str]]:
    """Tokens of the config's tokenizer; None, and a note, when it is not on this machine."""
    from runtime.config.vocab import count_tokens

    try:
        return count_tokens(tokenizer, Path.cwd()), []
    except (OSError, ValueError):
        missing = f"zerotop.data.tokenizer: cannot read {tokenizer} here"
        return None, [f"{missing}, so this counts {preset_name}'s own vocabulary."]


def _chosen(layouts: list[Layout], resolved: Resolved, meant: bool) -> Layout | None:
    """The layout of the config, where the user `meant` a stage or --set switched offload on; else None."""
    offload, parameters = resolved.offload_optimizer is not None, resolved.offload_param is not None
    return find(layouts, resolved.stage, offload, parameters) if meant or offload or parameters else None
