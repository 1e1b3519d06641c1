"""The keys: one table from which bindings, footer, help and the user's key map are made."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from textual.binding import Binding
from textual.keys import KEY_NAME_REPLACEMENTS, Keys, key_to_character

from runtime.wire.profile import DEFAULT_STEPS
from zerotop.rundir.paths import config_home


@dataclass(frozen=True)
class Key:
    """`id` is its name in keys.toml. `steers`: it acts on the run, so it is disabled when the screen is read-only."""

    id: str
    keys: str
    action: str
    label: str
    help: str
    show: bool = False
    steers: bool = False

    @property
    def palette_title(self) -> str:
        """Its name among the commands of the palette."""
        return f"Panel: {self.label}" if self.id.startswith("panel.") else self.label

    def binding(self) -> Binding:
        """The binding for Textual."""
        return Binding(self.keys, self.action, self.label, show=self.show, id=self.id)


KEYS: tuple[Key, ...] = (
    Key("help", "question_mark", "help", "Help", "this page: all keys, columns and signs", show=True),
    Key(
        "detach",
        "q",
        "detach",
        "Leave",
        "leave the screen; the run continues, `zerotop attach` opens it again",
        show=True,
    ),
    Key("pause", "P", "pause_resume", "Pause", "pause at the next step boundary, or resume", True, True),
    Key("checkpoint", "C", "checkpoint", "Checkpoint", "write a checkpoint at the next step boundary", True, True),
    Key("set", "E,colon", "set_knob", "Set", "change a setting of the running run", True, True),
    Key("stop", "S", "stop", "Stop", "checkpoint at the next step boundary, then end the run (asks first)", True, True),
    Key("abort", "A", "abort", "Abort", "end the run now, without a checkpoint (asks first)", True, True),
    Key("stacks", "T", "stacks", "Stacks", "dump the stacks of all ranks, also when the run is stuck", steers=True),
    Key(
        "profile",
        "R",
        "profile",
        "Profile",
        f"profile the next {DEFAULT_STEPS} steps with torch.profiler; on a rank's page of that rank alone",
        steers=True,
    ),
    Key(
        "memory-snapshot",
        "M",
        "memory_snapshot",
        "Memory snapshot",
        "write what every rank's memory is used for: one step by category, unit and tensor",
        steers=True,
    ),
    Key(
        "data",
        "d",
        "data",
        "Data",
        "what is trained on, with examples; once more switches to evaluation data",
        show=True,
    ),
    Key("texts", "w", "texts", "Texts", "what the model writes for the fixed prompts, and all evaluations", show=True),
    Key("freeze", "f", "freeze", "Freeze", "freeze the view, not the run; once more follows again", show=True),
    Key("zoom", "z", "zoom", "Zoom", "the focused panel takes the whole screen, and gives it back", show=True),
    Key(
        "figure",
        "g",
        "next_figure",
        "Figure",
        "the next figure in the focused plot: loss, gradient norm, learning rate",
        show=True,
    ),
    Key("filter", "slash", "filter", "Filter", "filter the events; Esc clears", show=True),
    Key("theme", "t", "next_theme", "Theme", "the next theme", show=True),
    Key("panel.ranks", "1", "panel('ranks')", "Ranks", "to the ranks: ↑ ↓ select, Enter opens one"),
    Key("panel.learning", "2", "panel('learning')", "Loss", "to the loss"),
    Key("panel.speed", "3", "panel('speed')", "Throughput", "to the throughput"),
    Key("panel.memory", "4", "panel('memory')", "Memory", "to the selected rank's memory"),
    Key("panel.host", "5", "panel('host')", "Host", "to the host"),
    Key("panel.events", "6", "panel('events')", "Events", "to the events: ↑ ↓ scroll, End follows again"),
    Key("screenshot", "ctrl+s", "save_screenshot", "Save screenshot", "save the screen as an SVG picture"),
)
YIELDS = {"abort": "texts"}
"""Action -> the action that goes before it in a footer too narrow for both."""
STEERING = frozenset(key.action for key in KEYS if key.steers)
OTHER_HELP = (
    ("Tab, Shift+Tab", "the next panel, the one before"),
    ("Esc", "back from a rank, a dialog, a zoomed panel, a filter"),
    ("Ctrl+P", "all commands and themes by name"),
)
FIXED_KEYS = frozenset(
    ("escape", "tab", "shift+tab", "enter", "up", "down", "pageup", "pagedown", "home", "end", "j", "k", "[", "]")
) | {"ctrl+p", "ctrl+q", "ctrl+c"}
"""Keys bound by panels, screens and Textual itself; keys.toml cannot change them."""
_MODIFIERS = frozenset({"ctrl", "shift", "alt", "super", "meta", "hyper"})
_NAMED_KEYS = frozenset(key.value for key in Keys if "+" not in key.value and "<" not in key.value)
_UNICODE_NAMES = {short: name for name, short in KEY_NAME_REPLACEMENTS.items()}
_OTHER_NAMES = {
    "control": "ctrl",
    "esc": "escape",
    "return": "enter",
    "del": "delete",
    "ins": "insert",
    "pgup": "pageup",
    "pgdn": "pagedown",
}


def load_keymap() -> tuple[dict[str, str], list[str]]:
    """The user's keys from keys.toml (`id = "key"`), and a line for each entry that cannot be used."""
    path = config_home() / "keys.toml"
    if not path.exists():
        return {}, []
    return read_keymap(path)


