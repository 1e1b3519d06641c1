"""Prepares a fine-tuning run in a process of the trainer's, before anything of the run exists: the model's files are
found or downloaded, and its data is tokenized."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from runtime.config import ConfigError, Resolved
from runtime.process.extras import INSTALL_FINETUNING
from zerotop.launch.child import child_process
from zerotop.launch.torchrun import with_import_path
from zerotop.rundir.paths import RunError


def prepare(resolved: Resolved, folder: Path, origin: str = "") -> dict[str, Any]:
    """{"reports": [...]}: what is trained and evaluated on, as JSON of runtime.wire.messages.DataReport.

    `folder`: base of the config's relative paths. Progress lines go to stderr. Raises ConfigError, with the config's
    name `origin`, for a model or data that cannot be used; RunError if the process fails in another way.
    """
    missing = [name for name in ("torch", "transformers", "datasets") if importlib.util.find_spec(name) is None]
    if missing:  # a top-level name is found without running it
        raise ConfigError(
            f"zerotop.model.path: a Hugging Face model needs {', '.join(missing)}, not installed here: "
            f"{INSTALL_FINETUNING}",
            origin,
        )
    command = [sys.executable, "-P", "-m", "runtime.trainer.prepare"]
    asked = {"config": resolved.model_dump(mode="json"), "folder": str(folder)}
    with child_process(command, with_import_path(dict(os.environ)), stdin=subprocess.PIPE) as child:
        output, _ = child.communicate(json.dumps(asked).encode())
    try:
        document: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        why = f"see its error above (exit code {child.returncode})"
        if child.returncode < 0:
            why = f"it was killed by {signal.Signals(-child.returncode).name}"
        raise RunError(f"model and data could not be prepared: {why}") from None
    if "problems" in document:
        raise ConfigError(document["problems"], origin)
    return document
