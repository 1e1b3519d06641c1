"""Fine-tune one model on the same batches with zerotop and with transformers.Trainer, alone and with DeepSpeed.

    python -m benchmarks.finetune.compare MODEL CHATS.jsonl trainer zt2 zt3 ds2 ds3

Prints for each arm the median step time, tokens per second, peak memory of all ranks beyond what the processes had
before they loaded the model, load time, and the largest difference of a step's loss from the first arm's. `trainer`
is one process; every other arm has two ranks. Arms run in turn, for --rounds rounds; ratios are medians over rounds.
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
    parser.add_argument("--no-packing", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    rounds: list[dict[str, Record]] = []
    for number in range(1, options.rounds + 1):
        records: dict[str, Record] = {}
        for arm in options.arms:
            began = time.monotonic()
            records[arm] = run(arm, options)
            step_s = statistics.median(records[arm]["seconds"][2:])
            print(
                f"round {number}/{options.rounds} {arm}: {step_s:.2f} s a step ({time.monotonic() - began:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
        rounds.append(records)
    print(report(options, rounds, pipes=False))
    if options.markdown:
        context = measured_on("benchmarks.finetune.compare", ("torch", "transformers", "accelerate", "deepspeed"))
        options.markdown.write_text(
            markdown("Fine-tuning beside transformers.Trainer", context, report(options, rounds, pipes=True))
        )
    return 0


def run(arm: str, options: argparse.Namespace) -> Record:
    """The record of one arm: losses, seconds of each step, load_s, memory_bytes."""
    ranks = 1 if arm == "trainer" else 2
    with tempfile.TemporaryDirectory(prefix="zerotop-finetune-") as folder:
        out, ready = Path(folder) / "record.json", Path(folder) / "ready"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += ["-m", "benchmarks.finetune.rank", "--arm", arm, "--out", str(out), "--ready", str(ready)]
        command += ["--model", str(Path(options.model).resolve()), "--data", str(Path(options.data).resolve())]
        for name in ("steps", "seq_len", "micro_batch", "global_batch", "lr"):
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        command += ["--packing", str(int(not options.no_packing))]
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
        peak = max(peak, sum(map(_pss, processes)))
        time.sleep(SAMPLE_S)
    return peak - baseline


def _is_rank(process: psutil.Process) -> bool:
    return "benchmarks.finetune.rank" in " ".join(process.cmdline())


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def report(options: argparse.Namespace, rounds: list[dict[str, Record]], pipes: bool) -> str:
    """The table."""
    tokens = options.global_batch * options.seq_len
    first = options.arms[0]
    rows = []
    for arm in options.arms:
        steps = [statistics.median(records[arm]["seconds"][2:]) for records in rounds]
        ratio = statistics.median(
            statistics.median(records[arm]["seconds"][2:]) / statistics.median(records[first]["seconds"][2:])
            for records in rounds
        )
        apart = max(
            abs(mine - theirs)
            for records in rounds
            for mine, theirs in zip(records[arm]["losses"], records[first]["losses"], strict=True)
        )
        step_s = statistics.median(steps)
        rows.append(
            [
                arm,
                f"{step_s:.2f}",
                f"{tokens / step_s:.0f}",
                f"{ratio:.3f}",
                f"{statistics.median(records[arm]['memory_bytes'] for records in rounds) / 2**20:,.0f}",
                f"{statistics.median(records[arm]['load_s'] for records in rounds):.1f}",
                f"{apart:.5f}",
                f"{rounds[0][arm]['losses'][0]:.4f} -> {rounds[0][arm]['losses'][-1]:.4f}",
            ]
        )
    header = ["arm", "s/step", "tokens/s", f"time / {first}", "memory MiB", "load s", f"loss - {first}", "loss"]
    return table(header, rows, pipes=pipes)


if __name__ == "__main__":
    sys.exit(main())
