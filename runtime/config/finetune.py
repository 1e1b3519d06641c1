"""The parts of the `zerotop` section that say what the built-in trainer trains: model, adapters, data, evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from .errors import nearest, shown
from .presets import PRESETS
from .section import Flag, Int, Num, Section, Text, Texts, number, wrong

MAX_SEQ_LEN = 2**24
DEFAULT_SEQ_LEN = 512
"""Tokens per sequence of the built-in GPT."""
DEFAULT_FINETUNE_SEQ_LEN = 2048
"""Tokens per sequence of a Hugging Face model, if it has as many positions."""
HUB_DATA = "hf://datasets/"
"""How an entry of zerotop.data.files names a data set on the Hugging Face hub."""

Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
GPU_ATTENTION = ("flash_attention_2", "flash_attention_3", "flex_attention")
"""Those that cannot be trained on a CPU: torch's flex attention has no backward there."""
CrossEntropy = Literal["auto", "chunked", "liger", "whole"]
DataFormat = Literal["auto", "messages", "sharegpt", "prompt-completion", "alpaca", "text"]
TrainedTokens = Literal["auto", "assistant", "completion", "all"]
Overlong = Literal["truncate", "drop", "error"]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _preset(value: object) -> str:
    name = value.lower() if isinstance(value, str) else value
    if isinstance(name, str) and name in PRESETS:
        return name
    near = nearest(name, PRESETS) if isinstance(name, str) else None
    hint = f". Did you mean {near}?" if near else ""
    raise PydanticCustomError(
        "wrong_preset", "{text}", {"text": f"expected one of {', '.join(PRESETS)}, got {shown(value)}{hint}"}
    )


def _weights(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple):
        raise wrong("a list of numbers, one per entry of zerotop.data.files", value)
    found = tuple(number(item) for item in value)
    if not all(weight > 0 for weight in found):
        raise wrong("numbers above 0", value)
    return found


def _targets(value: Any) -> tuple[str, ...] | str:
    if value == "all-linear":
        return "all-linear"
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise wrong('"all-linear" or a list of module names', value)
    if not all(isinstance(item, str) and item.strip() and "\0" not in item for item in items):
        raise wrong('"all-linear" or a list of module names', value)
    return tuple(items)


def _split(value: Any) -> float:
    share = number(value)
    if not 0 < share < 1:
        raise wrong("a share of the data, above 0 and below 1", value)
    return share


Preset = Annotated[str, BeforeValidator(_preset)]


class ModelConfig(Section):
    """What is trained when no script is given. Give `preset` or `path`, not both."""

    preset: Preset | None = None
    """A built-in GPT, newly initialised. With neither preset nor path: gpt-small."""

    path: Text | None = None
    """A Hugging Face causal language model: a folder (relative to the folder of the config file), a GGUF file, or an id
    on the hub. The other keys of this section are for such a model."""

    revision: Text | None = None
    """Branch, tag or commit of the model on the hub. Unset: its main branch."""

    trust_remote_code: Flag = False
    """Whether to run Python code that the model's folder brings along. Read it before you set this."""

    attention: Annotated[Attention, BeforeValidator(_lower)] = "sdpa"
    """Implementation of attention. The flash ones need the flash-attn package; they and flex need a GPU."""

    compile: Flag = False
    """Whether torch.compile compiles each block of the model."""

    cross_entropy: Annotated[CrossEntropy, BeforeValidator(_lower)] = "auto"
    """How the loss is computed. `chunked`: over chunks of tokens, so that the logits never exist as a whole. `liger`:
    by Liger's kernel, which needs a GPU and the liger-kernel package. `whole`: the logits at once. `auto`: liger if it
    can be used, else chunked."""

    new_tokens: Texts = ()
    """Tokens to add to the tokenizer; the embedding gets a row for each."""

    offload_activations: Flag = False
    """Whether activations that backward needs are kept in page-locked host memory, copied beside the computation."""


