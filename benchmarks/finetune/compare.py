"""Fine-tune one model on the same batches with zerotop and with transformers.Trainer, alone and with DeepSpeed.

    python -m benchmarks.finetune.compare MODEL CHATS.jsonl trainer zt2 zt3 ds2 ds3

Prints for each arm the median step time, tokens per second, peak memory of all ranks beyond what the processes had
before they loaded the model, load time (until the first step could begin, so with the engine), and the largest
difference of a step's loss from the first arm's. `trainer` is one process; every other arm has two ranks. Arms run in
turn, for --rounds rounds; ratios are medians over rounds. The first two steps do not count as step times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.context import ROOT, markdown, measured_on, table

Record = dict[str, Any]
SAMPLE_S = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("data", help="a JSONL file of conversations")
    parser.add_argument("arms", nargs="+", metavar="ARM")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--global-batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--messages", type=int, metavar="N", help="keep the first N messages of each conversation")
    parser.add_argument("--packing", choices=("yes", "no", "both"), default="yes")
    parser.add_argument("--no-packing", action="store_const", dest="packing", const="no")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    ways = {"yes": [True], "no": [False], "both": [True, False]}[options.packing]
    with tempfile.TemporaryDirectory(prefix="zerotop-chats-") as scratch:
        options.data = shortened(Path(options.data), options.messages, Path(scratch) / "chats.jsonl")
        tables: dict[bool, list[dict[str, Record]]] = {packing: [] for packing in ways}
        for packing in ways:
            for number in range(1, options.rounds + 1):
                tables[packing].append({})
                for arm in options.arms:
                    began = time.monotonic()
                    records = tables[packing][-1]
                    records[arm] = run(arm, packing, options)
                    print(
                        f"round {number}/{options.rounds} {'packed' if packing else 'not packed'} {arm}: "
                        f"{step_s(records[arm]):.2f} s a step, loss apart "
                        f"{apart(records[arm], records[options.arms[0]]):.6f} ({time.monotonic() - began:.0f} s)",
                        file=sys.stderr,
                        flush=True,
                    )
                    if options.markdown:  # what there is so far, should the rest be interrupted
                        options.markdown.write_text(page(options, tables))
    print(body(options, tables, pipes=False))
    return 0


def shortened(data: Path, messages: int | None, path: Path) -> Path:
    """The conversations cut after their first `messages` messages, written to `path`; `data` itself if that is None."""
    if messages is None:
        return data
    with data.open(encoding="utf-8") as source, path.open("w", encoding="utf-8") as file:
        for line in source:
            file.write(json.dumps({"messages": json.loads(line)["messages"][:messages]}) + "\n")
    return path


def run(arm: str, packing: bool, options: argparse.Namespace) -> Record:
    """The record of one arm: losses, seconds and tokens of each step, load_s, memory_bytes."""
    ranks = 1 if arm == "trainer" else 2
    with tempfile.TemporaryDirectory(prefix="zerotop-finetune-") as folder:
        out, ready = Path(folder) / "record.json", Path(folder) / "ready"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "benchmarks.finetune.rank", "--arm", arm, "--out", str(out), "--ready", str(ready)]
        command += ["--model", str(Path(options.model).resolve()), "--data", str(Path(options.data).resolve())]
        for name in ("steps", "seq_len", "micro_batch", "global_batch", "lr"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--packing", str(int(packing))]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // ranks))}
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
        log = Path(folder) / "log"
        with log.open("wb") as file:
            torchrun = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **threads, **quiet}, stdout=file, stderr=file
            )
        try:
            memory = watch(torchrun, ready, ranks)
        finally:
            if torchrun.poll() is None:
                torchrun.terminate()  # it ends its ranks
            torchrun.wait()
        if not out.exists():
            sys.exit(f"{arm} failed:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]))
        return {**json.loads(out.read_text()), "memory_bytes": memory}


def watch(torchrun: subprocess.Popen[bytes], ready: Path, ranks: int) -> int:
    """Wait for the end; the peak memory of all ranks (PSS) beyond what they had when each was ready to load."""
    while not all(Path(f"{ready}-{rank}").exists() for rank in range(ranks)):
        if torchrun.poll() is not None:
            return 0
        time.sleep(SAMPLE_S)
    processes = [child for child in psutil.Process(torchrun.pid).children() if _is_rank(child)]
    baseline = sum(map(_pss, processes))
    Path(f"{ready}-go").touch()
    peak = baseline
    while torchrun.poll() is None:
        began = time.monotonic()
        peak = max(peak, sum(map(_pss, processes)))
        time.sleep(max(SAMPLE_S, 20 * (time.monotonic() - began)))  # adding up pages must not slow the ranks down
    return peak - baseline


def _is_rank(process: psutil.Process) -> bool:
    return "benchmarks.finetune.rank" in " ".join(process.cmdline())


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def step_s(record: Record) -> float:
    """The median seconds of a step, without the first two."""
    return statistics.median(record["seconds"][2:])


def apart(record: Record, reference: Record) -> float:
    """The largest difference of a step's loss."""
    return max(abs(mine - theirs) for mine, theirs in zip(record["losses"], reference["losses"], strict=True))


