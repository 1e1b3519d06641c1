"""The keys: one table from which bindings, footer, help and the user's key map are made."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from textual.binding import Binding
from textual.keys import KEY_NAME_REPLACEMENTS, Keys, key_to_character

from runtime.wire.profile import DEFAULT_STEPS
from zerotop.rundir.paths import config_home

Group = Literal["run", "screens", "view", "plots", "panels", "log"]
GROUPS: dict[Group, str] = {
    "run": "the run",
    "screens": "screens",
    "view": "the view",
    "panels": "panels",
    "plots": "plots, timeline, heat map",
    "log": "log",
}
"""Group of keys -> its heading in the help."""
PAGE_NAMES = {
    "1": "Overview",
    "2": "Memory",
    "3": "Timeline",
    "4": "Communication",
    "5": "Training",
    "6": "Logs",
    "7": "Settings",
    "8": "Data",
}
"""Number key -> the name of its screen."""


@dataclass(frozen=True)
class Key:
    """`id` is its name in keys.toml. `steers`: it acts on the run, so it is disabled when the screen is read-only."""

    id: str
    keys: str
    action: str
    label: str
    help: str
    group: Group
    show: bool = False
    steers: bool = False

    @property
    def palette_title(self) -> str:
        """Its name among the commands of the palette."""
        return f"Screen: {self.label}" if self.id.startswith("screen.") else self.label

    def binding(self) -> Binding:
        """The binding for Textual."""
        return Binding(self.keys, self.action, self.label, show=self.show, id=self.id)


_PAGE_HELP = {
    "1": "the run on one screen: ranks (↑ ↓ select, Enter opens one), loss, throughput, memory, host, events",
    "2": "memory of every rank and host by use, peaks by phase, plan and actual, what comes next",
    "3": "what every rank did when, in true time, with waiting hatched",
    "4": "collectives: bytes, time, exposed, bandwidth; which rank came late in which step",
    "5": "loss, evaluations, gradient norm, learning rate, speed over the steps",
    "6": "log and events: levels, ranks, search; every command and who gave it",
    "7": "every setting that can be changed now, its value, and where that came from",
    "8": "what is trained on, with examples",
}
KEYS: tuple[Key, ...] = (
    Key("help", "question_mark", "help", "Help", "this page: all keys, columns and signs", "view", show=True),
    Key(
        "detach",
        "q",
        "detach",
        "Leave",
        "leave the screen; the run continues, `zerotop attach` opens it again",
        "view",
        show=True,
    ),
    Key("pause", "P", "pause_resume", "Pause", "pause at the next step boundary, or resume", "run", True, True),
    Key("checkpoint", "C", "checkpoint", "Checkpoint", "checkpoint at the next step boundary", "run", True, True),
    Key("set", "E,colon", "set_knob", "Set", "change a setting of the running run", "run", True, True),
    Key(
        "stop",
        "S",
        "stop",
        "Stop",
        "end the run at the next boundary, after a checkpoint (asks first, and says what it will do)",
        "run",
        True,
        True,
    ),
    Key("abort", "A", "abort", "Abort", "end the run now, without a checkpoint (asks first)", "run", True, True),
    Key("stacks", "T", "stacks", "Stacks", "dump the stacks of all ranks, also of a stuck run", "run", steers=True),
    Key(
        "profile",
        "R",
        "profile",
        "Profile",
        f"profile the next {DEFAULT_STEPS} steps with torch.profiler; on a rank's page of that rank alone",
        "run",
        steers=True,
    ),
    Key(
        "memory-snapshot",
        "M",
        "memory_snapshot",
        "Memory snapshot",
        "write what every rank's memory is used for: one step by category, unit and tensor",
        "run",
        steers=True,
    ),
    *(
        Key(f"screen.{name.lower()}", key, f"page('{key}')", name, _PAGE_HELP[key], "screens")
        for key, name in PAGE_NAMES.items()
    ),
    Key("data", "d", "data", "Switch data", "the data; once more switches to evaluation data", "screens", show=True),
    Key("texts", "w", "texts", "Texts", "what the model writes for the prompts, and all evaluations", "screens", True),
    Key("sort", "s", "sort", "Sort", "sort the ranks by the next column", "panels", show=True),
    Key("grid", "x", "grid", "Grid", "the ranks as a grid, or as a table; g: the grid's next figure", "panels", True),
    Key("reverse", "r", "reverse", "Reverse", "turn the order of the ranks round", "panels"),
    Key(
        "filter", "slash", "filter", "Filter", "filter events or ranks, search the log; Esc clears", "panels", show=True
    ),
    Key(
        "level", "v", "level", "Level", "all but progress lines, all lines, then each level and worse", "log", show=True
    ),
    Key(
        "log.rank", "i", "log_rank", "Rank", "the records of the next rank; of all after the last one", "log", show=True
    ),
    Key("log.open", "e", "open_log", "Log file", "the rank's log file in $PAGER, from its end on", "log", show=True),
    Key("match.next", "n", "match(1)", "Next match", "to the next match of the search", "log", show=True),
    Key("match.previous", "p", "match(-1)", "Previous match", "to the match before", "log"),
    Key("matches", "m", "matches", "Only matches", "only lines with a match, or all lines", "log"),
    Key("wrap", "b", "wrap", "Wrap", "wrap long lines, or cut them", "log", show=True),
    Key("copy", "y", "copy_line", "Copy", "copy the marked line, or the newest in sight, through the terminal", "log"),
    Key("figure", "g", "next_figure", "Figure", "the next figure in the focused plot or heat map", "plots", show=True),
    Key("zoom.in", "plus,equals_sign", "zoom_axis(2.0)", "Zoom in", "show half of the steps, or of the time", "plots"),
    Key("zoom.out", "minus", "zoom_axis(0.5)", "Zoom out", "show twice as many steps, or as much time", "plots"),
    Key("zoom.all", "0", "zoom_all", "Whole run", "all steps without a cursor; the newest phases", "plots"),
    Key("cursor.left", "left", "cursor(-1)", "Cursor left", "read values: the cursor is shared by all plots", "plots"),
    Key("cursor.right", "right", "cursor(1)", "Cursor right", "the cursor to later steps", "plots"),
    Key("pan.left", "shift+left,less_than_sign", "pan(-0.25)", "Pan left", "earlier steps, or phases", "plots"),
    Key("pan.right", "shift+right,greater_than_sign", "pan(0.25)", "Pan right", "later steps, or phases", "plots"),
    Key("log-scale", "l", "log_scale", "Log scale", "logarithmic values, or linear", "plots"),
    Key("smooth", "a", "smooth", "Smoothing", "smoothed lines over the range of the values, or the values", "plots"),
    Key("overlay", "o", "overlay", "Earlier runs", "the loss of earlier runs of this model, or not", "plots"),
    Key(
        "zoom", "z", "zoom", "Zoom", "the focused panel takes the whole screen, and gives it back", "panels", show=True
    ),
    Key("hide", "h", "hide", "Hide panel", "hide the focused panel", "panels"),
    Key("unhide", "u", "unhide", "Show all panels", "show all panels, in their usual sizes", "panels"),
    Key("freeze", "f", "freeze", "Freeze", "freeze the view, not the run; once more follows again", "view", show=True),
    Key("theme", "t", "themes", "Theme", "choose a theme; what is marked is shown at once", "view", show=True),
    Key("screenshot", "ctrl+s", "save_screenshot", "Save screenshot", "save the screen as an SVG picture", "view"),
)
TABS_FROM = 41
"""From this height of the terminal on, a line shows the screens of the number keys."""
YIELDS = {"abort": "texts"}
"""Action -> the action that goes before it in a footer too narrow for both."""
STEERING = frozenset(key.action for key in KEYS if key.steers)
OTHER_HELP = (
    ("Tab, Shift+Tab", "the next panel, the one before"),
    ("Enter", "opens the selected rank or setting; elsewhere the screen whose number the panel's title has"),
    ("j k", "down and up, as the arrows; in the grid of the ranks also h and l"),
    ("Esc", "back from a rank, a dialog, a zoomed panel, a filter, and to the overview"),
    ("Ctrl+P", "all commands and themes by name"),
    ("mouse", "click focuses, twice opens a rank; the wheel zooms a plot; drag a panel's border to resize it"),
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