class LoraConfig(Section):
    """Low-rank adapters, with peft (arXiv 2106.09685)."""

    r: Annotated[Int, Field(ge=1, le=4096)] = 16
    """Rank of the adapters."""

    alpha: Annotated[Num, Field(gt=0)] = 32
    """The adapters' output is multiplied by alpha / r."""

    dropout: Annotated[Num, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input."""

    target_modules: Annotated[tuple[str, ...] | Literal["all-linear"], BeforeValidator(_targets)] = "all-linear"
    """The linear modules that get adapters: names or ends of names, or "all-linear", all but the head."""

    modules_to_save: Texts = ()
    """Modules that are trained as a whole beside the adapters, such as "lm_head" and "embed_tokens"."""

    rslora: Flag = False
    """Whether to multiply by alpha / sqrt(r) instead (arXiv 2312.03732)."""


class DataConfig(Section):
    """The data that the built-in trainer learns from. The built-in GPT trains on text files; a Hugging Face model on
    conversations, prompts with completions, or text."""

    files: Texts = ()
    """Globs of files (`**` crosses folders, `~` is the home folder), relative to the folder of the config file: text
    for the built-in GPT; JSONL, JSON, Parquet, CSV or text, each also compressed with gzip or zstd, for a Hugging Face
    model. "hf://datasets/OWNER/NAME" is a data set on the hub. Empty: the source text of Python's own standard library,
    for the built-in GPT only."""

    weights: Annotated[tuple[float, ...], BeforeValidator(_weights)] = ()
    """How often the samples of each entry of `files` count in an epoch: 2 is twice, 0.5 is a random half. Empty: once
    each."""

    split: Text = "train"
    """The split of data sets from the hub."""

    format: Annotated[DataFormat, BeforeValidator(_lower)] = "auto"
    """What a row holds. `messages`: OpenAI's list of {role, content}; `sharegpt`: `conversations` of {from, value};
    `prompt-completion`; `alpaca`: instruction, input, output; `text`. `auto`: recognised by the columns."""

    tokenizer: Text = "bytes"
    """`bytes` (one token per UTF-8 byte), or a Hugging Face tokenizer: a directory, or an id on the hub. Unset with a
    Hugging Face model: the model's own."""

    chat_template: Text | None = None
    """A file with a Jinja chat template, instead of the tokenizer's own."""

    seq_len: Annotated[Int, Field(ge=1, le=MAX_SEQ_LEN)] = DEFAULT_SEQ_LEN
    """Tokens per sequence."""

    train_on: Annotated[TrainedTokens, BeforeValidator(_lower)] = "auto"
    """The tokens that the loss counts. `assistant`: the assistant's turns with their end-of-turn tokens; `completion`:
    the last turn or the completion; `all`: every token. `auto`: assistant for conversations, completion for prompts
    with completions, all for text."""

    overlong: Annotated[Overlong, BeforeValidator(_lower)] = "truncate"
    """What happens to samples of more than seq_len tokens. `truncate`: the rest is cut off; `drop`: they are left out;
    `error`: the run does not start."""

    packing: Flag = True
    """Whether several samples share a sequence, each with positions and attention of its own. The results are those of
    separate sequences, to rounding; less padding is computed."""

    streaming: Flag = False
    """Whether data is read and tokenized in segments while training, for data that does not fit on the disk."""

    segment_rows: Annotated[Int, Field(ge=1)] = 20_000
    """Rows per segment of streamed data; samples are shuffled within a segment."""

    workers: Annotated[Int, Field(ge=0, le=512)] = 0
    """Processes that tokenize. 0: one per CPU core."""


class EvaluationConfig(Section):
    """Evaluation while training, with a Hugging Face model. Give `files` or `split`."""

    files: Texts = ()
    """Files of held-out data, as in zerotop.data.files."""

    split: Annotated[float, BeforeValidator(_split)] | None = None
    """Share of the training data to hold out instead, chosen by a hash of each row's number and the seed."""

    interval: Annotated[Int, Field(ge=1)] = 100
    """Optimizer steps between two evaluations. There is one before the first step and one after the last, too."""

    samples: Annotated[Int, Field(ge=1)] | None = None
    """Samples to evaluate on, at most. Unset: all held-out data."""

    keep_best: Flag = True
    """Whether the checkpoint with the lowest evaluation loss is made and kept."""

    prompts: Texts = ()
    """User messages (with a chat template) or beginnings of text that the model continues at every evaluation."""

    new_tokens: Annotated[Int, Field(ge=1, le=4096)] = 64
    """Tokens that the model writes per prompt, at most."""

    temperature: Annotated[Num, Field(ge=0)] = 0.0
    """Temperature at which tokens are sampled. 0: always the likeliest token."""
