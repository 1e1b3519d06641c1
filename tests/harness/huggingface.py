"""Tiny models of transformers, made from their config classes. Importing transformers takes seconds, so this module
imports it in functions, and tests do as much as they can in one call of ranks(n).run()."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 64

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 8}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "qk_nope_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
}
KINDS = tuple(_CONFIGS)


def config_of(kind: str, **changes: Any) -> Any:
    """The config of a tiny model, for AutoModelForCausalLM.from_config()."""
    import transformers

    class_name, own = _CONFIGS[kind]
    sizes = {name: _SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    return getattr(transformers, class_name)(**{**(sizes if kind == "gpt2" else _SIZES), **own, **changes})


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model for causal language modelling with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind, **changes))
    with torch.no_grad():
        for tensor in (*model.parameters(), *_routing_buffers(model)):
            tensor.add_(torch.randn_like(tensor) * 0.05)  # norms and biases begin as ones and zeros: none may be taken
    return model  # for another


def _routing_buffers(model: Any) -> list[torch.Tensor]:
    """Buffers that a model learns and stores, beside its parameters."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def save(kind: str, folder: Path, **changes: Any) -> str:
    """The folder, with a tiny model as transformers saves it."""
    build(kind, **changes).save_pretrained(folder)
    return str(folder)
