"""One peer trains one small GPT on CPUs over Gloo, and rank 0 writes one JSON record of it.

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.peers.bench_train --peer zt2 --dtype bf16

Same seed, same initial weights and same data order for every peer, so losses compare to the last digit that the
precision allows. `compare.py` runs several peers in turn; ../README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.peers.options import CLEAN_STEPS_WANTED, check_run_options, run_options
from benchmarks.peers.trainers import PEERS, Job, Step, join
from benchmarks.peers.workload import GPT, SEED, Batches, Size


@dataclass
class Measured:
    """One rank's figures; seconds per measured step, MiB of resident memory."""

    step_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of every step, warm-up included."""
    other_cpus: list[float] = field(default_factory=list)
    """CPUs that processes other than the ranks kept busy, per step."""
    ranks_cpu_s: list[float] = field(default_factory=list)
    """CPU seconds of all ranks together, per step."""
    rss_model: float = 0.0
    rss_init: float = 0.0
    rss_end: float = 0.0
    rss_peak: float = 0.0


def main() -> None:
    options = parse_options()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    join(options.peer)
    size = Size(options.layers, options.width, options.heads, options.seq, options.mb, options.ga)
    torch.manual_seed(SEED)
    batches = Batches(size, dist.get_rank())
    model = GPT(size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    measured = Measured(rss_model=_memory_mib("VmRSS"))
    _reset_peak_memory()
    job = Job(
        model, batches, size, options.dtype == "bf16", options.lr, options.clip, options.foreach, options.zero_json
    )
    step = PEERS[options.peer](job)
    measured.rss_init = _memory_mib("VmRSS")
    _measure(step, options, measured)
    measured.rss_end, measured.rss_peak = _memory_mib("VmRSS"), _memory_mib("VmHWM")
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, measured)
    if dist.get_rank() == 0:
        record = {"peer": options.peer, "dtype": options.dtype, "tag": options.tag, "params": parameters}
        line = json.dumps(record | _summary(ranks, options.steps, options.clean, size))
        with options.out.open("a") as out:
            out.write(line + "\n")
        print(line, flush=True)
    dist.barrier()
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_train", description=__doc__.splitlines()[0], parents=[run_options()], allow_abbrev=False
    )
    parser.add_argument("--peer", required=True, choices=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, default=Path("train.jsonl"), help="the record is appended here")
    parser.add_argument("--tag", default="", help="a word of yours in the record")
    options = parser.parse_args()
    check_run_options(parser, options)
    return options


def _measure(step: Step, options: argparse.Namespace, measured: Measured) -> None:
    """Step until --steps are done and enough of them were clean, or --max-steps are done.

    The contention meter: the machine's busy CPU seconds minus all ranks' own, per second of the step. Every rank uses
    rank 0's reading, so all stop at the same step.
    """
    dist.barrier()
    done = 0
    while True:
        dist.barrier()
        machine_s, own_s = _machine_cpu_s(), _own_cpu_s()
        began = perf_counter()
        loss, optimizer_s = step(done)
        took = perf_counter() - began
        ranks_s = torch.tensor([_own_cpu_s() - own_s], dtype=torch.float64)
        dist.all_reduce(ranks_s)
        machine_s = _machine_cpu_s() - machine_s
        others = torch.tensor([(machine_s - ranks_s.item()) / took, took], dtype=torch.float64)
        dist.broadcast(others, 0)
        measured.losses.append(loss)
        if done >= options.warm:
            measured.step_s.append(took)
            measured.optimizer_s.append(optimizer_s)
            measured.other_cpus.append(others[0].item())
            measured.ranks_cpu_s.append(ranks_s.item())
        done += 1
        clean = sum(cpus < options.clean for cpus in measured.other_cpus)
        enough = options.clean <= 0 or clean >= CLEAN_STEPS_WANTED or done >= options.max_steps
        if done >= options.steps and enough:
            return


def _summary(ranks: list[Measured], steps: int, clean_below: float, size: Size) -> dict[str, Any]:
    """One record of all ranks: times of the slowest one, memory of each, the mean loss."""
    first = ranks[0]
    clean = [index for index, cpus in enumerate(first.other_cpus) if cpus < clean_below]

    def slowest(figure: Callable[[Measured], float]) -> float:
        return round(max(figure(rank) for rank in ranks), 4)

    def mib(figure: Callable[[Measured], float]) -> list[int]:
        return [round(figure(rank)) for rank in ranks]

    def clean_median(series: Callable[[Measured], list[float]]) -> float | None:
        return slowest(lambda rank: statistics.median(series(rank)[index] for index in clean)) if clean else None

    losses = [round(sum(rank.losses[index] for rank in ranks) / len(ranks), 5) for index in range(steps)]
    clean_step_s = clean_median(lambda rank: rank.step_s)
    median_s = max(statistics.median(rank.step_s) for rank in ranks)
    return {
        "step_s": round(median_s, 4),
        "min_s": slowest(lambda rank: min(rank.step_s)),
        "max_s": slowest(lambda rank: max(rank.step_s)),
        "opt_s": slowest(lambda rank: statistics.median(rank.optimizer_s)),
        "tok_s_rank": round(size.tokens_per_step / (clean_step_s or median_s), 1),
        "peak_rss_mb": mib(lambda rank: rank.rss_peak),
        "base_rss_mb": mib(lambda rank: rank.rss_model),
        "delta_mb": mib(lambda rank: rank.rss_peak - rank.rss_model),
        "init_rss_mb": mib(lambda rank: rank.rss_init),
        "end_rss_mb": mib(lambda rank: rank.rss_end),
        "other_cpus": round(sum(first.other_cpus) / len(first.other_cpus), 2),
        "n_steps": len(first.step_s),
        "n_clean": len(clean),
        "clean_step_s": clean_step_s,
        "clean_opt_s": clean_median(lambda rank: rank.optimizer_s),
        "cpu_s_per_step": round(statistics.median(first.ranks_cpu_s), 3),
        "loss0": losses[0],
        "final_loss": losses[-1],
        "losses": losses,
    }


# ---- the kernel's figures (Linux) ------------------------------------------------------------------------------------
def _memory_mib(name: str) -> float:
    """VmRSS, or VmHWM: the peak since `_reset_peak_memory`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _machine_cpu_s() -> float:
    """CPU seconds since boot in which the machine was neither idle nor waiting for a disk."""
    ticks = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle, iowait = ticks[3], ticks[4]
    return (sum(ticks[:8]) - idle - iowait) / os.sysconf("SC_CLK_TCK")


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        traceback.print_exc()
        # On one line for compare.py, and out at once: an orderly exit could wait for ranks that will never come.
        reason = " ".join(str(error).split()) or "no message"
        print(f"bench_train: error: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    # Everything is written. Gloo's threads now and then abort a process that ends the orderly way (torch 2.13:
    # "terminate called without an active exception"), which would turn a measured run into a failed one.
    os._exit(0)
