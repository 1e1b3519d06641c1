"""Reads the header of a GGUF file: the model's shape, and the names and shapes of its tensors. Torch-free.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from runtime.config.presets import ModelError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Type of a metadata value -> its format for struct."""

_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Metadata key after the architecture's name -> key of config.json."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
"""Name of a module in GGUF files (without `blk.N.`) -> its name in transformers, for models like Llama."""


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The model's shape in config.json's keys, and name -> shape of its tensors in transformers' names. Raises
    ModelError if the file cannot be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            metadata, shapes = _Reader(mapped).header()
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"zerotop.model.path: {path} is not a GGUF file: {error}") from None
    architecture = metadata.get("general.architecture", "")
    config = {
        ours: metadata[f"{architecture}.{key}"] for key, ours in _KEYS.items() if f"{architecture}.{key}" in metadata
    }
    tensors = {_name(name): shape for name, shape in shapes.items() if not name.startswith("rope_")}
    if (table := tensors.get("model.embed_tokens.weight")) is not None:
        config["vocab_size"] = table[0]
    return config | {"model_type": architecture}, tensors


def _name(stored: str) -> str:
    module, _, kind = stored.rpartition(".")
    block = ""
    if module.startswith("blk."):
        _, index, module = module.split(".", 2)
        block = f"model.layers.{index}."
    return f"{block}{_NAMES.get(module, module)}.{kind}"


class _Reader:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def header(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """Metadata, and name -> shape of each tensor, slowest dimension first."""
        if self._data[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"expected version 2 or 3, got {version}")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        metadata = {self._string(): self._value(self._number("<I")) for _ in range(pairs)}
        return metadata, dict(self._tensor() for _ in range(tensors))

    def _tensor(self) -> tuple[str, tuple[int, ...]]:
        name = self._string()
        shape = [self._number("<Q") for _ in range(self._number("<I"))]
        self._number("<I")  # type
        self._number("<Q")  # offset
        return name, tuple(reversed(shape))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            self._skip_array()
            return None
        return self._number(_NUMBERS[kind])

    def _skip_array(self) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            for _ in range(count):
                self._at += 8 + self._peek_length()
        elif kind == _ARRAY:
            for _ in range(count):
                self._skip_array()
        else:
            self._at += count * struct.calcsize(_NUMBERS[kind])

    def _peek_length(self) -> int:
        return int(struct.unpack_from("<Q", self._data, self._at)[0])

    def _string(self) -> str:
        length = self._number("<Q")
        text = self._data[self._at : self._at + length].decode()
        self._at += length
        return text

    def _number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value
