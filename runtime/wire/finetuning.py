"""What fine-tuning reports: the data that is trained and evaluated on, and evaluations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from runtime.wire.base import Message
from runtime.wire.bounds import Count, Finite, Name, RankNumber, Step, Text, WallSeconds


class TokenRun(Message):
    """Neighbouring tokens of a sample that are alike, as text. A special token is a run of its own, with its name as
    text."""

    text: Text
    trained: bool
    """Whether the loss counts them."""
    special: bool = False
    edge: bool = False
    """Whether a packed sequence's next document begins here."""


class DataSample(Message):
    """One sequence as the model sees it, shortened to what a screen can show."""

    source: Text
    """File and row, or rows of a packed sequence."""
    tokens: Count
    trained: Count
    runs: list[TokenRun]
    left_out: Count = 0
    """Tokens at the end that `runs` leave out."""


class DataReport(Message):
    """What is trained or evaluated on. Rank 0 sends it before the first step; `zerotop data --json` prints it."""

    kind: Literal["data_report"] = "data_report"
    role: Literal["train", "evaluation"]
    files: list[Text]
    """The files or data sets, at most 20, and then how many more."""
    format: Name
    """`messages`, `sharegpt`, `prompt-completion`, `alpaca`, `text`; several, separated by commas."""
    template: Text = ""
    """Where the chat template came from; empty without one."""
    train_on: Name
    """`assistant`, `completion` or `all`."""
    rows: Count
    samples: Count
    """Rows that became samples."""
    dropped: dict[Name, Count] = Field(default_factory=dict)
    """Rows left out, by reason."""
    set_aside: dict[Name, Count] = Field(default_factory=dict)
    """Samples of these rows that are not used here, by reason: held out to evaluate on, or more than was asked for."""
    truncated: Count = 0
    """Samples cut to seq_len."""
    truncated_tokens: Count = 0
    tokens: Count
    trained_tokens: Count
    seq_len: Count
    sequences: Count
    """Sequences per epoch: the samples, or what they are packed into."""
    packed: bool = False
    vocab_size: Count = 0
    lengths: list[tuple[Count, Count]] = Field(default_factory=list)
    """(length, samples of at most this many tokens and more than the one before): a histogram of at most 32 bins."""
    examples: list[DataSample] = Field(default_factory=list)
    notes: list[Text] = Field(default_factory=list)
    """What a person should know: recognised columns, defaults, suspicious findings."""
    seconds: Finite = 0.0
    """Time spent reading and tokenizing; 0 if it was cached."""
    complete: bool = True
    """False for streamed data: the figures are those of the first segment."""


class Generation(Message):
    """What the model wrote for one of zerotop.evaluation.prompts."""

    prompt: Text
    text: Text
    tokens: Count = 0


class Evaluation(Message):
    """One evaluation on held-out data. Rank 0 sends it."""

    kind: Literal["evaluation"] = "evaluation"
    rank: RankNumber
    step: Step
    """Optimizer steps taken before it."""
    loss: float | None
    """Mean cross-entropy per trained token, in nats; None without held-out data."""
    tokens: Count = 0
    """Trained tokens that the mean is over."""
    samples: Count = 0
    seconds: Finite = 0.0
    best: bool = False
    """Whether it is the lowest loss so far."""
    best_step: Step | None = None
    generations: list[Generation] = Field(default_factory=list)
    wall_s: WallSeconds
