"""Offloaded updates beside resident ones, at one rank, in one run.

    python -m benchmarks.offload --preset gpt-small --markdown benchmarks/results/offload.md

Each mode runs in a process of its own, round after round. `tokens/s`, `TFLOPS` and `MFU` count whole optimizer steps,
model FLOPs and the data sheet's peak of the GPU; `peak GiB` is the most that torch had allocated on the GPU, or on a
CPU the most that the process held. `update ms` is what updating all units takes where it is done; `exposed ms` how long
the training thread stands still for it; `hidden` the rest. --svg and --perfetto keep one
step of the mode `offload` as a picture and as a trace. On a GPU box: --device cuda --preset gpt-1.3b.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.context import ROOT, markdown, measured_on, table
from benchmarks.offload.drawing import as_perfetto, as_svg
from benchmarks.offload.modes import MODES, Trainer, job, missing_package
from runtime.config.presets import PRESETS
from runtime.plan.peaks import peak_tflops

DEFAULT = ("resident", "offload", "no-overlap")


def main() -> int:
    parser = argparse.ArgumentParser(prog="offload", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"default {' '.join(DEFAULT)}; of {' '.join(MODES)}")
    parser.add_argument("--preset", default="gpt-small", choices=PRESETS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mb", type=int, default=2, help="samples of a micro-step")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=8, help="timed ones")
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch and of the update (default 1; on a GPU all)")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw one step of `offload`")
    parser.add_argument("--perfetto", type=Path, metavar="FILE", help="its trace, for ui.perfetto.dev")
    parser.add_argument("--one", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.threads = options.threads or (len(os.sched_getaffinity(0)) if options.device == "cuda" else 1)
    options.modes = options.modes or list(DEFAULT)
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown:
        parser.error(f"expected modes of {', '.join(MODES)}; got {', '.join(unknown)}")
    if options.one:
        return _one(options)
    lacking = {mode: package for mode in options.modes if (package := missing_package(mode)) is not None}
    for mode, package in lacking.items():
        print(f"{mode} is left out: {package} is not installed", file=sys.stderr)
    options.modes = [mode for mode in options.modes if mode not in lacking]
    if not options.modes:
        return 2
    rounds, failures = _all(options)
    print(_table(rounds, options))
    for mode, reason in failures.items():
        print(f"{mode} failed: {reason}")
    return 1 if failures else 0


def _table(rounds: list[dict[str, dict[str, Any]]], options: argparse.Namespace, pipes: bool = False) -> str:
    first = options.modes[0]
    header = ["mode", "step ms", f"x {first}", "tokens/s", "TFLOPS", "MFU", "peak GiB"]
    header += ["update ms", "exposed ms", "hidden", "loss"]
    seen = [mode for mode in options.modes if any(mode in records for records in rounds)]
    return table(header, [_row(mode, first, rounds, options) for mode in seen], pipes=pipes)


def _write(rounds: list[dict[str, dict[str, Any]]], failures: dict[str, str], options: argparse.Namespace) -> None:
    """The file of --markdown, as far as it has come."""
    context = measured_on("benchmarks.offload", ("torch", "deepspeed", "torchao"))
    notes = "".join(f"\n- {mode} failed: {reason}" for mode, reason in failures.items())
    title = f"Offload, {options.preset}, bf16, one rank on {_device_name(options.device)}"
    options.markdown.write_text(markdown(title, context, _table(rounds, options, pipes=True) + notes))


def _all(options: argparse.Namespace) -> tuple[list[dict[str, dict[str, Any]]], dict[str, str]]:
    rounds: list[dict[str, dict[str, Any]]] = []
    failures: dict[str, str] = {}
    for number in range(options.rounds):
        records: dict[str, dict[str, Any]] = {}
        rounds.append(records)
        for mode in options.modes:
            with tempfile.TemporaryDirectory(prefix="zerotop-offload-") as folder:
                out = Path(folder) / "record.json"
                given = [word for word in sys.argv[1:] if word not in MODES]
                command = [sys.executable, "-m", "benchmarks.offload", *given, "--one", str(out), mode]
                settings = {"OMP_NUM_THREADS": str(options.threads)}
                done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, stderr=subprocess.PIPE)
                if done.returncode or not out.exists():
                    lines = done.stderr.decode(errors="replace").strip().splitlines()
                    failures[mode] = lines[-1] if lines else f"exit code {done.returncode}"
                else:
                    records[mode] = json.loads(out.read_text())
            if options.markdown:  # what a time-out leaves is kept
                _write(rounds, failures, options)
            seen = f"{records[mode]['step_ms']:.0f} ms a step" if mode in records else "failed"
            print(f"round {number + 1}/{options.rounds} {mode}: {seen}", file=sys.stderr)
    return rounds, failures


def _one(options: argparse.Namespace) -> int:
    mode = options.modes[0]
    work = job(options.preset, options.mb, options.seq, options.device)
    torch.set_num_threads(options.threads)
    os.environ["ZEROTOP_DEVICE"] = options.device
    trainer = MODES[mode](work)
    steps, updates, exposed, loss = [], [], [], 0.0
    for number in range(options.warm + options.steps):
        if trainer.trace is not None:
            trainer.trace.clear()
        if number == options.warm and options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # that of building the model is not a step's
        began = time.perf_counter()
        loss = trainer.step(number)
        if options.device == "cuda":
            torch.cuda.synchronize()
        if number >= options.warm:
            steps.append((time.perf_counter() - began) * 1000)
            if trainer.trace is not None:
                updates.append(trainer.trace.milliseconds("update"))
                exposed.append(_exposed(trainer))
    if mode == "offload":
        _keep(trainer, options, number=options.warm + options.steps)
    record = {"step_ms": statistics.median(steps), "loss": loss, "peak_bytes": _peak_bytes(options.device)}
    if updates:
        record |= {"update_ms": statistics.median(updates), "exposed_ms": statistics.median(exposed)}
    Path(options.one).write_text(json.dumps(record))
    return 0


def _peak_bytes(device: str) -> int:
    """The most that torch allocated on the GPU in the timed steps, or that this process held in memory so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _exposed(trainer: Trainer) -> float:
    """The training thread's waits, and the updates that it does itself."""
    assert trainer.trace is not None
    return trainer.trace.milliseconds("wait", "training") + trainer.trace.milliseconds("update", "training")


