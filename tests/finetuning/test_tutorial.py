"""The commands of docs/finetune.md, with a tiny model in the place of the real one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT
from tests.harness.packages import needs
from tests.harness.tiny_chat import POSITIONS, save_chat_model, write_dialogues
from tests.harness.waiting import patient

needs("transformers")
pytestmark = pytest.mark.timeout(300)
DOCUMENT = ROOT / "docs" / "finetune.md"
EXAMPLE = ROOT / "examples" / "finetune.json"
MODEL, CHATS = "../build/tutorial/smollm2-135m-instruct.gguf", "../build/tutorial/chats.jsonl"


def commands() -> list[list[str]]:
    """The zerotop commands of the tutorial, in order."""
    text = DOCUMENT.read_text(encoding="utf-8").partition("\n## Models")[0]
    return [shlex.split(line) for line in text.splitlines() if line.startswith("zerotop ")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with examples/finetune.json, whose model is tiny and whose run is short."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_chat_model(tmp_path / "build" / "tutorial" / "tiny")
    write_dialogues(tmp_path / "build" / "tutorial" / "chats.jsonl", 60)
    config = json.loads(EXAMPLE.read_text())
    section = config["zerotop"]
    assert section["model"]["path"] == MODEL and section["data"]["files"] == [CHATS]
    section["model"]["path"] = "../build/tutorial/tiny"
    section["data"]["seq_len"] = POSITIONS
    section["train"]["steps"] = 6
    section["evaluation"] |= {"interval": 3, "new_tokens": 4, "split": 0.2}
    config["optimizer"]["params"]["lr"] = 1e-2
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "finetune.json").write_text(json.dumps(config))
    return tmp_path


def run(words: list[str], project: Path) -> str:
    """stdout of a command of zerotop, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "zerotop", *words[1:]],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=patient(120),
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_the_tutorial(project: Path) -> None:
    steps = commands()
    assert [words[1] for words in steps] == ["data", "plan", "launch", "export"]
    told = {words[1]: run(words, project) for words in steps}
    assert "messages" in told["data"] and "It is" in told["data"] and "<|im_end|>" in told["data"]
    assert "stage 3" in told["plan"]
    losses = [float(loss) for loss in re.findall(r"evaluation at step \d+: loss ([\d.]+)", told["launch"])]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    out = project / "build" / "tutorial" / "student"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= {
        path.name for path in out.iterdir()
    }

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Thanks"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answered = model.generate(**asked, max_new_tokens=4, do_sample=False)
    assert answered.shape[1] > asked["input_ids"].shape[1]
