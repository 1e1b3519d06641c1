"""The built-in GPT: counts against the model itself, what it computes, and how it is cut."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from runtime.config.presets import (
    PRESETS,
    GPTConfig,
    ModelError,
    gradient_arrivals,
    load_model_config,
    padded_vocab,
    parameters,
    preset,
    unit_parameters,
)
from runtime.config.zerotop import DEFAULT_PRESET
from runtime.models.gpt import GPT, build_model, rotary_tables, rotate
from runtime.plan.estimate import activation_bytes, evaluation_bytes, fresh_gradient_bytes
from runtime.zero.cut import cut
from tests.harness.peak_bytes import peak_bytes

SMALL = GPTConfig(layers=2, heads=2, dim=32, vocab_size=64, max_seq_len=16)


PATTERNS = [None, ["blocks.*"], ["blocks"], ["embedding", "head"], ["blocks.1", "blocks.*.qkv", "head"], ["*norm"]]


@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("small_below", [0, 5000])
@pytest.mark.parametrize("name", [*PRESETS, "one block", "one tied block"])
def test_units_equal_the_engines_cut_of_the_model(name: str, small_below: int, patterns: list[str] | None) -> None:
    config = PRESETS.get(name) or GPTConfig(1, 2, 32, 64, 16, tied="tied" in name)
    if config.layers == 1 and patterns and "blocks.1" in patterns:
        patterns = ["blocks.*.qkv"]
    units = cut(GPT(config, "meta"), patterns, small_below)
    assert unit_parameters(config, small_below, patterns) == [
        (unit.name, sum(p.numel() for _, p in unit.parameters)) for unit in units
    ]
    assert set(gradient_arrivals(config, small_below, patterns)) == {unit.name for unit in units}


def test_units_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(
        ModelError, match=r"zerotop.units: no module is called 'layers.\*'; .* has 'embedding', 'blocks'"
    ):
        unit_parameters(SMALL, 0, ["blocks.*", "layers.*"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-tiny", 3.3e6),
        ("gpt-small", 25.5e6),
        ("gpt-124m", 124e6),
        ("gpt-350m", 354e6),
        ("gpt-1.3b", 1.31e9),
        ("gpt-7b", 6.85e9),
    ],
)
def test_presets_are_as_large_as_their_names_say(name: str, expected: float) -> None:
    assert parameters(PRESETS[name]) == pytest.approx(expected, rel=0.01)


def test_the_configs_default_is_a_preset() -> None:
    assert DEFAULT_PRESET in PRESETS


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"'gpt-tiney'; did you mean 'gpt-tiny'\?"):
        preset("gpt-tiney")


def test_a_hugging_face_path_says_what_is_expected() -> None:
    with pytest.raises(ModelError, match="got path 'org/model'"):
        load_model_config({"path": "org/model"}, 257)


def test_load_model_config_takes_vocabulary_and_length_from_the_run() -> None:
    config = load_model_config({"preset": "gpt-tiny"}, vocab_size=257, seq_len=96)
    assert (config.vocab_size, config.max_seq_len, config.dim) == (padded_vocab(257), 96, PRESETS["gpt-tiny"].dim)
    assert padded_vocab(257) == 320
    assert padded_vocab(320) == 320


@pytest.mark.parametrize("broken", [{"heads": 3}, {"layers": 0}, {"dim": 2, "heads": 2}])
def test_impossible_shapes_are_refused(broken: dict[str, int]) -> None:
    with pytest.raises(ModelError, match=r"zerotop\.model\."):
        GPTConfig(**{"layers": 2, "heads": 2, "dim": 32, "vocab_size": 64, "max_seq_len": 16} | broken)


def test_loss_is_the_mean_over_counted_targets_only() -> None:
    torch.manual_seed(0)
    model = GPT(SMALL)
    tokens, targets = torch.randint(64, (2, 3, 16))
    targets[0, :5] = -100
    logits = model(tokens).double()
    expected = F.cross_entropy(logits[targets != -100], targets[targets != -100])
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_counted_target_gives_zero_loss_and_zero_gradients() -> None:
    model = GPT(SMALL)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    loss = model(tokens, torch.full_like(tokens, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = GPT(SMALL)
    tokens = torch.randint(64, (1, 16))
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 64
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:])


def test_rotary_scores_depend_on_distance_only() -> None:
    cos, sin = rotary_tables(32, 8, "cpu")
    query, key = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 32, 8)
    scores = rotate(query, cos, sin) @ rotate(key, cos, sin).transpose(-1, -2)
    diagonals = [scores[0, 0].diagonal(offset) for offset in range(-31, 32)]
    assert all((diagonal - diagonal[0]).abs().max() < 1e-4 for diagonal in diagonals)
    assert len({round(diagonal[0].item(), 3) for diagonal in diagonals}) > 1


def test_bf16_parameters_give_an_fp32_loss_near_the_fp32_one() -> None:
    torch.manual_seed(0)
    model = GPT(SMALL)
    tokens = torch.randint(64, (2, 16))
    exact = model(tokens, tokens)
    rounded = model.to(torch.bfloat16)(tokens, tokens)
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), abs=0.02)
    assert model._rotary is not None and model._rotary[0].dtype == torch.float32


def test_build_model_is_reproducible_and_starts_at_the_uniform_loss() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(build_model({"preset": "gpt-tiny"}, vocab_size=257, seq_len=32, device="cpu"))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    tokens = torch.randint(257, (2, 32))
    assert models[0](tokens, tokens.roll(1)).item() == pytest.approx(torch.tensor(320.0).log().item(), abs=0.2)


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="17 tokens in a sequence"):
        GPT(SMALL)(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(("dtype", "element_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activation_estimate_is_what_autograd_keeps_per_layer(dtype: torch.dtype, element_bytes: int) -> None:
    batch, seq_len = 2, 64

    def kept_bytes(layers: int) -> tuple[int, int]:
        config = GPTConfig(layers, heads=4, dim=128, vocab_size=64, max_seq_len=seq_len)
        model = GPT(config).to(dtype)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage
            return tensor.detach()  # a node that holds its own output is never freed

        tokens = torch.randint(64, (batch, seq_len))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(tokens, tokens)
        assert loss.requires_grad
        return sum(storage.nbytes() for storage in kept.values()), activation_bytes(
            config, batch, seq_len, element_bytes
        )

    (kept_two, estimate_two), (kept_three, estimate_three) = kept_bytes(2), kept_bytes(3)
    cpu_copy_of_attention = batch * seq_len * 128 * element_bytes  # the CPU kernel's output is in another order
    assert kept_three - kept_two == pytest.approx(estimate_three - estimate_two + cpu_copy_of_attention, rel=0.01)
    assert kept_two < estimate_two


@pytest.mark.parametrize("vocab", [64, 4096])
@pytest.mark.parametrize(("dtype", "element_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_an_evaluation_takes_is_at_most_what_the_forecast_says(
    dtype: torch.dtype, element_bytes: int, vocab: int
) -> None:
    """Layer or logits dominate."""
    config = GPTConfig(layers=3, heads=4, dim=128, vocab_size=vocab, max_seq_len=64)
    model, tokens = GPT(config).to(dtype), torch.randint(64, (4, 64))

    @torch.no_grad()
    def evaluate() -> None:
        model(tokens, tokens)

    evaluate()  # tables of angles are made once
    took, forecast = peak_bytes(evaluate), evaluation_bytes(config, 4, 64, element_bytes)
    assert 0.4 * forecast < took <= forecast
    assert evaluation_bytes(config, 1, 1, 2, new_tokens=10**6) == 2 * 3 * 128 * 2 * 10**6  # keys and values


@pytest.mark.parametrize(("tied", "tables"), [(False, 1), (True, 3)])
def test_a_tables_gradient_is_what_the_estimate_says(tied: bool, tables: int) -> None:
    """Counted in autograd: every tensor of the table's size that exists at a time between forward and the engine."""
    shape = GPTConfig(layers=2, heads=2, dim=8, vocab_size=4096, max_seq_len=4, tied=tied)
    model, tokens = GPT(shape), torch.zeros(1, 4, dtype=torch.int64)
    loss = model(tokens, tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        loss.backward()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) == 4 * 4096 * 8:
            now += 1 if event.nbytes() > 0 else -1
            most = max(most, now)
    assert most == tables
    assert fresh_gradient_bytes(shape, 4, beside=0) == tables * 4 * 4096 * 8
