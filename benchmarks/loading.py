"""How long a transformers model takes to load at stage 3, and how much host memory all ranks together take for it.

    python -m benchmarks.loading --markdown benchmarks/results/loading.md

Four ranks, one thread each, with engines that only evaluate: they hold the shards in bf16, the dtype of the files, and
nothing else. Random models are made on the fly. Memory is the sum of the ranks' PSS (pages that several processes share
count once), sampled from the outside, minus that sum after every rank has imported all it needs. It is measured until
the engine is ready; the files are in the page cache, and pages that a rank has mapped count.
"""

from __future__ import annotations

import argparse
import gc
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

WAYS = {
    "init-weights": "zero.Init(weights=FOLDER), from_config",
    "init": "zero.Init(), from_pretrained",
    "everywhere": "from_pretrained on every rank",
    "copies": "from_pretrained on every rank, no engine",
}
MODELS = ("llama", "mixtral")
_SAMPLE_S = 0.02


def _config(kind: str, layers: int) -> Any:
    from transformers import LlamaConfig, MixtralConfig

    sizes = {"hidden_size": 1024, "num_hidden_layers": layers, "num_attention_heads": 16, "vocab_size": 32000}
    if kind == "llama":
        return LlamaConfig(**sizes, num_key_value_heads=4, intermediate_size=4096, tie_word_embeddings=False)
    return MixtralConfig(**sizes, num_key_value_heads=4, intermediate_size=1024, num_local_experts=8)


def _make(kind: str, layers: int, folder: Path) -> int:
    """Save a random model in bf16, in shards; the bytes of its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(kind, layers), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _rank(way: str, folder: str) -> None:
    """Says "ready" and the process id, waits for a line, loads, and says how long that took."""
    import torch
    import torch.distributed as dist

    import runtime

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    first = AutoModelForCausalLM.from_config(type(config)(**{**config.to_dict(), **tiny}), dtype=torch.bfloat16)
    runtime.initialize(model=first, config=settings)[0].destroy()  # everything is imported and connected
    del first
    gc.collect()
    dist.barrier()
    print("ready", os.getpid(), flush=True)
    sys.stdin.readline()
    dist.barrier()
    began = time.perf_counter()
    if way == "init-weights":
        with runtime.zero.Init(weights=folder, dtype=torch.bfloat16):
            model = AutoModelForCausalLM.from_config(config)
    elif way == "init":
        with runtime.zero.Init():
            model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    if way == "copies":  # transformers leaves the parameters in the mapped files, until something is written to them
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    else:
        engine = runtime.initialize(model=model, config=settings)[0]
        assert all(parameter.dtype == torch.bfloat16 for parameter in engine.module.parameters())
    dist.barrier()
    print("loaded", time.perf_counter() - began, flush=True)
    sys.stdin.readline()
    dist.destroy_process_group()


def _pss_bytes(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) << 10
    return total


def _measure(way: str, folder: Path, world: int) -> dict[str, float]:
    """Seconds to load, and peak and final bytes above the baseline, of all ranks together."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    common |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    words = [sys.executable, "-m", "benchmarks.loading", "--rank-of", way, "--folder", str(folder)]
    ranks = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        pids = [int(_line(rank, "ready")) for rank in ranks]
        baseline = _pss_bytes(pids)
        _go_on(ranks)
        for rank in ranks:
            os.set_blocking(_fileno(rank), False)
        peak = baseline
        seconds: dict[int, float] = {}
        while len(seconds) < world:
            now = _pss_bytes(pids)
            peak = max(peak, now)
            for number, rank in enumerate(ranks):
                if rank.poll() is not None:
                    raise RuntimeError(f"rank {number} ended with code {rank.returncode}")
                if number not in seconds and (text := rank.stdout.readline() if rank.stdout else ""):
                    seconds[number] = float(text.split()[1])
            time.sleep(_SAMPLE_S)
        final = _pss_bytes(pids)
        _go_on(ranks)
        for rank in ranks:
            rank.wait(60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return {"seconds": max(seconds.values()), "peak": float(peak - baseline), "final": float(final - baseline)}


def _fileno(rank: subprocess.Popen[str]) -> int:
    assert rank.stdout is not None
    return rank.stdout.fileno()


def _line(rank: subprocess.Popen[str], word: str) -> str:
    assert rank.stdout is not None
    for text in rank.stdout:
        if text.startswith(word):
            return text.split()[1]
    raise RuntimeError(f"a rank ended before it said {word!r}")


def _go_on(ranks: list[subprocess.Popen[str]]) -> None:
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()


def main() -> None:
    """Measure all ways in turns and print, or write, a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--rank-of", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        _rank(options.rank_of, options.folder)
        return
    rows, measured = [], []
    for kind in options.models:
        with tempfile.TemporaryDirectory(prefix="zerotop-loading-") as folder:
            weights = _make(kind, options.layers, Path(folder))
            gc.collect()
            rounds = [
                {way: _measure(way, Path(folder), options.world) for way in options.ways} for _ in range(options.rounds)
            ]
        for way in options.ways:
            median = {name: statistics.median(one[way][name] for one in rounds) for name in rounds[0][way]}
            highest = max(one[way]["peak"] for one in rounds)
            measured.append({"model": kind, "way": way, "weights_bytes": weights, "highest_peak": highest, **median})
            rows.append(
                [
                    f"{kind}, {weights / 2**30:.2f} GiB: {WAYS[way]}",
                    f"{median['peak'] / weights:.2f}",
                    f"{highest / weights:.2f}",
                    f"{median['final'] / weights:.2f}",
                    f"{median['seconds']:.1f}",
                ]
            )
            print(*rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))
    header = ["model and way", "peak / weights", "highest peak / weights", "after / weights", "s"]
    if options.markdown:
        context = measured_on("benchmarks.loading", ("torch", "transformers", "safetensors"))
        title = f"Loading a model, {options.world} ranks on one host"
        about = f"Median of {options.rounds}; memory of all ranks together, as a multiple of the weights in bf16."
        body = table(header, rows, pipes=True)
        options.markdown.write_text(markdown(title, context, f"{about}\n\n{body}"))
    else:
        print(table(header, rows))


if __name__ == "__main__":
    main()
