"""The losses of transformers.Trainer on one process and of zerotop at every stage on two ranks, on the same batches.

    python -m benchmarks.finetune.parity MODEL CHATS.jsonl --records parity.jsonl --markdown FILE

All arms of one kind run in one launch, one after the other; compare.py measures time and memory. Every arm's losses are
added to the file of records as soon as there are any, and an interrupted run goes on from there. Exit code 1 if a loss
differs by more than --tolerance.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.context import ROOT, markdown, measured_on, table
from benchmarks.finetune.compare import apart, shortened

ARMS = ["zt2", "zt3", "zt2_offload", "zt3_offload", "zt0", "zt1", "zt0_offload", "zt1_offload"]
_FROM_PARENT = ("model", "steps", "seq_len", "micro_batch", "global_batch", "lr")
Key = tuple[str, bool]
"""(arm, whether sequences are packed)"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="parity", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help="a model's folder, or a GGUF file")
    parser.add_argument("data", help="a JSONL file of conversations")
    parser.add_argument("--records", type=Path, required=True, help="file for the losses of every arm")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--messages", type=int, default=2, help="messages of each conversation that are kept")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--global-batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--tolerance", type=float, default=0.002)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--only-report", action="store_true", help="train nothing: the table of the records so far")
    parser.add_argument("--rank-of", choices=("trainer", "zerotop"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        return _rank(options)
    with tempfile.TemporaryDirectory(prefix="zerotop-chats-") as scratch:
        kinds = [] if options.only_report else [("trainer", 1), ("zerotop", 2)]
        chats = shortened(Path(options.data), options.messages, Path(scratch) / "chats.jsonl")
        for kind, ranks in kinds:
            _launch(kind, ranks, chats, options)
    records = read(options.records)
    print(report(records, pipes=False))
    if options.markdown:
        context = measured_on("benchmarks.finetune.parity", ("torch", "transformers", "accelerate"))
        about = (
            f"{options.steps} steps of {options.global_batch} sequences of at most {options.seq_len:,} tokens, of "
            f"conversations cut after {options.messages} messages; all weights trained in fp32 with AdamW. The largest "
            "difference of any step's loss from that of `trainer`, transformers.Trainer on one process; the others are "
            "zerotop at stages 0 to 3 on two ranks. `..._offload` keeps the optimizer states in host memory, at stage "
            "3 also the parameters."
        )
        page = markdown("Losses of transformers.Trainer", context, f"{about}\n\n{report(records, pipes=True)}")
        options.markdown.write_text(page)
    found = [difference(records, key) for key in records]
    return int(any(one is not None and one > options.tolerance for one in found))


def _launch(kind: str, ranks: int, chats: Path, options: argparse.Namespace) -> None:
    if not _missing(kind, read(options.records)):
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "benchmarks.finetune.parity", str(Path(options.model).resolve()), str(chats)]
    command += ["--records", str(options.records.resolve()), "--rank-of", kind]
    for name in _FROM_PARENT[1:]:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{kind} failed")


def read(path: Path) -> dict[Key, dict[str, Any]]:
    """The records so far."""
    if not path.exists():
        return {}
    found = map(json.loads, path.read_text().splitlines())
    return {(record["arm"], record["packed"]): record for record in found}


def _missing(kind: str, records: dict[Key, dict[str, Any]]) -> list[Key]:
    arms = ["trainer"] if kind == "trainer" else ARMS
    return [key for arm in arms for packed in (True, False) if (key := (arm, packed)) not in records]


def _rank(options: argparse.Namespace) -> int:
    """Train the arms of one kind that the records lack; rank 0 writes them."""
    import torch

    from benchmarks.finetune.rank import settings, train_transformers, train_zerotop

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    train = train_transformers if options.rank_of == "trainer" else train_zerotop
    for arm, packed in _missing(options.rank_of, read(options.records)):
        with tempfile.TemporaryDirectory(prefix="zerotop-parity-") as scratch:
            options.arm, options.packing, options.ready, options.out = arm, packed, None, f"{scratch}/out"
            record = train(options, settings(options))
        gc.collect()
        if int(os.environ["RANK"]) == 0:
            with options.records.open("a") as file:
                file.write(json.dumps({"arm": arm, "packed": packed, "losses": record["losses"]}) + "\n")
            print(f"{arm}, {'packed' if packed else 'not packed'}: {record['losses'][-1]:.4f}", file=sys.stderr)
    os._exit(0)  # without the libraries' farewells


def difference(records: dict[Key, dict[str, Any]], key: Key) -> float | None:
    """The largest difference of a step's loss from the trainer's; None if one of them has not been trained."""
    reference = records.get(("trainer", key[1]))
    return None if key not in records or reference is None else apart(records[key], reference)


def report(records: dict[Key, dict[str, Any]], pipes: bool) -> str:
    """A row per arm."""
    rows = []
    for arm in ["trainer", *sorted(ARMS)]:
        cells = [arm]
        for packed in (True, False):
            apart_by = difference(records, (arm, packed))
            losses = records[arm, packed]["losses"] if (arm, packed) in records else []
            cells.append("not measured" if apart_by is None else f"{apart_by:.6f}")
            cells.append(f"{losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "")
        rows.append(cells)
    return table(["arm", "packed: difference", "loss", "not packed: difference", "loss"], rows, pipes=pipes)


if __name__ == "__main__":
    sys.exit(main())
