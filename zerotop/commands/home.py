"""zerotop alone: the runs of this user, to open one; where there are none, what to type, and a demo run."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def show_runs() -> int:
    """The list of runs until the user leaves it. A run that is opened comes back to it."""
    from zerotop.commands.attach import show
    from zerotop.commands.replay import play
    from zerotop.output import say
    from zerotop.rundir.directory import find_run
    from zerotop.source.base import SourceError
    from zerotop.source.opening import open_source
    from zerotop.tui.runs import RunsApp
    from zerotop.tui.terminal import run_app

    selected = ""
    while True:
        app = RunsApp(demo_problem(), selected)
        choice = run_app(app)
        if app.left_by is not None:
            return 128 + app.left_by
        if choice is None:
            return 0
        what, selected = choice
        if what == "demo":
            selected = start_demo()
            what = "open"
        entry = find_run(selected)
        try:
            code = show(open_source(entry), entry=entry) if what == "open" else play(entry)
        except SourceError as error:  # a run on another host, or without a recording: the list shows why
            say(str(error))
            continue
        if code > 128:
            return code  # a signal ended the screen


def demo_problem() -> str:
    """Why no demo run can be started here; empty if one can."""
    import importlib.util

    from runtime.process.extras import INSTALL_TRAINING

    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    return f"training needs {' and '.join(missing)}, not installed here: {INSTALL_TRAINING}" if missing else ""


def start_demo() -> str:
    """Start a two-rank run of the built-in small GPT on the CPU; returns its name."""
    from zerotop.commands.launch import first_words
    from zerotop.launch.start import start_run
    from zerotop.output import say
    from zerotop.rundir.directory import runs_home

    number = 1
    while (runs_home() / f"demo-{number}").exists():
        number += 1
    say("starting the demo run: two ranks, ZeRO stage 2, the source text of Python's standard library")
    entry = start_run(demo_config(), nproc=2, device="cpu", name=f"demo-{number}")
    say(first_words(entry))
    return entry.name


def demo_config() -> Path:
    """examples/quickstart.json, of the package or of the source folder."""
    source = Path(__file__).parents[2] / "examples" / "quickstart.json"
    return source if source.is_file() else Path(str(files("zerotop") / "examples" / "quickstart.json"))
