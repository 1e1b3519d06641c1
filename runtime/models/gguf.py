"""GGUF files as models to train: each is converted once, by transformers, to a folder with safetensors, config,
tokenizer, chat template and generation config, which is kept in the cache.

Quantized tensors become bf16; files in F32, F16 or BF16 keep their dtype. The conversion takes about as much memory as
the folder is large, beside pages of the file, which the kernel can drop.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from platformdirs.unix import Unix

from runtime.config import ConfigError
from runtime.process.extras import INSTALL_FINETUNING
from runtime.wire.filelock import try_lock, wait_lock

Log = Callable[[str], None]

_FORMAT = b"zerotop gguf 1"
"""Part of the digest: changes when folders that older versions made must not be used any more."""
_MAGIC = b"GGUF"
_DTYPES = {"F32": "float32", "F16": "float16"}
_SHARD_BYTES = 2 << 30
_PROGRESS_S = 3.0


def is_gguf(path: str | Path) -> bool:
    """Whether the path is that of a GGUF file, by its suffix."""
    return Path(path).suffix.lower() == ".gguf"


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/zerotop/models, by default under ~/.cache."""
    return Unix("zerotop", appauthor=False).user_cache_path / "models"


def convert(path: str | Path, log: Log = print, cache: Path | None = None) -> Path:
    """The folder with the model of a GGUF file, which is made if it does not exist yet.

    If several processes call this at once, one converts and the others wait. `log` gets lines about the progress.
    Raises ConfigError for a file that can't be converted and a cache that can't be written."""
    path = Path(path).expanduser().absolute()
    cache = cache or cache_folder()
    try:
        digest = _digest(path)
    except OSError as error:
        raise ConfigError(f"zerotop.model.path: cannot read {path}: {error.strerror or error}") from None
    folder = cache / f"{path.stem}-{digest}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{digest}.lock", log) as alone:
            if not folder.is_dir():
                if alone:
                    for left_over in cache.glob(f"{folder.name}.*.part"):
                        shutil.rmtree(left_over, ignore_errors=True)
                _convert(path, folder, log)
    except OSError as error:
        raise ConfigError(
            f"zerotop.model.path: cannot write the converted model of {path} in {cache}: {error.strerror or error}; "
            "set XDG_CACHE_HOME to a folder with room for it"
        ) from error
    return folder


def _digest(path: Path) -> str:
    """Digest of path, size and modification time. Raises ConfigError if the file is no GGUF file."""
    stat = path.stat()
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ConfigError(f"zerotop.model.path: {path} is not a GGUF file: it does not begin with GGUF")
    made_from = f"\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(_FORMAT + made_from, digest_size=8).hexdigest()


@contextlib.contextmanager
def _lock(path: Path, log: Log) -> Iterator[bool]:
    """Hold the file lock. Yields False if the file system has no locks: then every process converts."""
    with path.open("a") as file:
        locked = try_lock(file.fileno())
        if locked is False:
            log("waiting for another process that is converting the GGUF file")
            wait_lock(file.fileno())
        yield locked is not None


def _convert(path: Path, folder: Path, log: Log) -> None:
    log(f"reading the header of {path.name}")
    with _one_reader(path):
        _convert_parts(path, folder, log)


@contextlib.contextmanager
def _one_reader(path: Path) -> Iterator[None]:
    """transformers makes a GGUFReader for the config, the tokenizer and the tensors, each of which parses the whole
    vocabulary in Python. Inside they are all the same."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:
        raise ConfigError(
            f"zerotop.model.path: {path} is a GGUF file, and reading it takes packages that are not installed: "
            f"{INSTALL_FINETUNING}"
        ) from None
    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(lambda file: original(file))
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _convert_parts(path: Path, folder: Path, log: Log) -> None:
    dtype, numel = _contents(path)
    expected = numel * (4 if dtype == "float32" else 2)
    free = shutil.disk_usage(folder.parent).free
    if free < expected:
        raise ConfigError(
            f"zerotop.model.path: converting {path} takes {expected / 2**30:.1f} GiB in {folder.parent}, where "
            f"{free / 2**30:.1f} GiB are free; set XDG_CACHE_HOME to a folder with room for it"
        )
    part = folder.with_name(f"{folder.name}.{os.uname().nodename}-{os.getpid()}.part")
    part.mkdir()
    try:
        log(f"converting {path.name} to safetensors in {dtype}, {expected / 2**30:.2f} GiB, once")
        process, other = psutil.Process(), _own_bytes(psutil.Process())
        with _quiet(), _progress("reading", lambda: _own_bytes(process) - other, expected, log):
            model, tokenizer = _read(path, dtype)
        with _quiet(), _progress("writing", lambda: _bytes_in(part), expected, log):
            model.save_pretrained(part, max_shard_size=_SHARD_BYTES)
        tokenizer.save_pretrained(part)
        for file in part.iterdir():
            _sync(file)
        part.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    log(f"the model is in {folder}")


def _contents(path: Path) -> tuple[str, int]:
    """(torch dtype to convert to, number of elements) of a GGUF file."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
        split = reader.get_field("split.count")
        parts = int(split.contents()) if split is not None else 1
        numel_by_type: dict[str, int] = {}
        for tensor in reader.tensors:
            kind = tensor.tensor_type.name
            numel_by_type[kind] = numel_by_type.get(kind, 0) + int(tensor.n_elements)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigError(
            f"zerotop.model.path: {path} can't be read as a GGUF file ({error}). If it was cut short, download it again"
        ) from None
    if parts > 1:
        raise ConfigError(
            f"zerotop.model.path: {path} is one of {parts} parts of a GGUF file: join them with "
            "`llama-gguf-split --merge FIRST_PART OUT.gguf`"
        )
    if not numel_by_type:
        raise ConfigError(f"zerotop.model.path: {path} has no tensors; give the GGUF file of a model")
    largest = max(numel_by_type, key=lambda kind: numel_by_type[kind])
    return _DTYPES.get(largest, "bfloat16"), sum(numel_by_type.values())


def _read(path: Path, dtype: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a GGUF file, as transformers reads them."""
    try:
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ConfigError(f"zerotop.model.path: GGUF files need transformers: {INSTALL_FINETUNING}") from None
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    quantization = getattr(transformers, "GgufConfig", None)  # newer versions would keep the weights quantized
    more = {"quantization_config": quantization(dequantize=True)} if quantization is not None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, **more)
    except (ValueError, ImportError, NotImplementedError, KeyError, RuntimeError) as error:
        raise ConfigError(f"zerotop.model.path: transformers can't read {path}: {error}") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would be between the lines of ours."""
    from transformers import modeling_gguf_pytorch_utils as tensors
    from transformers.utils import logging

    shown, bar = logging.is_progress_bar_enabled(), tensors.tqdm  # the latter is tqdm's own
    logging.disable_progress_bar()
    tensors.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        tensors.tqdm = bar
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _progress(what: str, done_bytes: Callable[[], int], expected_bytes: int, log: Log) -> Iterator[None]:
    """Log every few seconds how much of the model has been read or written."""
    done = threading.Event()

    def watch() -> None:
        logged = 0
        while not done.wait(_PROGRESS_S):
            percent = min(int(100 * done_bytes() / expected_bytes), 99)
            if percent > logged:
                log(f"{what} the model: {percent}%")
                logged = percent

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _own_bytes(process: psutil.Process) -> int:
    """The process's memory without pages of files."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
