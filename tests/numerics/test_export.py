"""What `zerotop export` writes is what the engine's module computed with, bit for bit, at any stage and world size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from runtime.plan.estimate import EXPORT_FILE_BYTES, export_bytes
from tests.harness.waiting import patient
from tests.numerics.models import make
from tests.numerics.training import config, micro_batch
from zerotop.cli import main

INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("export_here")


def trained(settings, model) -> object:
    import torch.distributed as dist

    from runtime.engine.initialize import initialize

    engine = initialize(model=model, config=settings)[0]
    for step in range(2):
        engine.backward(_loss(engine(*micro_batch(step, 0, dist.get_rank(), dist.get_world_size()))))
        engine.step()
    return engine


def _loss(output):
    return output["loss"] if isinstance(output, dict) else output


def save(folder: str, settings, kind: str) -> dict[str, torch.Tensor]:
    """Save FOLDER/global_step2; returns the module's state_dict."""
    engine = trained(settings, make(kind))
    engine.save_checkpoint(folder)
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def export(*words: object) -> Path:
    """`zerotop export WORDS...`; OUT."""
    assert main(["export", *map(str, words)]) == 0
    return Path(str(words[1]))


def loaded(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an exported folder, by the index where there is one."""
    files = ["model.safetensors"]
    if (out / INDEX).exists():
        index = json.loads((out / INDEX).read_text())
        files = sorted(set(index["weight_map"].values()))
        tensors = {file: load_file(out / file) for file in files}
        assert index["weight_map"] == {name: file for file, held in tensors.items() for name in held}
        values = [value for held in tensors.values() for value in held.values()]
        assert index["metadata"]["total_size"] == sum(value.numel() * value.itemsize for value in values)
    assert sorted(path.name for path in out.glob("*.safetensors")) == files
    found: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= load_file(out / file)
    return found


def assert_same(ours: dict[str, torch.Tensor], module: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == module.keys()
    for name, value in module.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("world", "stage"), [(2, 0), (2, 2), (2, 3), (1, 1)])
def test_equals_the_modules_state_dict(ranks, tmp_path, world, stage, precision):
    state = ranks(world).run(save, str(tmp_path / "c"), config(stage, 1, 0.5, precision), "plain")[0]
    assert_same(loaded(export(tmp_path / "c", tmp_path / "out")), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out"]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("kind", "precision"), [("frozen", "fp32"), ("frozen", "bf16"), ("mixed", "fp32"), ("normed", "fp32")]
)
def test_frozen_parameters_buffers_and_other_dtypes(ranks, tmp_path, kind, stage, precision):
    state = ranks(2).run(save, str(tmp_path / "c"), config(stage, 1, 0.0, precision), kind)[0]
    ours = loaded(export(tmp_path / "c", tmp_path / "out"))
    assert_same(ours, state)
    if kind == "normed":  # a buffer without dimensions, of integers
        assert ours["batch_norm.num_batches_tracked"].shape == () and ours["batch_norm.num_batches_tracked"] == 2


@pytest.mark.parametrize("stage", [0, 3])
def test_tied_parameters_are_there_once_under_their_first_name(ranks, tmp_path, stage):
    state = ranks(2).run(save, str(tmp_path / "c"), config(stage, 1, 0.0), "tied")[0]
    out = export(tmp_path / "c", tmp_path / "out")
    assert torch.equal(state.pop("head.weight"), state["embedding.weight"])
    assert_same(loaded(out), state)
    model = make("tied")
    assert load_model(model, out / "model.safetensors", strict=True) == (set(), [])
    assert torch.equal(model.head.weight, state["embedding.weight"])


class Shared(nn.Module):
    """Two modules hold one buffer, and a block is called as torch.compile wraps it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 5)
        self.embedding.register_buffer("scale", torch.full((1, 2), 0.5))
        self.head = nn.Module()
        self.head._orig_mod = nn.Linear(5, 37)
        self.head._orig_mod.register_buffer("scale", self.embedding.scale)

    def forward(self, tokens, targets):
        logits = self.head._orig_mod(self.embedding(tokens)) * self.embedding.scale[0, 0]
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def save_shared(folder: str) -> None:
    trained(config(2, 1, 0.0), Shared()).save_checkpoint(folder)


def test_a_shared_buffer_is_there_once_and_compiled_blocks_have_their_own_names(ranks, tmp_path):
    ranks(2).run(save_shared, str(tmp_path / "c"))
    ours = loaded(export(tmp_path / "c", tmp_path / "out"))
    assert ours.keys() == {"embedding.weight", "embedding.scale", "head.weight", "head.bias"}
    assert ours["embedding.scale"].tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("shard", ["512B", "4KiB"])
def test_several_shards(ranks, tmp_path, shard, capfd):
    state = ranks(2).run(save, str(tmp_path / "c"), config(3, 1, 0.0), "plain")[0]
    out = export(tmp_path / "c", tmp_path / "out", "--shard-size", shard, "--json")
    assert_same(loaded(out), state)
    limit = 512 if shard == "512B" else 4096
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        held = load_file(out / file)
        assert len(held) == 1 or sum(value.numel() * value.itemsize for value in held.values()) <= limit
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    assert document["files"] == [*files, INDEX] and document["step"] == 2 and document["dtype"] == "fp32"
    assert document["parameters"] == sum(value.numel() for value in state.values())
    assert [line.split(":")[0] for line in captured.err.splitlines()] == [
        f"{number}/{len(files)} {file}" for number, file in enumerate(files, 1)
    ]


