"""Everything that can be done before the first rank starts: the model's files, its tokenizer, and the data.

`python -m runtime.trainer.prepare` does it in a process of its own, for `zerotop launch` and `zerotop data`. It reads
{"config": a resolved config, "folder": base of its relative paths} as JSON on stdin, writes progress lines to stderr,
and as its last act one JSON document to stdout: {"reports": [...]}, or {"problems": [...]} with exit code 2. Ranks call
`prepare` themselves, which then finds everything cached.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from runtime.config import ConfigError, Resolved, ZerotopConfig
from runtime.data import DataError
from runtime.data.conversations.prepare import PreparedData, prepare_all
from runtime.models import huggingface
from runtime.models.hub import find_model
from runtime.trainer.build import check_model
from runtime.wire.finetuning import DataReport

Log = Callable[[str], None]


class Ready(NamedTuple):
    """A model's files and its data, before anything is trained."""

    folder: Path
    """The folder with the model's config and weights."""
    config: Any
    """The model's transformers config."""
    tokenizer: Any
    data: PreparedData

    @property
    def reports(self) -> list[DataReport]:
        """What is trained on, and with held-out data what is evaluated on."""
        return [part.report for part in (self.data.train, self.data.evaluation) if part is not None]


def prepare(section: ZerotopConfig, folder: Path, log: Log) -> Ready:
    """Find or download the model of zerotop.model.path, and tokenize its data unless that is cached.

    `folder`: base of relative paths. `log` gets progress lines. Raises ConfigError or DataError, naming the key, for
    anything that cannot be used.
    """
    assert section.model.path is not None
    huggingface.check_installed()
    files = find_model(section.model.path, folder, section.model.revision, log)
    config = huggingface.load_config(files, section.model)
    huggingface.check_positions(config, section.data.seq_len)
    named = section.data.tokenizer
    of_model = named == section.model.path
    tokenizer = huggingface.load_tokenizer(
        files if of_model else find_model(named, folder, None, log), named, section.model.trust_remote_code
    )
    vocabulary = huggingface.vocabulary(config)
    if section.model.new_tokens:
        huggingface.add_tokens(tokenizer, section.model.new_tokens)
        vocabulary = max(vocabulary, len(tokenizer))
    data = prepare_all(section, tokenizer, vocabulary, folder, log)
    if section.data.chat_template is not None:  # prepare_all has read and checked it
        tokenizer.chat_template = (folder / Path(section.data.chat_template).expanduser()).read_text(encoding="utf-8")
    return Ready(files, config, tokenizer, data)


def main() -> int:
    """Prepare what stdin describes; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    answer = os.fdopen(os.dup(1), "w")  # what libraries print must not become part of the document
    os.dup2(2, 1)
    asked = json.load(sys.stdin)
    try:
        config = Resolved.model_validate_json(json.dumps(asked["config"]))
        ready = prepare(config.zerotop, Path(asked["folder"]), _say)
        check_model(config, ready.config, len(ready.tokenizer), ready.folder)
        document: dict[str, Any] = {"reports": [report.model_dump(mode="json") for report in ready.reports]}
    except ConfigError as error:
        document = {"problems": error.problems}
    except DataError as error:
        document = {"problems": [str(error)]}
    except KeyboardInterrupt:
        return 130
    answer.write(json.dumps(document) + "\n")
    answer.flush()
    return 2 if "problems" in document else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
