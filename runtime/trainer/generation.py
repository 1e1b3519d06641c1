"""Text that the model in training writes, at every stage: parameters are unsharded unit by unit as in a forward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from runtime.engine.engine import Engine
from runtime.host import rng
from runtime.models.causal_lm import CausalLM
from runtime.wire.finetuning import Generation


@torch.no_grad()
def generate(
    engine: Engine, model: CausalLM, tokenizer: Any, prompt: str, new_tokens: int, temperature: float = 0.0
) -> Generation:
    """What the model answers to `prompt`, a user message if the tokenizer has a chat template, else the beginning of a
    text. At most `new_tokens` tokens; at temperature 0 always the likeliest one. Collective: all ranks write the same
    prompt, so that they unshard the same units.
    """
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    tokens = torch.tensor([ids], device=engine.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    state = rng.get_state()  # sampling must not change the random numbers that training continues with
    torch.manual_seed(engine.config.zerotop.train.seed)
    compiled = engine.config.zerotop.model.compile
    # Each length of the cache would be compiled anew.
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with stance:
            out = model.base.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new_tokens,
                pad_token_id=_padding(tokenizer),
                use_cache=True,
                synced_gpus=engine.comm.world_size > 1 and engine.state.policy.shards_parameters,
                **sampling,
            )
    finally:
        rng.set_state(state)
    written = out[0, tokens.shape[1] :].tolist()
    return Generation(prompt=prompt, text=tokenizer.decode(written, skip_special_tokens=True), tokens=len(written))


def _padding(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)