@pytest.mark.parametrize("word", ["fp32", "fp16"])
def test_another_dtype_is_rounded_from_the_masters(ranks, tmp_path, word):
    exact = ranks(2).run(save, str(tmp_path / "c"), config(2, 1, 0.0), "normed")[0]
    ours = loaded(export(tmp_path / "c", tmp_path / "out", "--dtype", word))
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[word]
    assert_same(ours, {n: value.to(dtype) if value.is_floating_point() else value for n, value in exact.items()})


def save_huge(folder: str) -> None:
    model = make("flatland")
    with torch.no_grad():
        model.head.bias[3] = 1e6
    trained(config(2, 1, 0.0), model).save_checkpoint(folder)


def test_values_that_fp16_does_not_hold_are_an_error(ranks, tmp_path, capfd):
    ranks(2).run(save_huge, str(tmp_path / "c"))
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "out"), "--dtype", "fp16"]) == 2
    assert "head.bias has values beyond 65,504" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


# ---- what is known of the model --------------------------------------------------------------------------------------
def save_gpt(folder: str, settings, tied: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, the logits of the engine's module)."""
    from runtime.config.presets import GPTConfig
    from runtime.engine.initialize import initialize
    from runtime.models.gpt import GPT

    model = GPT(GPTConfig(layers=3, heads=2, dim=24, vocab_size=64, max_seq_len=16, tied=tied))
    engine = initialize(model=model, config=settings)[0]
    tokens = torch.arange(2 * 16).view(2, 16)
    for _ in range(2):
        engine.backward(engine(tokens, tokens.roll(-1, 1)))
        engine.step()
    engine.save_checkpoint(folder)
    engine.eval()
    with torch.no_grad():
        return tokens, engine(tokens).clone()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("stage", "tied"), [(0, False), (2, True), (3, True)])
def test_the_built_in_gpt_is_built_again_with_the_same_logits(ranks, tmp_path, stage, tied, precision):
    from runtime.models.exported import load_exported

    tokenizer = tmp_path / "tokens"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tokenizer / "pytorch_model.bin").write_text("no part of it")
    settings = config(stage, 1, 0.0, precision) | {"zerotop": {"data": {"tokenizer": str(tokenizer)}}}
    tokens, logits = ranks(2).run(save_gpt, str(tmp_path / "c"), settings, tied)[0]
    out = export(tmp_path / "c", tmp_path / "out", "--shard-size", "20KB")
    described = json.loads((out / "config.json").read_text())
    assert described["model_type"] == "zerotop-gpt"
    assert described["torch_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    assert {path.name for path in out.iterdir() if "safetensors" not in path.name} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    model = load_exported(out)
    with torch.no_grad():
        assert torch.equal(model(tokens), logits)
    assert (model.head.weight is model.embedding.weight) == tied


def test_a_folder_that_holds_no_gpt_is_refused(tmp_path):
    from runtime.config.presets import ModelError
    from runtime.models.exported import load_exported

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="not an exported GPT"):
        load_exported(tmp_path)


class Config:
    """Hugging Face's, as far as a checkpoint looks at it."""

    def to_json_string(self) -> str:
        return '{"model_type": "flat", "dtype": "float32"}'


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs)


def save_wrapped(folder: str) -> dict[str, torch.Tensor]:
    model = make("flatland")
    model.config, model.generation_config = Config(), Config()
    engine = trained(config(3, 1, 0.0, "bf16"), Wrapper(model))
    engine.save_checkpoint(folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_hugging_face_config_comes_along_and_a_wrappers_prefix_goes(ranks, tmp_path):
    state = ranks(2).run(save_wrapped, str(tmp_path / "c"))[0]
    out = export(tmp_path / "c", tmp_path / "out")
    assert_same(loaded(out), state)
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "flat",
        "dtype": "bfloat16",
        "architectures": ["Flatland"],
    }
    assert json.loads((out / "generation_config.json").read_text())["model_type"] == "flat"


# ---- memory ----------------------------------------------------------------------------------------------------------
PEAK = """
import sys
from runtime.export.__main__ import main

exit_code = main()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024)
sys.exit(exit_code)
"""


class Heavy(nn.Module):
    """160 MiB in tensors of 8."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1024, 2048, bias=False) for _ in range(layers))


def save_heavy(folder: str, layers: int) -> None:
    from runtime.engine.initialize import initialize

    initialize(model=Heavy(layers), config=config(2, 1, 0.0))[0].save_checkpoint(folder, "heavy")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process held at most")
def test_memory_is_one_shard_and_one_tensor_and_the_forecast_says_so(ranks, tmp_path):
    def peak_bytes(layers: int, shard_bytes: int = 32 << 20) -> int:
        folder = tmp_path / str(layers)
        if not folder.exists():
            ranks(2).run(save_heavy, str(folder), layers)
        words = [str(folder / "heavy"), str(folder / f"out-{shard_bytes}"), "--shard-bytes", str(shard_bytes)]
        done = subprocess.run(
            [sys.executable, "-P", "-c", PEAK, *words], capture_output=True, text=True, check=True, timeout=patient(90)
        )
        return int(done.stdout.splitlines()[-1])

    small = peak_bytes(1)
    assert peak_bytes(20) - small < (32 + 8) << 20  # of 160; what libraries take is in both
    whole = peak_bytes(20, EXPORT_FILE_BYTES)
    planned, of_one = (export_bytes(layers * (8 << 20), 2 << 20, 2) for layers in (20, 1))
    assert whole - small == pytest.approx(planned - of_one, rel=0.1)
    assert 0.7 * planned < whole < 1.3 * planned  # which versions of torch and of libraries differ in