def read_keymap(path: Path) -> tuple[dict[str, str], list[str]]:
    """The keys in the file `path`, and a line for each entry that cannot be used."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return {}, [f"keys {path}: {error}; the default keys are used"]
    known = {key.id: key for key in KEYS}
    keymap: dict[str, str] = {}
    problems: list[str] = []
    for name, value in _flat(data).items():
        if name not in known:
            problems.append(f"keys {path}: unknown key {name!r}; expected one of {', '.join(known)}")
        elif not isinstance(value, str) or not value.strip():
            problems.append(f'keys {path}: {name} must be a key such as "x", "ctrl+x" or "f5"')
        else:
            keys = {word.strip(): key_named(word.strip()) for word in value.split(",")}
            for word, key in keys.items():
                if key is None:
                    problems.append(f'keys {path}: {name} = "{word}": no such key; write "x", "?", "ctrl+x" or "f5"')
                elif key in FIXED_KEYS:
                    problems.append(f'keys {path}: {name} = "{word}": that key has a fixed meaning; take another one')
            if all(key is not None and key not in FIXED_KEYS for key in keys.values()):
                keymap[name] = ",".join(str(key) for key in keys.values())
    taken: dict[str, str] = {}
    for key_ in KEYS:
        for word in keymap.get(key_.id, key_.keys).split(","):
            one = key_named(word) or word
            if one in taken:
                problems.append(f"keys {path}: {one!r} is both {taken[one]} and {key_.id}; the default keys are used")
                return {}, problems
            taken[one] = key_.id
    return keymap, problems


def key_named(text: str) -> str | None:
    """The key that a user calls `text`: "Ctrl+Z" is ctrl+z, "question_mark" is ?. None if there is none."""
    *modifiers, key = ["+"] if text == "+" else text.removesuffix("++").split("+") + ["+"] * text.endswith("++")
    modifiers = [_OTHER_NAMES.get(modifier.lower(), modifier.lower()) for modifier in modifiers]
    if len(key) == 1:
        key = key.lower() if modifiers else key
    else:
        key = _OTHER_NAMES.get(key.lower(), key.lower())
        character = key_to_character(_UNICODE_NAMES.get(key, key))
        if key not in _NAMED_KEYS and character is None:
            return None
        key = character if character is not None and key not in _NAMED_KEYS and not modifiers else key
    if not set(modifiers) <= _MODIFIERS or not key.isprintable() or key == " ":
        return None
    return "+".join([*modifiers, key])


def _flat(data: dict[str, object], prefix: str = "") -> dict[str, object]:
    """TOML reads `panel.ranks = "x"` as a table: join the dotted names again."""
    flat: dict[str, object] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
