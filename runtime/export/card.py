"""README.md of an exported model: what was trained, from what, on what, and with which figures. A model card in the
format of the Hugging Face hub: YAML front matter, then Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from runtime.config.finetune import HUB_DATA

CARD = "README.md"
_HYPER = ("global_batch", "seq_len", "gradient_clipping", "precision", "seed", "world_size", "stage")


def model_card(record: bytes, step: int, kind: str) -> bytes | None:
    """The card for training.json of a checkpoint at `step`; None if it was not written by zerotop.

    kind: "adapters", "merged" or "full", which says what the export holds.
    """
    try:
        document = json.loads(record)
        return "\n".join(_card(document, step, kind)).encode() + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _card(record: dict[str, Any], step: int, kind: str) -> Iterator[str]:
    base, lora = record["base"], record["lora"]
    hub = sorted({_hub_name(name) for data in record["data"] for name in data["files"] if name.startswith(HUB_DATA)})
    yield "---"
    if base["on_hub"]:
        yield f"base_model: {json.dumps(base['name'])}"
        yield f"base_model_relation: {'adapter' if kind == 'adapters' else 'finetune'}"
    if kind == "adapters":
        yield "library_name: peft"
    else:
        yield "library_name: transformers"
    yield "pipeline_tag: text-generation"
    if hub:
        yield "datasets:"
        yield from (f"- {json.dumps(name)}" for name in hub)
    yield "tags:"
    yield from (f"- {tag}" for tag in ("zerotop", *(("lora",) if lora or kind != "full" else ())))
    yield "---"
    yield ""
    name = f"[{base['name']}](https://huggingface.co/{base['name']})" if base["on_hub"] else f"`{base['name']}`"
    what = {"adapters": "LoRA adapters for", "merged": "LoRA adapters merged into", "full": "A fine-tuned version of"}
    yield f"# {base['name'].rpartition('/')[2]}, fine-tuned"
    yield ""
    revision = f" (revision {base['revision']})" if base["revision"] else ""
    version = f" {record['zerotop']}" if record["zerotop"] else ""
    planned = f" of {record['steps']:,}" if record["steps"] else ""
    yield f"{what[kind]} {name}{revision}, trained for {step:,}{planned} steps with zerotop{version}."
    yield ""
    yield from _data(record)
    yield from _training(record)
    yield from _evaluation(record)


def _data(record: dict[str, Any]) -> Iterator[str]:
    if not record["data"]:
        return
    yield "## Data"
    yield ""
    yield "| | files | format | rows | samples | tokens | trained tokens |"
    yield "|---|---|---|--:|--:|--:|--:|"
    for data in record["data"]:
        files = ", ".join(f"`{name}`" for name in data["files"])
        counts = " | ".join(f"{data[key]:,}" for key in ("rows", "samples", "tokens", "trained_tokens"))
        more = "" if data["complete"] else " (first segment)"
        yield f"| {data['role']}{more} | {files} | {data['format']} | {counts} |"
    yield ""
    train = record["data"][0]
    trained_on = {"assistant": "the assistant's turns", "completion": "completions", "all": "all tokens"}
    packed = ", several samples packed into each" if train["packed"] else ""
    yield (
        f"The loss counts {trained_on.get(train['train_on'], train['train_on'])}. Sequences have up to "
        f"{train['seq_len']:,} tokens{packed}; {train['truncated']:,} samples were truncated and "
        f"{sum(train['dropped'].values()):,} rows left out."
    )
    yield ""


def _training(record: dict[str, Any]) -> Iterator[str]:
    yield "## Training"
    yield ""
    yield "| setting | value |"
    yield "|---|---|"
    if lora := record["lora"]:
        targets = lora["target_modules"]
        named = targets if isinstance(targets, str) else ", ".join(targets)
        yield f"| LoRA | r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, on {named} |"
    yield f"| trained parameters | {record['trained_parameters']:,} |"
    for section in ("optimizer", "scheduler"):
        if record[section]:
            params = ", ".join(f"{key} {_short(value)}" for key, value in _set(record[section]))
            yield f"| {section} | {record[section]['type']}{': ' + params if params else ''} |"
    names = {"global_batch": "sequences per step", "seq_len": "sequence length", "world_size": "ranks"}
    for key in _HYPER:
        yield f"| {names.get(key, key.replace('_', ' ').replace('stage', 'ZeRO stage'))} | {_short(record[key])} |"
    yield ""
    if record["loss"] is not None:
        yield f"Training loss at the end: {record['loss']:.4f}."
        yield ""


def _evaluation(record: dict[str, Any]) -> Iterator[str]:
    found = record["evaluations"]
    if not found:
        return
    yield "## Evaluation"
    yield ""
    yield "Mean cross-entropy per trained token of held-out data, in nats."
    yield ""
    yield "| step | loss |"
    yield "|--:|--:|"
    shown = found if len(found) <= 12 else [*found[:1], *found[-11:]]
    best = min(one["loss"] for one in found)
    yield from (f"| {one['step']:,} | {one['loss']:.4f}{' (best)' if one['loss'] == best else ''} |" for one in shown)
    yield ""


def _set(section: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parameters of an optimizer or scheduler that have a value, of nested sections, too."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _set(value)
        elif key != "type" and value is not None and not isinstance(value, bool):
            yield key, value


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(map(_short, value)) if isinstance(value, list | tuple) else str(value)


def _hub_name(name: str) -> str:
    """OWNER/NAME of hf://datasets/OWNER/NAME/..."""
    return "/".join(name.removeprefix(HUB_DATA).split("/")[:2])
