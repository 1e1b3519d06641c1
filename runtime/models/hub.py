"""Finds a Hugging Face model: a folder, or an id on the hub, whose files are downloaded into its cache."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.config import ConfigError
from runtime.models.gguf import convert, is_gguf
from runtime.wire.sizes import format_size

KEY = "zerotop.model.path"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
"""Files of a model to download: config, tokenizer and weights, in no other format than safetensors."""

Log = Callable[[str], None]


def find_model(path: str, folder: Path, revision: str | None, log: Log) -> Path:
    """The folder with the files of the model `path`: a folder, relative to `folder`, a GGUF file, which is converted
    once, or an id on the hub.

    `log` gets a line about once a second while files are converted or downloaded. Raises ConfigError if there is no
    such model, or it cannot be reached.
    """
    local = Path(folder, Path(path).expanduser())
    if is_gguf(local) and local.exists():
        return convert(local, log)
    if local.is_file():
        raise ConfigError(f"{KEY}: {local} is a file: expected a model's folder, a .gguf file, or an id on the hub")
    if local.is_dir():
        if revision is not None:
            raise ConfigError(f"zerotop.model.revision: {path} is a folder, which has no revisions; leave it out")
        if not (local / "config.json").is_file():
            raise ConfigError(
                f"{KEY}: {local} has no config.json: expected a folder that save_pretrained() or `zerotop export` wrote"
            )
        return local
    if not _ID.fullmatch(path) or path.startswith((".", "~", "/")):
        raise ConfigError(f"{KEY}: there is no folder {local}")
    return _download(path, revision, local, log)


def _download(name: str, revision: str | None, local: Path, log: Log) -> Path:
    from huggingface_hub import errors, snapshot_download

    ask = f"; check the id, or give the path of a folder ({local} does not exist)"
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=_FILES, tqdm_class=_progress_class(name, log))
        )
    except errors.GatedRepoError:
        raise ConfigError(
            f"{KEY}: {name} asks you to accept its terms on huggingface.co first; then log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(f"zerotop.model.revision: {name} has no revision {revision!r}") from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{KEY}: the hub has no model {name}, or it is private and needs `hf auth login`{ask}"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ConfigError(
            f"{KEY}: {name} is not in the cache of huggingface_hub, and the hub cannot be reached (HF_HUB_OFFLINE, or "
            f"no network): download it where there is a network (hf download {name}) and give its folder{ask}"
        ) from None
    except (errors.HFValidationError, OSError, ValueError) as error:
        raise ConfigError(f"{KEY}: {name} could not be downloaded: {_first_line(error)}{ask}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _progress_class(name: str, log: Log) -> type[Any]:
    """A progress bar that writes lines to `log` instead, about one per second."""
    from tqdm.auto import tqdm  # huggingface_hub needs it

    class Progress(tqdm):  # type: ignore[misc]
        said = 0.0

        def __init__(self, *args: Any, **named: Any) -> None:
            named.pop("name", None)  # an argument of huggingface_hub's own class
            super().__init__(*args, **named | {"disable": False, "mininterval": 0.5})

        def display(self, *_args: Any, **_named: Any) -> None:
            now = time.monotonic()
            if self.unit != "B" or not self.total or now - Progress.said < 1.0:
                return
            Progress.said = now
            done = f"{100 * self.n / self.total:.0f}% of {format_size(int(self.total))}"
            rate = self.format_dict.get("rate")
            log(f"downloading {name}: {done}" + (f", {format_size(int(rate))}/s" if rate else ""))

        def clear(self, *_args: Any, **_named: Any) -> None:
            """There is no line on the terminal to clear."""

    return Progress
