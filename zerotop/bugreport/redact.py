"""Takes secrets out of text and JSON: by the form of the secret, by the name of the setting, and by known values.

Too much is removed rather than too little. What was removed is counted by kind, for the manifest of the report.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

REMOVED = "[removed]"
SHORTEST_KNOWN = 6
"""A known secret of fewer characters is not looked for: it would be found in ordinary words."""
_FORMS = (
    ("private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S)),
    ("private key", re.compile(r"(?m)(?:^[A-Za-z0-9+/=]{16,}\r?\n)+-----END [A-Z ]*PRIVATE KEY-----")),
    ("Hugging Face token", re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")),
    ("API key", re.compile(r"\b[sprx]k-[A-Za-z0-9_-]{8,}")),
    (
        "API key",
        re.compile(r"\b(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{8,}|\bAIza[A-Za-z0-9_-]{20,}|\bnvapi-[\w-]{16,}"),
    ),
    ("AWS key", re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA|ABIA|ACCA)[A-Z0-9]{12,}")),
    (
        "code host token",
        re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|pypi-[\w-]{16,})"),
    ),
    ("chat token", re.compile(r"\bxox[a-z]-[A-Za-z0-9-]{8,}|https://hooks\.slack\.com/[^\s\"'\\]+")),
    ("web token", re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}(?:\.[A-Za-z0-9_-]*)?")),
    ("authorization header", re.compile(r"(?i)\b(?:bearer|basic)[ \t]+[A-Za-z0-9._~+/=-]{8,}")),
)
_HEADER = re.compile(
    r"(?i)(?<![\w-])((?:proxy-)?authorization|x-[\w-]*(?:api-?key|token|secret)|(?:set-)?cookie)"
    r"(\\*[\"']?\s*[:=]\s*)(\\*[\"'])?"
)
_URL_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]{1,20}://)[^\s/?#\"'<>\\]*@")
_SETTING = re.compile(r"(?<![\w.-])(-{0,2}[A-Za-z_][\w.-]{0,80})(\\*[\"']?[ \t]*(?:=>|[:=])[ \t]*)(\\*[\"'])?")
_FLAG = re.compile(r"(?<![\w-])(--?[A-Za-z][\w.-]{1,60})([ \t]+)(\\*[\"'])?(?=\S)")
_LINE = re.compile(r"\s*(?:export\s+|-\s+)?$")
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])")
_SECRET_WORDS = frozenset(
    {
        "password",
        "passwords",
        "passwd",
        "passphrase",
        "pwd",
        "pw",
        "secret",
        "secrets",
        "credential",
        "credentials",
        "apikey",
    }
    | {"auth", "cookie", "webhook"}
)
_KEY_OF = frozenset(
    "access account api app auth client encryption group license master private secret service session shared signing "  # noqa: SIM905
    "ssh storage subscription wandb".split()
)
_ORDINARY_TOKENS = frozenset(
    "pad bos eos unk sep cls mask image video audio start end special stop additional per prompt next first last begin "  # noqa: SIM905
    "fim user assistant system tool decoder forced".split()
)
_COMMON_NAMES = frozenset(
    "root user admin nobody ubuntu data run rank step test torch train model zerotop python host home tmp node".split()  # noqa: SIM905
)


def is_secret_name(name: str) -> bool:
    """Whether the value of a setting, variable or option of this name is a secret."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or name in ("PWD", "OLDPWD", "SSH_AUTH_SOCK"):
        return False
    if _SECRET_WORDS.intersection(words) or "apitoken" in words:
        return True
    if words[-1] == "token":
        return len(words) == 1 or words[-2] not in _ORDINARY_TOKENS
    return words[-1] in ("key", "keys") and len(words) > 1 and (name.isupper() or words[-2] in _KEY_OF)