def _keep(trainer: Trainer, options: argparse.Namespace, number: int) -> None:
    """From the launch of one update to where the backward of the next micro-step has begun."""
    assert trainer.trace is not None
    trainer.trace.clear()
    trainer.step(number)
    trainer.step(number + 1)
    events = sorted(trainer.trace.events, key=lambda event: event.start_ns)
    begin = next(event.start_ns for event in events if event.kind == "step")
    backward = next(event.start_ns for event in events if event.kind == "backward" and event.start_ns > begin)
    end = backward + (backward - begin) // 10
    shown = [e._replace(end_ns=min(e.end_ns, end)) for e in events if begin <= e.start_ns < end]
    title = f"{options.preset} on {options.device}: the update of every unit beside the next forward"
    if options.svg:
        options.svg.write_text(as_svg(shown, title))
    if options.perfetto:
        options.perfetto.write_text(as_perfetto(shown))


def _row(mode: str, first: str, rounds: list[dict[str, dict[str, Any]]], options: argparse.Namespace) -> list[str]:
    records = [records[mode] for records in rounds if mode in records]
    ratios = [r[mode]["step_ms"] / r[first]["step_ms"] for r in rounds if mode in r and first in r]
    work = job(options.preset, options.mb, options.seq, options.device)
    step_ms = statistics.median(r["step_ms"] for r in records)
    tflops = work.flops / step_ms / 1e9
    peak = peak_tflops(_device_name(options.device), "bf16")
    cells = [
        mode,
        f"{step_ms:.0f}",
        f"{statistics.median(ratios):.3f}" if ratios else "n/a",
        f"{work.tokens / step_ms * 1000:.0f}",
        f"{tflops:.3g}",
        f"{tflops / peak:.0%}" if peak else "n/a",
        f"{max(r['peak_bytes'] for r in records) / 2**30:.2f}",
    ]
    if "update_ms" in records[0]:
        update, exposed = (statistics.median(r[key] for r in records) for key in ("update_ms", "exposed_ms"))
        cells += [f"{update:.1f}", f"{exposed:.1f}", f"{max(0.0, 1 - exposed / update):.0%}"]
    else:
        cells += ["n/a"] * 3
    return [*cells, f"{records[0]['loss']:.5f}"]


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "the CPU"


if __name__ == "__main__":
    sys.exit(main())
