"""Pictures of the screen for the documentation, of real runs of the built-in model on two CPU ranks, and of other
trainers under `zerotop run`.

    python -m benchmarks.pictures docs
    python -m benchmarks.pictures docs --watch           # those of docs/watch.md: trainers that are installed

Each picture is of a run of its own: it is launched, trains some steps, is shown as `zerotop attach` shows it, and is
aborted. Take them on a quiet machine: the first line says what other processes do to the run. Those of verdicts come
from `python -m benchmarks.verdicts.live --pictures docs/verdicts`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.context import ROOT
from zerotop.rundir.directory import RunEntry, find_any_run
from zerotop.source.opening import open_source
from zerotop.tui.app import ZerotopApp

AT_STEP = 12
"""By then a verdict and the means over recent steps are there."""
PATIENCE_S = 600.0
ON_HOST = {"device": "cpu"}


@dataclass(frozen=True)
class Picture:
    """`keys` are pressed before the picture of `size` cells is taken."""

    zero: dict[str, Any]
    keys: tuple[str, ...]
    size: tuple[int, int]
    preset: str = "gpt-tiny"


_OFFLOAD = {"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST}
_MEMORY = ("enter",)
"""A rank's page, which has the memory panel if it is wide enough."""
PICTURES = {
    "memory-stage-2": Picture({"stage": 2}, _MEMORY, (124, 34)),
    "memory-stage-3-offload": Picture(_OFFLOAD, _MEMORY, (124, 34)),
    "memory-peaks": Picture({"stage": 2}, ("2",), (150, 34)),
    "rank": Picture({"stage": 2}, ("enter",), (118, 32)),
}


SCRIPTS = ROOT / "tests" / "integrations" / "scripts"
WATCHED = {
    "ddp": ("torch", "ddp.py", 2),
    "fsdp2": ("torch", "fsdp2.py", 2),
    "transformers": ("transformers", "transformers_trainer.py", 2),
    "accelerate": ("accelerate", "accelerate_loop.py", 2),
    "lightning": ("pytorch_lightning", "lightning_trainer.py", 1),
    "trl": ("trl", "trl_sft.py", 2),
    "deepspeed": ("deepspeed", "deepspeed_engine.py", 2),
}
"""Picture in docs/watch -> package, script and number of ranks."""


def take_watched(name: str, home: Path) -> str:
    """The picture of another trainer, as SVG."""
    _, script, nproc = WATCHED[name]
    zerotop = [sys.executable, "-m", "zerotop"]
    environment = {**os.environ, "STEPS": "100000", "SLOW_MS": "20", "OUT": str(home / name), "OMP_NUM_THREADS": "1"}
    words = [*zerotop, "run", "--nproc", str(nproc), "--name", name, "--detach", str(SCRIPTS / script)]
    subprocess.run(words, cwd=ROOT, check=True, env=environment)
    try:
        return asyncio.run(show(find_any_run(name), Picture({}, (), (124, 34))))
    finally:
        subprocess.run([*zerotop, "abort", name, "--yes"], cwd=ROOT, check=True)


def take(name: str, picture: Picture, folder: Path) -> str:
    """The picture as SVG. `folder` is for the config."""
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "zero_optimization": picture.zero,
        "zerotop": {
            "model": {"preset": picture.preset},
            "data": {"tokenizer": "bytes", "seq_len": 128},
            "train": {"steps": 100_000, "seed": 0},
            "checkpoint": {"interval": 10},
        },
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    zerotop = [sys.executable, "-m", "zerotop"]
    launch = [*zerotop, "launch", str(path), "--nproc", "2", "--device", "cpu", "--name", name, "--detach"]
    subprocess.run(launch, cwd=ROOT, check=True)
    try:
        return asyncio.run(show(find_any_run(name), picture))
    finally:
        subprocess.run([*zerotop, "abort", name, "--yes"], cwd=ROOT, check=True)


async def show(entry: RunEntry, picture: Picture) -> str:
    """The screen on the run once it has trained for a while, as SVG. Raises TimeoutError if it does not."""
    source = open_source(entry)
    try:
        app = ZerotopApp(source, read_only=True)
        async with app.run_test(size=picture.size) as pilot:
            deadline = time.monotonic() + PATIENCE_S
            while source.state.step < AT_STEP or source.state.verdict is None:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{entry.name} is at step {source.state.step} after {PATIENCE_S:g} s")
                await pilot.pause(0.2)
            for key in picture.keys:
                await pilot.press(key)
            await pilot.pause(1.0)  # some ticks of the screen
            return app.export_screenshot(title=f"zerotop attach {entry.name}")
    finally:
        source.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where to save them")
    parser.add_argument("--only", choices=PICTURES, help="one of them")
    parser.add_argument("--watch", action="store_true", help="those of other trainers, into FOLDER/watch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="zerotop-pictures-") as home:
        os.environ["XDG_STATE_HOME"] = home
        if options.watch:
            for name, (package, _, _) in WATCHED.items():
                if importlib.util.find_spec(package) is None:
                    print(f"{name}: {package} is not installed", file=sys.stderr)
                    continue
                (options.folder / "watch").mkdir(exist_ok=True)
                (options.folder / "watch" / f"{name}.svg").write_text(take_watched(name, Path(home)), encoding="utf-8")
                print(f"{options.folder / 'watch' / name}.svg", file=sys.stderr)
            return 0
        for name, picture in PICTURES.items():
            if options.only in (None, name):
                (options.folder / f"{name}.svg").write_text(take(name, picture, Path(home)), encoding="utf-8")
                print(f"{options.folder / name}.svg", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