class Redactor:
    """Removes secrets. `secrets`: values that are known to be secret; `home` and `user`: those of the person, who need
    not be known to the reader. `removed` counts by kind what was taken out."""

    def __init__(self, home: str = "", user: str = "", secrets: Iterable[str] = ()) -> None:
        self.removed: Counter[str] = Counter()
        known = {secret for secret in secrets if len(secret) >= SHORTEST_KNOWN}
        forms = {form for secret in known for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1])}
        longest_first = sorted(forms, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, longest_first))) if forms else None
        self._personal: list[tuple[str, re.Pattern[str], str]] = []
        if len(home.rstrip("/")) > 1:
            place = re.escape(home.rstrip("/"))
            self._personal.append(("home directory", re.compile(rf"(?<![\w.-]){place}(?![\w-]|\.\w)"), "~"))
        if user:
            name = re.escape(user)
            whole = len(user) >= 3 and user.lower() not in _COMMON_NAMES
            form = rf"(?<!\w){name}(?!\w)" if whole else rf"(?<=/home/){name}(?!\w)|(?<=/Users/){name}(?!\w)"
            self._personal.append(("user name", re.compile(form), "USER"))

    # ---- text ------------------------------------------------------------------------------------------------------
    def text(self, text: str) -> str:
        """`text` without secrets."""
        if self._known is not None:
            text = self._replace("known secret", self._known, REMOVED, text)
        for kind, form in _FORMS[:2]:
            text = self._replace(kind, form, REMOVED, text)
        text = self._replace("user and password in a URL", _URL_USER, rf"\1{REMOVED}@", text)
        text = self._values("authorization header", _HEADER, text, whole_line=True)
        text = self._values("secret setting", _SETTING, text)
        text = self._values("secret setting", _FLAG, text)
        for kind, form in _FORMS[2:]:
            text = self._replace(kind, form, REMOVED, text)
        return self._without_person(text)

    def _replace(self, kind: str, form: re.Pattern[str], by: str, text: str) -> str:
        text, count = form.subn(by, text)
        if count:
            self.removed[kind] += count
        return text

    def _values(self, kind: str, form: re.Pattern[str], text: str, whole_line: bool = False) -> str:
        """Remove the values behind secret names. `form` has the groups name, separator and opening quote."""
        parts: list[str] = []
        done = 0
        for match in form.finditer(text):
            if match.start() < done or not (whole_line or is_secret_name(match[1])):
                continue
            line_end = text.find("\n", match.end())
            line_end = len(text) if line_end < 0 else line_end
            begin = text.rfind("\n", 0, match.start()) + 1
            opening = match[3] or ""
            if opening:
                end = _closing(text, match.end(), opening, line_end)
            elif whole_line or (_LINE.match(text[begin : match.start()]) and match[2].strip() in ("=", ":")):
                end = line_end
            else:
                end = match.end() + len(re.match(r"\S*", text[match.end() : line_end])[0])  # type: ignore[index]
            value = text[match.end() : end]
            if not value.strip() or value == REMOVED or not _may_be_secret(match[1], value):
                continue
            parts += [text[done : match.end()], REMOVED]
            done = end
            self.removed[kind] += 1
        return "".join([*parts, text[done:]]) if parts else text

    def _without_person(self, text: str) -> str:
        for kind, form, by in self._personal:
            text = self._replace(kind, form, by, text)
        return text

    # ---- JSON ------------------------------------------------------------------------------------------------------
    def json(self, value: Any) -> Any:
        """A JSON value without secrets: the values of secret names, and secrets within strings."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self._member(str(key), item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return self._items(list(value))
        return value

    def _member(self, key: str, value: Any) -> Any:
        if is_secret_name(key) and not isinstance(value, bool | None):
            if isinstance(value, Mapping):
                return {self.text(str(inner)): self._member(key, item) for inner, item in value.items()}
            if isinstance(value, list | tuple):
                return [self._member(key, item) for item in value]
            if value != "" and _may_be_secret(key, str(value)):
                self.removed["secret setting"] += 1
                return REMOVED
        return self.json(value)

    def _items(self, items: list[Any]) -> list[Any]:
        """A list; what follows an option such as --token in a command line is a secret."""
        kept: list[Any] = []
        for index, item in enumerate(items):
            before = items[index - 1] if index else None
            if isinstance(before, str) and before.startswith("-") and isinstance(item, str) and is_secret_name(before):
                self.removed["secret setting"] += 1
                kept.append(REMOVED)
            else:
                kept.append(self.json(item))
        return kept

    def json_text(self, text: str) -> str:
        """A JSON document as text; what is no JSON is treated as text."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return self.text(text)
        return json.dumps(self.json(value), indent=1, ensure_ascii=False) + "\n"


def _closing(text: str, start: int, opening: str, line_end: int) -> int:
    """Where the string that begins with `opening` (a quote, with backslashes if it is inside another string) ends."""
    depth = len(opening) - 1
    quote_mark = opening[-1]
    at = start
    while (at := text.find(quote_mark, at, line_end)) >= 0:
        slashes = 0
        while at - slashes - 1 >= start and text[at - slashes - 1] == "\\":
            slashes += 1
        if slashes == depth or (depth == 0 and slashes % 2 == 0):
            return at - depth
        at += 1
    return line_end


def _may_be_secret(name: str, value: str) -> bool:
    """Whether this value of a secret name can be one: special tokens, numbers of tokens and types are not."""
    words = {word.lower() for word in _WORDS.findall(name)}
    if words & _SECRET_WORDS - {"auth", "cookie"}:
        return value.strip() not in ("None", "null", "True", "False", "true", "false", REMOVED)
    plain = value.strip().strip("\"',;)]}")
    return len(plain) >= 6 and not re.fullmatch(r"<.*>|\[[A-Z]+\]|str|string|None|null|\d{1,7}(?:\.\d+)?", plain)
