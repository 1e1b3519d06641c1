"""zerotop data: what a config trains on, with a process in place of the trainer's."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zerotop.launch.preparation as preparation
from runtime.wire.finetuning import DataReport
from tests.harness.finetuning import data_report
from zerotop.cli import main
from zerotop.commands.data_text import render
from zerotop.launch.child import child_process

TRAINER = """
import json, sys
asked = json.load(sys.stdin)
print("tokenizing 7168 rows", file=sys.stderr, flush=True)
json.dump(asked, open({asked!r}, "w"))
{then}
print(json.dumps({document}))
sys.exit({code})
"""
REPORTS = [data_report(), data_report("evaluation")]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "finetune.json"
    section = {"model": {"path": "m"}, "data": {"files": ["chats.jsonl"]}}
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zerotop": section}))
    return path


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a process in place of the trainer's; returns the file in which it leaves what it was asked."""

    def install(document: Any = None, code: int = 0, then: str = "") -> Path:
        if document is None:
            document = {"reports": [report.model_dump(mode="json") for report in REPORTS]}
        asked = tmp_path / "asked.json"
        script = tmp_path / "trainer.py"
        script.write_text(
            TRAINER.format(asked=str(asked), document=f"json.loads({json.dumps(document)!r})", code=code, then=then)
        )

        def child(command: list[str], *arguments: Any, **named: Any) -> Any:
            assert command[1:] == ["-P", "-m", "runtime.trainer.prepare"]
            return child_process([sys.executable, str(script)], *arguments, **named)

        monkeypatch.setattr(preparation, "child_process", child)
        there = importlib.util.find_spec("json")
        monkeypatch.setattr(preparation.importlib.util, "find_spec", lambda name: there)  # type: ignore[attr-defined]
        return asked

    return install


def test_the_reports_are_shown_with_brackets_where_there_is_no_terminal(
    config: Path, trainer: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = trainer()
    assert main(["data", str(config), "--samples", "1", "--set", "zerotop.data.seq_len=2048"]) == 0
    output, errors = capfd.readouterr()
    assert "\x1b" not in output
    assert "training data" in output and "evaluation data" in output
    assert "assistant: 468K of 1.31M tokens, 36%" in output
    assert "51 without an assistant turn, 12 empty" in output
    assert "31 samples, 4.21K tokens cut off" in output
    assert "655 of 2,048 tokens, packed, 98% full" in output
    assert "note: notes.txt: rows of text" in output
    assert "⟦Mount Everest, at 8,849 metres above sea level.⟧⟦<|im_end|>⟧↵" in output
    assert "<|im_start|>user↵\n    What is the tallest mountain?<|im_end|>↵" in output
    assert "╌ next document ╌" in output
    assert output.count("example 1 of") == 2 and "example 2 of" not in output
    assert errors.splitlines() == ["preparing the data", "tokenizing 7168 rows"]
    told = json.loads(asked.read_text())
    assert told["folder"] == str(config.parent)
    assert told["config"]["zerotop"]["data"]["files"] == ["chats.jsonl"]
    assert told["config"]["zerotop"]["data"]["seq_len"] == 2048


def test_json_has_the_reports_alone(
    config: Path, trainer: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    trainer()
    assert main(["data", str(config), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert list(document) == ["reports"]
    assert [DataReport.model_validate(report) for report in document["reports"]] == REPORTS


def test_data_that_cannot_be_used_is_one_message_and_exit_code_2(
    config: Path, trainer: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    problem = "chats.jsonl, line 7: not JSON (2 more like it): mend or remove these lines"
    trainer({"problems": [problem]}, code=2)
    assert main(["data", str(config), "--json"]) == 2
    output, errors = capfd.readouterr()
    assert problem in json.loads(output)["error"] and problem in errors and "Traceback" not in errors


def test_a_config_of_the_built_in_model_is_refused(
    config: Path, trainer: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = trainer()
    config.write_text("{}")
    assert main(["data", str(config)]) == 2
    assert "zerotop.model.path is not set" in capfd.readouterr().err and not asked.exists()


def test_batch_sizes_for_more_gpus_than_are_here_do_not_matter(
    config: Path, trainer: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    trainer()
    batch = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    config.write_text(json.dumps({**json.loads(config.read_text()), **batch}))
    assert main(["data", str(config), "--samples", "0"]) == 0
    assert "example" not in capfd.readouterr().out


def test_ctrl_c_ends_the_trainer_and_leaves_no_traceback(config: Path, tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    script = tmp_path / "slow.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        f"    pathlib.Path({str(ended)!r}).touch()\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('tokenizing', file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n"
    )
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import importlib.util, sys\n"
        "import zerotop.launch.preparation as preparation\n"
        "from zerotop.cli import main\n"
        "from zerotop.launch.child import child_process\n"
        f"slow = [sys.executable, {str(script)!r}]\n"
        "preparation.child_process = lambda command, *a, **k: child_process(slow, *a, **k)\n"
        "there = importlib.util.find_spec('json')\n"
        "preparation.importlib.util.find_spec = lambda name: there\n"
        f"sys.exit(main(['data', {str(config)!r}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(preparation.__file__).parents[2])}
    command = subprocess.Popen(
        [sys.executable, str(driver)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert command.stderr is not None
    assert [command.stderr.readline(), command.stderr.readline()] == ["preparing the data\n", "tokenizing\n"]
    command.send_signal(signal.SIGINT)
    output, errors = command.communicate(timeout=60)
    assert (command.returncode, output, errors) == (130, "", "") and ended.exists()


@pytest.mark.parametrize(("colour", "code"), [(True, "\x1b[4;1;36m"), (False, "\x1b[4;1m")])
def test_on_a_terminal_trained_tokens_are_underlined_also_without_colour(colour: bool, code: str) -> None:
    text = render([data_report()], 1, colour=colour, styled=True, width=100)
    assert f"{code}Mount Everest, at 8,849 metres above sea level.\x1b[0m" in text and "⟦" not in text
    assert f"{code}underlined\x1b[0m tokens are trained" in text


def test_data_that_looks_like_colours_does_not_pass_for_ours() -> None:
    report = data_report()
    run = report.examples[0].runs[1].model_copy(update={"text": "a\x1b[4;1;36mb\x1b]0;owned\x07c"})
    sample = report.examples[0].model_copy(update={"runs": [run]})
    text = render([data_report(examples=[sample], files=["\x1b[31mx"])], 1, colour=True, styled=True, width=100)
    assert "    abc" in text and "\x1b[31m" not in text and "\x1b]" not in text
