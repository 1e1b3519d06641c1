"""What `zerotop export` writes is what the engine's module computed with, bit for bit, at any stage and world size."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from runtime.wire.messages import RunStatus
from tests.faults.conftest import until
from tests.numerics.models import make
from tests.numerics.test_parity import config, micro_batch
from tests.unit.fakerun import write_run
from zerotop.cli import main

INDEX = "model.safetensors.index.json"


def trained(settings, model) -> object:
    import torch.distributed as dist

    from runtime.api import initialize

    engine = initialize(model=model, config=settings)[0]
    for step in range(2):
        engine.backward(_loss(engine(*micro_batch(step, 0, dist.get_rank(), dist.get_world_size()))))
        engine.step()
    return engine


def _loss(output):
    return output["loss"] if isinstance(output, dict) else output


def save(folder: str, settings, kind: str) -> dict[str, torch.Tensor]:
    """Save FOLDER/step-00000002; returns the module's state_dict."""
    engine = trained(settings, make(kind))
    engine.save_checkpoint(folder)
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def export(*words: object) -> Path:
    """`zerotop export WORDS...`, in this process but for its child; OUT."""
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
    from runtime.api import initialize
    from runtime.models.gpt import GPT
    from runtime.models.presets import GPTConfig

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
    from runtime.models.exported import load_exported
    from runtime.models.presets import ModelError

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no exported GPT"):
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


# ---- runs, folders, errors -------------------------------------------------------------------------------------------
def save_steps(folder: str, steps: list[int]) -> None:
    from runtime.checkpoint import step_tag

    engine = trained(config(0, 1, 0.0), make("flatland"))
    for step in steps:
        engine.global_steps = step
        engine.save_checkpoint(folder, step_tag(step))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_run_is_found_by_name_and_step(ranks, tmp_path, home, capfd):
    run = write_run(home, "q1", Path("/nowhere"), RunStatus(name="q1", state="finished"))
    ranks(1).run(save_steps, str(run / "checkpoints"), [100, 20])
    elsewhere = write_run(home, "q2", Path("/nowhere"), RunStatus(name="q2", state="finished"))
    (elsewhere / "resolved.json").write_text(json.dumps({"zerotop": {"checkpoint": {"folder": str(tmp_path / "far")}}}))
    ranks(1).run(save_steps, str(tmp_path / "far" / "q2"), [7])
    for number, (words, step) in enumerate(
        [("q1", 100), ("q1/step-20", 20), ("q1/step-00000020/", 20), (run, 100), (run / "checkpoints", 100), ("q2", 7)]
    ):
        export(words, tmp_path / f"out-{number}", "--json")
        assert json.loads(capfd.readouterr().out)["step"] == step, words
    for words, message in [
        (["q1/step-21"], "run q1 has no checkpoint step-21"),
        (["q3"], "q3 is no folder, and there is no run called 'q3'. Runs: q"),
        ([str(tmp_path)], "no complete checkpoint"),
        ([str(run / "run.json")], "is a file"),
    ]:
        assert main(["export", *words, str(tmp_path / "new")]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_overwriting_replaces_an_exported_model_and_nothing_else(ranks, tmp_path, capfd, monkeypatch):
    ranks(1).run(save_steps, str(tmp_path / "c"), [1])
    out = export(tmp_path / "c", tmp_path / "out", "--shard-size", "512B")
    before = sorted(path.name for path in out.iterdir())
    words = ["export", str(tmp_path / "c"), str(out)]
    assert main(words) == 2
    assert "is not empty: choose another folder, or replace this one with --overwrite" in capfd.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == before
    assert main([*words, "--overwrite"]) == 0
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    (out / "thesis.tex").write_text("ten years of work")
    capfd.readouterr()
    assert main([*words, "--overwrite"]) == 2
    assert "holds thesis.tex, which is no part of an exported model" in capfd.readouterr().err
    inside = str(tmp_path / "c" / "step-00000001" / "out")
    assert main(["export", str(tmp_path / "c"), inside]) == 2
    assert "inside the checkpoint" in capfd.readouterr().err
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(tmp_path / "c"), "."]) == 2
    assert "the current folder" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "here", "out"]


