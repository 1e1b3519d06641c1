"""Run several peers of bench_train.py in turn, round after round, and print one table of ratios.

    python -m benchmarks.peers.compare --dtype bf16 --rounds 2 nocomm ddp ds2 zt2

The ratio is the median over rounds of a peer's step time divided by that round's first peer: name `nocomm` first.
A peer that fails is named with its error; the others go on. ../README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.context import ROOT, markdown, measured_on, table
from benchmarks.peers.options import as_arguments, check_run_options, run_options

Record = dict[str, Any]

RANKS = 2
REFERENCE = "ddp"
"""Whose losses the others' are held against, step by step."""
END_S = 30.0
"""How long torchrun may take to end its ranks when a run is given up."""


class PeerFailed(Exception):
    """One line: why a peer did not run to its end."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[run_options()],
        allow_abbrev=False,
    )
    parser.add_argument("peers", nargs="+", metavar="PEER")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds one run may take")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table here, with what it ran on")
    options = parser.parse_args()
    check_run_options(parser, options)
    if options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {options.rounds}")
    rounds, failures = _run_all(options)
    print(_table(options.peers, rounds, failures, pipes=False))
    if options.json:
        options.json.write_text(json.dumps(rounds, indent=1) + "\n")
    if options.markdown:
        context = measured_on("benchmarks.peers.compare", ("torch", "deepspeed"))
        body = _table(options.peers, rounds, failures, pipes=True)
        options.markdown.write_text(markdown(f"Peers, {options.dtype}, {RANKS} ranks on the CPU", context, body))
    return 1 if failures else 0


def _run_all(options: argparse.Namespace) -> tuple[list[dict[str, Record]], dict[str, str]]:
    """Every round's records by peer, and the last error of each peer that failed."""
    rounds: list[dict[str, Record]] = []
    failures: dict[str, str] = {}
    for number in range(1, options.rounds + 1):
        records: dict[str, Record] = {}
        for peer in options.peers:
            began = time.monotonic()
            try:
                records[peer] = _run(peer, options)
                told = _told(records[peer])
            except PeerFailed as failure:
                failures[peer] = str(failure)
                told = f"failed: {failure}"
            took = time.monotonic() - began
            print(f"round {number}/{options.rounds} {peer}: {told} ({took:.0f} s)", file=sys.stderr, flush=True)
        rounds.append(records)
    return rounds, failures


def _told(record: Record) -> str:
    clean = f"{record['n_clean']} of {record['n_steps']} steps clean"
    return f"{_step_s(record):.3f} s a step, {clean}, loss {record['final_loss']:.5f}"


# ---- one run ---------------------------------------------------------------------------------------------------------
def _run(peer: str, options: argparse.Namespace) -> Record:
    """The record of one run. Raises PeerFailed."""
    with tempfile.TemporaryDirectory(prefix="zerotop-peers-") as folder:
        out = Path(folder) / "record.jsonl"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
        command += ["-m", "benchmarks.peers.bench_train", "--peer", peer, "--dtype", options.dtype, "--out", str(out)]
        # DeepSpeed would look for a GPU and compile its kernels for it.
        settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
        torchrun = subprocess.Popen(
            [*command, *as_arguments(options)],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            errors = torchrun.communicate(timeout=options.timeout)[1]
        except subprocess.TimeoutExpired:
            raise PeerFailed(f"no end after {options.timeout:.0f} s (--timeout)") from None
        finally:
            if torchrun.poll() is None:
                torchrun.terminate()  # torchrun then ends its ranks; a kill would leave them behind
                torchrun.communicate(timeout=END_S)
        if torchrun.returncode or not out.exists():
            raise PeerFailed(_error_line(errors) or f"exit code {torchrun.returncode} without a word")
        record: Record = json.loads(out.read_text())
        return record


def _error_line(text: str) -> str:
    """The error of the rank that failed first; of a rank that could not say it, torchrun's last word on it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.partition("bench_train: error: ")[2] for line in lines if "bench_train: error: " in line]
    signals = [line.removeprefix("traceback : ") for line in lines if line.startswith("traceback : Signal ")]
    return [*said, *signals[-1:], *lines[-1:], ""][0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ---- the table -------------------------------------------------------------------------------------------------------
def _table(peers: list[str], rounds: list[dict[str, Record]], failures: dict[str, str], *, pipes: bool) -> str:
    first = peers[0]
    header = ["peer", "step s", f"x {first}", "clean steps", "cpu s", "opt s", "peak delta MB", "loss", "off ddp"]
    rows = [_row(peer, first, rounds) for peer in peers]
    notes = [f"{peer} failed: {reason}" for peer, reason in failures.items()]
    if pipes:
        notes = [f"- {note}" for note in notes]
    return "\n".join([table(header, rows, pipes=pipes), *(["", *notes] if notes else [])])


def _row(peer: str, first: str, rounds: list[dict[str, Record]]) -> list[str]:
    """Medians over the rounds in which the peer ran; the largest memory peak of all ranks and rounds."""
    records = [records[peer] for records in rounds if peer in records]
    if not records:
        return [peer, "failed", *[""] * 7]
    ratios = [_step_s(done[peer]) / _step_s(done[first]) for done in rounds if peer in done and first in done]
    return [
        peer,
        f"{statistics.median(map(_step_s, records)):.3f}",
        f"{statistics.median(ratios):.3f}" if ratios else "n/a",
        f"{sum(record['n_clean'] for record in records)}/{sum(record['n_steps'] for record in records)}",
        f"{statistics.median(record['cpu_s_per_step'] for record in records):.2f}",
        f"{statistics.median(record['clean_opt_s'] or record['opt_s'] for record in records):.4f}",
        f"{max(max(record['delta_mb']) for record in records)}",
        f"{records[0]['final_loss']:.5f}",
        _off_reference(records[0], rounds),
    ]


def _off_reference(record: Record, rounds: list[dict[str, Record]]) -> str:
    """The largest difference of any step's loss to DDP's (the loss is the mean over the ranks, before the update)."""
    reference = next((records[REFERENCE] for records in rounds if REFERENCE in records), None)
    if reference is None:
        return "n/a"
    return f"{max(abs(a - b) for a, b in zip(record['losses'], reference['losses'], strict=True)):.5f}"


def _step_s(record: Record) -> float:
    """The clean median, or that of all steps where none was clean (the table's `clean steps` tells)."""
    seconds: float = record["clean_step_s"] or record["step_s"]
    return seconds


if __name__ == "__main__":
    sys.exit(main())