def report(options: argparse.Namespace, rounds: list[dict[str, Record]], pipes: bool) -> str:
    """The table."""
    first = options.arms[0]
    rows = []
    for arm in [arm for arm in options.arms if arm in rounds[0]]:

        def median(value: Callable[[Record], float], arm: str = arm) -> float:
            return statistics.median(value(records[arm]) for records in rounds if arm in records)

        def ratio(value: Callable[[Record], float], arm: str = arm) -> float:
            return statistics.median(
                value(records[arm]) / value(records[first]) for records in rounds if arm in records
            )

        losses = rounds[0][arm]["losses"]
        rows.append(
            [
                arm,
                f"{median(step_s):.2f}",
                f"{median(lambda record: statistics.mean(record['tokens'][2:]) / step_s(record)):.0f}",
                f"{ratio(step_s):.3f}",
                f"{median(lambda record: record['memory_bytes']) / 2**20:,.0f}",
                f"{ratio(lambda record: record['memory_bytes']):.3f}",
                f"{median(lambda record: record['load_s']):.1f}",
                f"{max(apart(records[arm], records[first]) for records in rounds if arm in records):.6f}",
                f"{losses[0]:.4f} -> {losses[-1]:.4f}",
            ]
        )
    header = ["arm", "s/step", "tokens/s", f"time / {first}", "memory MiB", f"memory / {first}", "load s"]
    return table([*header, f"loss - {first}", "loss"], rows, pipes=pipes)


def body(options: argparse.Namespace, tables: dict[bool, list[dict[str, Record]]], pipes: bool) -> str:
    """A table per way of packing."""
    parts = []
    for packing, rounds in tables.items():
        if rounds:
            title = "Packed" if packing else "Not packed"
            parts.append(f"{'## ' if pipes else ''}{title}\n{report(options, rounds, pipes)}")
    return "\n\n".join(parts)


def page(options: argparse.Namespace, tables: dict[bool, list[dict[str, Record]]]) -> str:
    """The Markdown page with the tables so far."""
    context = measured_on("benchmarks.finetune.compare", ("torch", "transformers", "accelerate", "deepspeed"))
    about = (
        f"{options.steps} steps of {options.global_batch} sequences of at most {options.seq_len:,} tokens in "
        f"micro-batches of {options.micro_batch}, all weights in fp32. `trainer` is one process, the others are "
        "two ranks; `..._offload` keeps the optimizer states, at stage 3 also the parameters, in host memory."
    )
    return markdown("Fine-tuning beside transformers.Trainer", context, f"{about}\n\n{body(options, tables, True)}")


if __name__ == "__main__":
    sys.exit(main())
