"""zerotop config: the user's own settings, where they come from, and the config of a run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

VARIABLES = (
    ("ZEROTOP_THEME", "the theme of the screen"),
    ("NO_COLOR", "no colours if it is set"),
    ("ZEROTOP_SSH", "the ssh command for user@host"),
    ("XDG_STATE_HOME", "where runs are kept"),
    ("XDG_CONFIG_HOME", "where keys.toml and themes/ are"),
    ("XDG_CACHE_HOME", "where prepared data is kept"),
)


def register(subparsers: Any) -> None:
    """Add `config` to the command line."""
    parser = subparsers.add_parser(
        "config",
        help="show your settings and where they come from, or the config of a run",
        description="Without RUN: your own settings of zerotop, each with where it comes from and how to change it. "
        "With RUN: every value that the run uses, defaults too.",
        epilog="examples:\n  zerotop config\n  zerotop config q1\n  zerotop config q1 optimizer",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", metavar="RUN")
    parser.add_argument("key", nargs="?", metavar="KEY", help="one key of the run's config, such as optimizer.lr")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(arguments: argparse.Namespace) -> int:
    """Print the settings, or a run's config."""
    from zerotop.output import print_json, show

    if arguments.run is not None:
        value = _run_config(arguments.run, arguments.key)
        if arguments.json:
            print_json(value)
        else:
            show("\n".join(_flat(value, arguments.key or "")))
        return 0
    document = settings_document()
    if arguments.json:
        print_json(document)
    else:
        show(_text(document))
    return 0


def settings_document() -> dict[str, Any]:
    """The user's settings, and what is wrong with them."""
    from zerotop.rundir.paths import config_home, runs_home
    from zerotop.tui.keys import KEYS, load_keymap
    from zerotop.tui.theme import DEFAULT, load_palettes

    palettes, problems = load_palettes()
    keymap, key_problems = load_keymap()
    wanted = os.environ.get("ZEROTOP_THEME", DEFAULT)
    if wanted not in palettes:
        problems = [*problems, f"ZEROTOP_THEME={wanted}: no such theme; there are {', '.join(palettes)}"]
    return {
        "runs": str(runs_home()),
        "keys_file": str(config_home() / "keys.toml"),
        "themes_folder": str(config_home() / "themes"),
        "theme": wanted if wanted in palettes else DEFAULT,
        "themes": list(palettes),
        "keys": {key.id: keymap.get(key.id, key.keys) for key in KEYS},
        "changed_keys": sorted(keymap),
        "variables": {name: os.environ.get(name) for name, _ in VARIABLES},
        "problems": [*problems, *key_problems],
    }


def _text(document: dict[str, Any]) -> str:
    from zerotop.output import table

    keys_file = Path(document["keys_file"])
    changed = document["changed_keys"]
    there = ", ".join(f"{name} = {document['keys'][name]}" for name in changed) or "the default keys"
    rows = [
        ("runs", document["runs"], "XDG_STATE_HOME"),
        ("theme", f"{document['theme']} (of {', '.join(document['themes'])})", "ZEROTOP_THEME"),
        ("themes of your own", document["themes_folder"] + "/NAME.toml", ""),
        ("keys", there, f"{keys_file}" + ("" if keys_file.exists() else " (not there)")),
    ]
    rows += [(name, document["variables"][name] or "not set", line) for name, line in VARIABLES]
    lines = [table(("SETTING", "VALUE", "FROM"), rows)]
    lines += [f"problem: {problem}" for problem in document["problems"]]
    return "\n".join(lines)


def _run_config(name: str, key: str | None) -> Any:
    import json

    from zerotop.output import CommandError
    from zerotop.rundir.directory import find_run

    entry = find_run(name)
    try:
        value: Any = json.loads((entry.path / "resolved.json").read_bytes())
    except (OSError, ValueError) as error:
        raise CommandError(f"can't read {entry.path / 'resolved.json'}: {error}") from None
    value.pop("notes", None)
    walked: list[str] = []
    for word in key.split(".") if key else []:
        if not isinstance(value, dict) or word not in value:
            at = ".".join(walked)
            choices = f"; {at or 'the config'} has {', '.join(value)}" if isinstance(value, dict) else ""
            raise CommandError(f"the config of {name} has no key {key!r}{choices}")
        value = value[word]
        walked.append(word)
    return value


def _flat(value: Any, key: str) -> list[str]:
    import json

    if isinstance(value, dict) and value:
        return [line for name, item in value.items() for line in _flat(item, f"{key}.{name}" if key else name)]
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}"]
