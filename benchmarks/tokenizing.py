"""How long preparing conversations takes, against the tokenizer alone on the same texts.

    python -m benchmarks.tokenizing FOLDER --markdown benchmarks/results/tokenizing.md

FOLDER holds a tokenizer with a chat template, such as a copy of SmolLM2-135M-Instruct. The data is the dialogues of the
package chitchat-dataset, repeated. Preparing reads JSONL, renders the template, finds the assistant's turns, tokenizes,
writes the store and packs; the tokenizer alone is one call of `encode_batch_fast` per chunk of texts that are rendered
already, with all its threads. Rounds take turns; ratios are of one round. CPU seconds are those of all processes and
threads. What other work on the machine moves least is the third figure: the CPU time of one process that encodes a
chunk, to that of the tokenizer with one thread on the same texts, in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from runtime.config.finetune import DataConfig
from runtime.config.zerotop import ZerotopConfig
from runtime.data.conversations.encode import Encoder
from runtime.data.conversations.packing import pack
from runtime.data.conversations.prepare import make_recipe, prepare_all
from runtime.data.conversations.readers import Reader
from runtime.data.conversations.sources import find_sources
from runtime.data.conversations.worker import encode_chunk

CHUNK = 2_000  # texts per call of the tokenizer alone


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizing", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of a tokenizer with a chat template")
    parser.add_argument("--mb", type=float, default=40)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        chats = repeated(dialogues(), options.mb)
        (Path(scratch) / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        for number in range(options.rounds):
            rounds.append(measure(tokenizer, texts, Path(scratch), options, number))
            print(rounds[-1], flush=True)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        ratios = by_chunk(tokenizer, Path(scratch), 20)
    lines = report(rounds, ratios, options, sum(map(len, texts)))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n")


def dialogues() -> list[list[dict[str, str]]]:
    """Conversations of the chitchat data set that have a turn of both, as messages."""
    spec = importlib.util.find_spec("chitchat_dataset")
    assert spec is not None and spec.origin is not None, "pip install --no-deps -r tests/material.txt"
    data = json.loads((Path(spec.origin).parent / "dataset.json").read_text(encoding="utf-8"))
    chats = []
    for dialogue in data.values():
        turns = ["\n".join(part["text"] for part in turn) for turn in dialogue["messages"]]
        if len(turns) > 1:
            roles = ("user", "assistant")
            chats.append([{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)])
    return chats


def repeated(chats: list[Any], megabytes: float) -> list[Any]:
    """The conversations over and over, up to this size as JSONL."""
    found, size, at = [], 0, 0
    while size < megabytes * 1e6:
        found.append(chats[at % len(chats)])
        size += len(json.dumps({"messages": found[-1]})) + 1
        at += 1
    return found


def clocks() -> tuple[float, float]:
    """(seconds, CPU seconds of this process and of those that it has waited for)."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def measure(tokenizer: Any, texts: list[str], folder: Path, options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Seconds of both, and what came of it."""
    library = tokenizer.backend_tokenizer
    start = clocks()
    tokens = 0
    for first in range(0, len(texts), CHUNK):
        encoded = library.encode_batch_fast(texts[first : first + CHUNK], add_special_tokens=False)
        tokens += sum(len(one) for one in encoded)
    alone = [now - then for now, then in zip(clocks(), start, strict=True)]
    data = {"files": ["chats.jsonl"], "seq_len": options.seq_len, "workers": options.workers}
    section = ZerotopConfig.model_validate({"data": data})
    start = clocks()
    made = prepare_all(section, tokenizer, len(tokenizer), folder, print, cache=folder / f"cache-{number}")
    whole = [now - then for now, then in zip(clocks(), start, strict=True)]
    store, plan = made.train.sequences.store, made.train.sequences.plan
    began = time.perf_counter()
    count = 1_000_000
    lengths = np.resize(np.asarray(store.lengths), count)
    pack(np.arange(count), lengths, lengths, options.seq_len, 0)
    return {
        "alone_s": alone[0],
        "alone_cpu_s": alone[1],
        "whole_s": whole[0],
        "whole_cpu_s": whole[1],
        "ratio": whole[0] / alone[0],
        "cpu_ratio": whole[1] / alone[1],
        "tokens": tokens,
        "fill": int(plan.lengths.sum(dtype=np.int64)) / (len(plan) * options.seq_len),
        "sequences": len(plan),
        "million_s": time.perf_counter() - began,
    }


def by_chunk(tokenizer: Any, folder: Path, chunks: int) -> list[float]:
    """CPU time of encoding a chunk of the data, to the tokenizer's own on the texts in it; of some chunks."""
    data = DataConfig(files=("chats.jsonl",), seq_len=2048)
    encoder = Encoder(make_recipe(data, tokenizer, len(tokenizer), folder)[0])
    library = tokenizer.backend_tokenizer
    ratios = []
    for number, chunk in enumerate(itertools.islice(Reader(find_sources(data.files, folder)).chunks(), chunks)):
        chats = [row["messages"] for _, row in chunk.numbered([])]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        start = time.process_time()
        library.encode_batch_fast(texts, add_special_tokens=False)
        between = time.process_time()
        encode_chunk(encoder, number, chunk, folder)
        ratios.append((time.process_time() - between) / (between - start))
    return ratios


def report(
    rounds: list[dict[str, Any]], ratios: list[float], options: argparse.Namespace, characters: int
) -> list[str]:
    """The figures as Markdown."""
    import tokenizers

    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    times = [one["ratio"] for one in rounds]
    return [
        f"# Preparing {options.mb:g} MB of dialogues",
        "```",
        f"python -m benchmarks.tokenizing FOLDER --mb {options.mb:g} --seq-len {options.seq_len} "
        f"--rounds {options.rounds} --markdown benchmarks/results/tokenizing.md",
        "```",
        f"- system: {platform.system()} {'.'.join(platform.release().split('.')[:2])}, "
        f"{len(os.sched_getaffinity(0))} logical cores, Python {platform.python_version()}",
        f"- versions: tokenizers {tokenizers.__version__}, numpy {np.__version__}; tokenizer: SmolLM2's",
        f"- {characters / 1e6:.1f} million characters once rendered, {int(middle['tokens']):,} tokens",
        "",
        "| | s | CPU s | tokens/s |",
        "| --- | --: | --: | --: |",
        *(
            f"| {name} | {middle[f'{key}_s']:.1f} | {middle[f'{key}_cpu_s']:.1f} | "
            f"{middle['tokens'] / middle[f'{key}_s']:,.0f} |"
            for name, key in (
                ("encode_batch_fast alone", "alone"),
                ("prepared: read, rendered, masked, tokenized, packed", "whole"),
            )
        ),
        "",
        f"Ratio of the two: {middle['ratio']:.2f} in time ({min(times):.2f} to {max(times):.2f}), "
        f"{middle['cpu_ratio']:.2f} in CPU time; in one process, chunk by chunk: {statistics.median(ratios):.2f} in "
        f"CPU time (half of the chunks from {quarters[0]:.2f} to {quarters[2]:.2f}). Packed into "
        f"{int(middle['sequences']):,} sequences of {options.seq_len:,} tokens, {middle['fill']:.1%} full. Packing a "
        f"million samples of such lengths takes {middle['million_s']:.1f} s.",
    ]


if __name__ == "__main__":
    main()
