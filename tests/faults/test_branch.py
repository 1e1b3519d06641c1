"""A branch of a real run: it goes on from the checkpoint as the run itself did, and leaves it by what was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.checkpoint.format.folder import complete_checkpoints
from runtime.config import ConfigError
from runtime.wire.rundir import read_run
from tests.harness.runs import StartedRun
from zerotop.cli import main
from zerotop.compare.curves import read_curves
from zerotop.launch.branching import Branch, find_branch
from zerotop.rundir.directory import read_entry
from zerotop.rundir.paths import RunError

pytestmark = pytest.mark.timeout(300)
STEPS, AT = 40, 10  # the first checkpoint: later ones may be put off while it is still being written
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zerotop": {
        "model": {"preset": "gpt-tiny"},
        "data": {"seq_len": 16, "files": ["text.txt"]},
        "train": {"steps": STEPS},
        "checkpoint": {"interval": 10, "keep": 10},
    },
}
Launch = Callable[..., StartedRun]


def losses(run: StartedRun) -> dict[int, float | None]:
    return {point.step: point.loss for point in read_curves(read_entry(run.path)).points}


def branch_of(run: StartedRun, step: int | None = AT) -> Branch:
    return find_branch(read_entry(run.path), step)


def test_a_branch_repeats_its_run_and_leaves_it_by_another_learning_rate(
    launch_real: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = launch_real(CONFIG, name="trunk")
    trunk.see_end("finished", deadline_s=90)
    whole = losses(trunk)
    assert sorted(whole) == list(range(1, STEPS + 1))

    same = launch_real(CONFIG, config_path=None, nproc=None, device="auto", name="same", branch=branch_of(trunk))
    slower = launch_real(
        CONFIG,
        config_path=None,
        nproc=None,
        device="auto",
        name="slower",
        branch=branch_of(trunk),
        overrides=["optimizer.params.lr=1e-4"],
    )
    slower.see_step(AT + 1, deadline_s=90)
    # The live screen of a branch shows the curve of its run up to the branch.
    assert [point.step for point in slower.source.state.series][:AT] == list(range(1, AT + 1))
    events = [getattr(record, "text", "") for record in slower.source.state.events]
    assert f"branch of trunk at step {AT}" in events
    # Both are live here: neither needs the trunk's checkpoint any more.
    shutil.rmtree(trunk.path / "checkpoints" / f"step-{AT:08d}")
    same.see_end("finished", deadline_s=120)
    slower.see_end("finished", deadline_s=120)

    assert losses(same) == whole  # bit for bit: optimizer states, random states and the place in the data
    other = losses(slower)
    assert {step: other[step] for step in range(1, AT + 2)} == {step: whole[step] for step in range(1, AT + 2)}
    assert all(other[step] != whole[step] for step in range(AT + 2, STEPS + 1))
    rates = {point.step: point.lr for point in read_curves(read_entry(slower.path)).points}
    assert rates[AT] == 1e-3 and {rates[step] for step in range(AT + 1, STEPS + 1)} == {1e-4}

    point = read_run(slower.path).branch_of
    assert point is not None and (point.run, point.step, point.path) == ("trunk", AT, str(trunk.path))
    saved = [one.step for one in complete_checkpoints(slower.path / "checkpoints")]
    assert saved[0] == AT and saved[-1] == STEPS

    capsys.readouterr()
    assert main(["compare", "trunk", "slower", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["common_steps"] == STEPS - AT
    assert [one["key"] for one in document["config"]] == ["optimizer.lr"]


def test_what_a_branch_must_not_change_and_where_it_can_start(launch_real: Launch, tmp_path: Path) -> None:
    config = json.loads(json.dumps(CONFIG))
    config["zerotop"]["train"]["steps"] = 12
    trunk = launch_real(config, name="trunk")
    trunk.see_end("finished", deadline_s=90)
    assert branch_of(trunk, None).step == 12
    with pytest.raises(RunError, match=r"no complete checkpoint at step 7; there are those of step 10, 12"):
        branch_of(trunk, 7)
    arguments = {"config_path": None, "nproc": None, "device": "auto", "name": "other", "branch": branch_of(trunk, 10)}
    with pytest.raises(RunError, match=r"branch can't continue trunk with another\n  - seed"):
        launch_real(config, **arguments, overrides=["zerotop.train.seed=5"])
    with pytest.raises(ConfigError, match="lrr"):
        launch_real(config, **arguments, overrides=["optimizer.params.lrr=5"])
    shutil.rmtree(trunk.path / "checkpoints" / "step-00000010")
    with pytest.raises(RunError, match="was pruned meanwhile"):
        launch_real(config, **arguments)
    assert not (trunk.path.parent / "other").exists()  # nothing is left behind
