"""Where a fine-tuned model comes from and what it learns from: what its checkpoints and exports say of it.

The trainer sets `model.origin = Origin(...)` on the module that it gives to the engine, and keeps it up to date. Never
imports transformers: the tokenizer saves itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from runtime.config import Resolved
from runtime.config.finetune import HUB_DATA
from runtime.wire.finetuning import DataReport, Evaluation

ATTRIBUTE = "origin"
"""Attribute of a module that holds its Origin."""
_PRIVATE = ("is_local", "local_files_only", "name_or_path")
"""Keys of tokenizer_config.json that say how a tokenizer was loaded."""
_REPORTED = ("role", "format", "template", "train_on", "rows", "samples", "dropped", "truncated", "tokens")
_REPORTED_TOO = ("trained_tokens", "seq_len", "sequences", "packed", "complete")


@dataclass
class Origin:
    """The base model, tokenizer and data of a fine-tuning run."""

    path: str
    """zerotop.model.path: a folder, as the config has it, or an id on the hub."""
    folder: Path
    """The folder with the base model's files."""
    on_hub: bool = False
    """Whether `path` is an id on the hub."""
    revision: str | None = None
    complete: bool = True
    """Whether all frozen parameters can be read from `folder` again. False if some were made here (new tokens)."""
    tokenizer: Any = None
    """The transformers tokenizer, with the chat template and the tokens that the run uses."""
    data: Sequence[DataReport] = ()
    loss: float | None = None
    """The training loss of the latest step that is known."""
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def public_name(self) -> str:
        """The base model's name for others: its id, or the last part of its path."""
        return self.path if self.on_hub else Path(self.path).name or self.folder.name

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name, chat_template.jinja among them, without how it was loaded."""
        if self.tokenizer is None:
            return {}
        with tempfile.TemporaryDirectory(prefix="zerotop-tokenizer-") as folder:
            self.tokenizer.save_pretrained(folder)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        if (settings := files.get("tokenizer_config.json")) is not None:
            kept = {key: value for key, value in json.loads(settings).items() if key not in _PRIVATE}
            files["tokenizer_config.json"] = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
        return files

    def record(self, config: Resolved, trained_parameters: int) -> dict[str, Any]:
        """What the run is about, for model cards and for finding the base model again. Only `base.folder` may be
        private: it stays in the checkpoint."""
        section = config.zerotop
        optimizer = None if config.optimizer is None else config.optimizer.model_dump(mode="json")
        return {
            "zerotop": _version(),
            "base": {
                "name": self.public_name,
                "on_hub": self.on_hub,
                "revision": self.revision,
                "folder": str(self.folder.absolute()),
            },
            "trained_parameters": trained_parameters,
            "lora": None if section.lora is None else section.lora.model_dump(mode="json"),
            "steps": section.train.steps,
            "seed": section.train.seed,
            "seq_len": section.data.seq_len,
            "global_batch": config.global_batch,
            "world_size": config.world_size,
            "stage": config.stage,
            "precision": config.precision,
            "gradient_clipping": config.gradient_clipping,
            "optimizer": optimizer,
            "scheduler": None if config.scheduler is None else config.scheduler.model_dump(mode="json"),
            "data": [
                {key: getattr(report, key) for key in (*_REPORTED, *_REPORTED_TOO)} | {"files": public_files(report)}
                for report in self.data
            ],
            "loss": self.loss,
            "evaluations": [
                {"step": one.step, "loss": one.loss, "tokens": one.tokens, "samples": one.samples}
                for one in self.evaluations
                if one.loss is not None
            ],
        }


def origin_of(module: nn.Module) -> Origin | None:
    """The Origin of a module, also inside torch.compile's wrapper; None if it has none."""
    found = getattr(getattr(module, "_orig_mod", module), ATTRIBUTE, None)
    return found if isinstance(found, Origin) else None


def public_files(report: DataReport) -> list[str]:
    """The data files of a report without the folders that they are in."""
    return [name if name.startswith((HUB_DATA, "and ")) else Path(name).name for name in report.files]


def _version() -> str:
    try:
        return importlib.metadata.version("zerotop")
    except importlib.metadata.PackageNotFoundError:
        return ""
