"""Folders of Hugging Face models as far as a plan reads them: config.json, and safetensors files without their data."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any


def write_header(path: Path, shapes: dict[str, list[int]], dtype: str = "BF16") -> None:
    """A safetensors file without its data."""
    entries = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    document = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(document)) + document)


def llama(folder: Path, dim: int = 2048, layers: int = 16, vocab_size: int = 128_256, **config: Any) -> Path:
    """The files of a model like Llama 3.2 1B, with an own head; returns their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": dim, "intermediate_size": 4 * dim, "num_attention_heads": 32, "num_key_value_heads": 8}
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": vocab_size, **sizes, **config})
    )
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [vocab_size, dim], "model.norm.weight": [dim]}
    shapes["lm_head.weight"] = [vocab_size, dim]
    for index in range(layers):
        block = {"input_layernorm": [dim], "post_attention_layernorm": [dim]}
        block |= {f"self_attn.{name}_proj": [dim, dim] for name in "qo"}
        block |= {f"self_attn.{name}_proj": [dim // 4, dim] for name in "kv"}
        block |= {f"mlp.{name}_proj": [4 * dim, dim] for name in ("gate", "up")} | {"mlp.down_proj": [dim, 4 * dim]}
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    write_header(folder / "model.safetensors", shapes)
    return folder
