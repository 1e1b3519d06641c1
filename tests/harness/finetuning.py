"""Data reports and evaluations as a fine-tuning run sends them, without a model."""

from __future__ import annotations

import math
from typing import Any

from runtime.wire.finetuning import DataReport, DataSample, Evaluation, Generation, TokenRun

_CHATS = (
    ("What is the tallest mountain?", "Mount Everest, at 8,849 metres above sea level."),
    ("Do you like tea?", "I can't taste it, but I know a lot about it.\n\n1. Heat the water.\n2. Wait."),
    ("你好", "你好！有什么可以帮您的吗？"),
    ("Tell me a joke about the ocean, please, and make it a short one that children like.", "It waved."),
)
PROMPTS = ("What is the capital of France?", "Write a sentence about autumn.")
_STAGES = (
    ("The The the of of the", "autumn autumn autumn"),
    ("France is a country. The capital", "Autumn is when the the leaves"),
    ("The capital of France is Paris.", "In autumn the leaves turn gold and fall, one by one."),
)


def token_runs(*chats: int) -> list[TokenRun]:
    """The runs of a sequence with these chats, in the template of SmolLM2."""
    runs = []
    for number in chats:
        asked, answered = _CHATS[number % len(_CHATS)]
        runs += [
            TokenRun(text="<|im_start|>", trained=False, special=True, edge=number != chats[0]),
            TokenRun(text=f"user\n{asked}", trained=False),
            TokenRun(text="<|im_end|>", trained=False, special=True),
            TokenRun(text="\n", trained=False),
            TokenRun(text="<|im_start|>", trained=False, special=True),
            TokenRun(text="assistant\n", trained=False),
            TokenRun(text=answered, trained=True),
            TokenRun(text="<|im_end|>", trained=True, special=True),
            TokenRun(text="\n", trained=False),
        ]
    return runs


def data_report(role: str = "train", **changes: Any) -> DataReport:
    """A report of packed dialogues."""
    train = role == "train"
    bell = [(64 * (bar + 1), round(900 * math.exp(-(((bar - 7) / 5) ** 2)))) for bar in range(32)]
    fields: dict[str, Any] = {
        "role": role,
        "files": ["chats/part-*.jsonl", "notes.txt"] if train else ["held-out.jsonl"],
        "format": "messages, text" if train else "messages",
        "template": "the tokenizer's (smollm2)",
        "train_on": "assistant",
        "rows": 7168 if train else 200,
        "samples": 7105 if train else 200,
        "dropped": {"without an assistant turn": 51, "empty": 12} if train else {},
        "truncated": 31 if train else 0,
        "truncated_tokens": 4210 if train else 0,
        "tokens": 1_310_000 if train else 41_000,
        "trained_tokens": 468_000 if train else 14_000,
        "seq_len": 2048,
        "sequences": 655 if train else 21,
        "packed": True,
        "vocab_size": 49152,
        "lengths": bell if train else bell[:9],
        "examples": [
            DataSample(
                source=f"chats/part-0.jsonl, rows {first + 1} and {first + 2}"
                if train
                else f"held-out.jsonl, row {first}",
                tokens=124 + first,
                trained=41,
                runs=token_runs(first, first + 1),
                left_out=17 if first == 1 else 0,
            )
            for first in range(3 if train else 2)
        ],
        "notes": ["notes.txt: rows of text, of which all tokens are trained"] if train else [],
        "seconds": 3.2,
        **changes,
    }
    return DataReport.model_validate(fields)


def evaluation(step: int, loss: float | None = None, *, texts: bool = True, **changes: Any) -> Evaluation:
    """The evaluation at `step`, with a falling loss that rises again from step 150 on."""
    if loss is None:
        loss = 2.1 + 3.2 * math.exp(-step / 40) + (0.002 * (step - 150) if step > 150 else 0.0)
    written = _STAGES[min(len(_STAGES) - 1, step // 50)]
    generations = [
        Generation(prompt=prompt, text=text, tokens=9) for prompt, text in zip(PROMPTS, written, strict=True)
    ]
    fields = {
        "rank": 0,
        "step": step,
        "loss": loss,
        "tokens": 14_000,
        "samples": 200,
        "seconds": 1.5,
        "generations": generations if texts else [],
        "wall_s": 1_790_000_000.0 + step,
        **changes,
    }
    return Evaluation.model_validate(fields)