@pytest.fixture
def checkpoint(ranks, tmp_path):
    ranks(2).run(save, str(tmp_path / "c"), config(2, 1, 0.0), "plain")
    return tmp_path / "c" / "step-00000002"


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "manifest.json").unlink(), "a checkpoint without its manifest"),
        (lambda path: _truncate(path / "manifest.json"), "manifest.json cannot be read: Invalid JSON"),
        (lambda path: (path / ".metadata").unlink(), "incomplete (it has no .metadata)"),
        (lambda path: _truncate(path / ".metadata"), "is damaged"),
        (lambda path: (path / "__1_0.distcp").unlink(), "incomplete (it has no __1_0.distcp)"),
        (lambda path: _truncate(path / "__0_0.distcp"), "bytes, expected"),
        (lambda path: (path / "__0_0.distcp").write_bytes(bytes(2**20)), "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(checkpoint, tmp_path, capfd, damage, message):
    damage(checkpoint)
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--json"]) == 2
    captured = capfd.readouterr()
    assert message in json.loads(captured.out)["error"]
    assert captured.err.startswith("zerotop: ") and len(captured.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_parameter_that_the_metadata_lack_is_an_error(checkpoint, tmp_path, capfd):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    del metadata.state_dict_metadata["param.norm.weight"]
    chunks = metadata.state_dict_metadata["param.head.weight"].chunks
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "it lacks param.norm.weight" in capfd.readouterr().err
    metadata.state_dict_metadata["param.norm.weight"] = metadata.state_dict_metadata["param.norm.bias"]
    assert len(chunks) == 2
    chunks.pop()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 2
    assert "it lacks parts of param.head.weight" in capfd.readouterr().err


def test_the_command_itself_loads_no_torch(checkpoint, tmp_path):
    program = "import sys; from zerotop.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    words = ["export", str(checkpoint), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-P", "-c", program, *words], capture_output=True, text=True, timeout=90)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_bad_values_are_usage_errors(checkpoint, tmp_path, capfd):
    out = str(tmp_path / "out")
    assert main(["export", str(checkpoint), out, "--shard-size", "5"]) == 2
    assert "--shard-size: expected a size with a unit" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", str(checkpoint), str(tmp_path / "file")]) == 2
    assert "file is a file: expected a folder" in capfd.readouterr().err


def test_no_room_on_the_disk_is_said_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    from runtime.checkpoint import export as process
    from runtime.checkpoint import target

    monkeypatch.setattr(target.shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    words = SimpleNamespace(
        checkpoint=checkpoint, out=tmp_path / "out", dtype="auto", shard_bytes=1000, overwrite=False
    )
    with pytest.raises(OSError, match=r"not enough disk space .* are needed, 4.00 KiB are free"):
        process.export(words)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_the_system_refuses_is_one_line_and_exit_code_1(checkpoint, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    assert main(["export", str(checkpoint), str(tmp_path / "file" / "out")]) == 1
    message = capfd.readouterr().err
    assert len(message.splitlines()) == 1 and str(tmp_path / "file") in message


SLOW = """
import sys, time
from safetensors.torch import save_file
import runtime.checkpoint.huggingface as module
from runtime.checkpoint.export import main

def save_and_wait(content, path, metadata):
    save_file(content, path, metadata=metadata)
    print("written", file=sys.stderr, flush=True)
    time.sleep(600)

module.save_file = save_and_wait
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_export_leaves_nothing(checkpoint, tmp_path, number):
    words = [str(checkpoint), str(tmp_path / "out"), "--shard-bytes", "1000"]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "written\n"
        assert (tmp_path / ".out.partial").is_dir()
        child.send_signal(number)
        output, rest = child.communicate(timeout=60)
    assert (child.returncode, output, rest) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_a_killed_export_left_does_not_hinder_the_next_and_two_at_once_do(checkpoint, tmp_path, capfd):
    words = [str(checkpoint), str(tmp_path / "out"), "--shard-bytes", "1000"]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SLOW, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "written\n"
        assert main(["export", *words[:2]]) == 2
        assert ".out.partial is being written by another export" in capfd.readouterr().err
        child.kill()
    assert list((tmp_path / ".out.partial").iterdir())
    out = export(*words[:2])
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out"]


def test_ctrl_c_ends_the_command_and_its_process(checkpoint, tmp_path):
    """As from a terminal, the command alone gets it. Its child is still importing torch."""
    import psutil

    words = ["export", str(checkpoint), str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-m", "zerotop", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        watched = psutil.Process(command.pid)
        until(lambda: bool(watched.children()), "the export's process")
        child = watched.children()[0]
        command.send_signal(signal.SIGINT)
        output, errors = command.communicate(timeout=60)
    assert not child.is_running()
    assert (command.returncode, output, errors) == (130, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


PEAK = """
import sys
from runtime.checkpoint.export import main

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
    from runtime.api import initialize

    initialize(model=Heavy(layers), config=config(2, 1, 0.0))[0].save_checkpoint(folder, "heavy")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what a process held at most")
def test_memory_is_one_shard_and_one_tensor(ranks, tmp_path):
    def peak_bytes(layers: int) -> int:
        folder = tmp_path / str(layers)
        ranks(2).run(save_heavy, str(folder), layers)
        words = [str(folder / "heavy"), str(folder / "out"), "--shard-bytes", str(32 << 20)]
        done = subprocess.run(
            [sys.executable, "-P", "-c", PEAK, *words], capture_output=True, text=True, check=True, timeout=90
        )
        return int(done.stdout.splitlines()[-1])

    assert peak_bytes(20) - peak_bytes(1) < (32 + 8) << 20  # of 160; what libraries take is in both
