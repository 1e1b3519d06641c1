"""What launch checks before it starts anything."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime.config import ConfigError, Resolved, load
from runtime.wire.messages import RunStatus
from tests.harness.fakerun import write_run
from zerotop.launch import start as launching
from zerotop.launch.branching import find_branch
from zerotop.rundir.directory import find_run
from zerotop.rundir.paths import RunError, runs_home


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def test_a_config_for_one_rank_gets_one_on_a_cpu(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    batch = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 16, "gradient_accumulation_steps": 4}
    config.write_text(json.dumps(batch))
    assert launching._check(config, None, "cpu", None, (), False, None).nproc == 1
    config.write_text(json.dumps({"train_batch_size": 64}))
    assert launching._check(config, None, "cpu", None, (), False, None).nproc == min(2, os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ({"zerotop": {"data": {"tokenizer": "nowhere"}}}, 'tokenizer: expected "bytes", a tokenizer.json'),
        ({"zerotop": {"data": {"files": ["nothing-*.txt"]}}}, '"nothing-*.txt" matches no file'),
        ({"zerotop": {"model": {"path": "some/model"}}}, "zerotop.data.files: expected files to train on"),
    ],
)
def test_what_the_ranks_cannot_do_starts_nothing(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, **settings}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        launching.start_run(config, device="cpu", name="never")
    assert not (runs_home() / "never").exists()


def test_a_script_with_a_syntax_error_starts_nothing(tmp_path: Path) -> None:
    config, script = tmp_path / "config.json", tmp_path / "mine.py"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1}))
    script.write_text("x = 1\ndef (\n")
    with pytest.raises(RunError, match=re.escape("mine.py, line 2: invalid syntax; nothing was started")):
        launching.start_run(config, device="cpu", name="never", script=[str(script)])
    assert not (runs_home() / "never").exists()


def test_text_shorter_than_a_sequence_starts_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    (tmp_path / "short.txt").write_text("a few words")
    data = {"files": ["short.txt"], "seq_len": 64}
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zerotop": {"data": data}}))
    with pytest.raises(ConfigError, match=re.escape("zerotop.data.seq_len: 64 tokens are more than the text")):
        launching.start_run(config, device="cpu", name="never")
    assert not (runs_home() / "never").exists()


def test_when_no_number_of_ranks_fits_the_message_is_about_the_usual_one(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    batch = {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    config.write_text(json.dumps(batch))
    with pytest.raises(ConfigError, match=f"30 != 4 x 4 x {min(2, os.cpu_count() or 1)}"):
        launching.start_run(config, device="cpu", name="never")


def test_a_resume_names_no_webhook_among_what_it_changes(tmp_path: Path) -> None:
    def resolved(**section: object) -> Resolved:
        return load({"zerotop": section}).resolve(2, "cpu")

    before = resolved(notify=[{"webhook": "https://example.com/SECRET"}], log={"interval": 5})
    (tmp_path / "resolved.json").write_text(before.to_json())
    previous = SimpleNamespace(path=tmp_path, name="r1")
    after = resolved(notify=[{"webhook": "https://example.com/ANOTHER"}], log={"interval": 6})
    assert [note["text"] for note in launching._compare(previous, after, "no")] == [  # type: ignore[arg-type]
        "zerotop.log.interval: 5 -> 6",
        'zerotop.notify: "(hidden)" -> "(hidden)"',
    ]


@pytest.mark.parametrize("what", ["--resume", "branch"])
def test_a_command_of_the_user_s_own_is_neither_resumed_nor_branched(what: str, tmp_path: Path) -> None:
    """In one line that says what to do; its config is empty, so that a resume would train zerotop's own small GPT."""
    words = ["torchrun", "train.py", "--name", "a b"]
    status = RunStatus(name="q1", state="failed", last_checkpoint_step=10)
    write_run(tmp_path / "state", "q1", tmp_path, status, wrapped=words, supervisor_pid=0)
    with pytest.raises(RunError) as refused:
        if what == "branch":
            find_branch(find_run("q1"), None)
        else:
            launching.start_run(None, name="q1", resume=True)
    text = str(refused.value)
    assert text.startswith(f"{what} can't continue q1, which is a command of your own")
    assert text.endswith("zerotop run -- torchrun train.py --name 'a b'") and "\n" not in text
    with pytest.raises(RunError, match=r"q1 exists \(failed\): choose another --name"):
        launching.start_run(None, name="q1")
