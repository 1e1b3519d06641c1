"""Secrets never stay in a text or a document, and what is none of them stays as it is."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zerotop.bugreport.redact import REMOVED, Redactor, is_secret_name

LETTERS = string.ascii_letters + string.digits
URL_SAFE = LETTERS + "-_"


def of(alphabet: str, least: int, most: int = 40) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=least, max_size=most)


SURROUNDINGS = st.sampled_from(["", " ", "\n", "at step 3: ", " (", ") ", ", ", "; ", " = x\n", '{"a": 1}\n', "'", '"'])
KNOWN_FORMS = st.one_of(
    of(LETTERS, 20).map(lambda x: ("hf_", x)),
    of(URL_SAFE, 20).map(lambda x: ("sk-", x)),
    of(string.ascii_uppercase + string.digits, 16, 16).map(lambda x: ("AKIA", x)),
    of(LETTERS, 36).map(lambda x: ("ghp_", x)),
    of(URL_SAFE, 20).map(lambda x: ("xoxb-", x.replace("_", "a"))),
)
"""Secrets that are known by their own form: what they begin with, and the rest, which must be gone."""
UPPER = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "ZEROTOP_GROUP_KEY", "OPENAI_API_KEY"]
NAMES = st.sampled_from([*UPPER, "hub_token", "apiKey", "client_secret", "passphrase", "s3.secret_key", "token"])
VALUES = of(LETTERS + "-_.+/~%@!#$^&*()?", 8).filter(lambda x: any(c in LETTERS for c in x) and not x.isdecimal())
FORMS = st.sampled_from(
    [
        lambda name, value: f"{name}={value}\n",
        lambda name, value: f"export {name}={value}\n",
        lambda name, value: f"{name}: {value}\n",
        lambda name, value: f"{json.dumps({name: value, 'x': 1})}\n",
        lambda name, value: f"{ {name: value} }\n",
        lambda name, value: f"{json.dumps({'text': json.dumps({name: value})})}\n",
        lambda name, value: f"python train.py --{name.lower().replace('_', '-')} {value} --steps 3\n",
        lambda name, value: f"python train.py --{name.lower()}={value}\n",
        lambda name, value: f"https://host/path?{name.lower()}={value.replace('&', 'a').replace('#', 'b')}&x=1\n",
    ]
)


@settings(max_examples=300, deadline=None)
@given(KNOWN_FORMS, SURROUNDINGS, SURROUNDINGS)
def test_secrets_of_a_known_form_go_wherever_they_stand(secret: tuple[str, str], before: str, after: str) -> None:
    text = f"{before}{''.join(secret)}{after}"
    assert secret[1] not in Redactor().text(text)
    document = {"list": [text, {"x": text}], text: 1}
    assert secret[1] not in json.dumps(Redactor().json(document))


@settings(max_examples=500, deadline=None)
@given(NAMES, VALUES, FORMS, SURROUNDINGS)
def test_the_value_of_a_secret_name_goes_in_every_notation(name: str, value: str, form, before: str) -> None:  # type: ignore[no-untyped-def]
    before = before if not before or before[-1] in " \n" else f"{before} "
    text = before + form(name, value)
    assume(value not in before + form(name, ""))  # a secret that is a piece of a name can't be told from it
    kept = Redactor().text(text)
    for part in (value, value.replace("&", "a").replace("#", "b"), json.dumps(value)[1:-1]):
        assert part not in kept, (text, kept)
    assert value not in Redactor().json_text(json.dumps({"inner": {name: value}, "args": [f"--{name}", value]}))


@settings(max_examples=200, deadline=None)
@given(of(URL_SAFE + "!$&'()*+,;=:%@", 6), of(URL_SAFE, 1, 10))
def test_users_and_passwords_in_urls_go(password: str, user: str) -> None:
    password = f"Q7{password.replace(chr(39), 'q')}"
    for text in (f"https://{user}:{password}@host.example/x", f"cloning git+ssh://{user}:{password}@h:22/r.git\n"):
        kept = Redactor().text(text)
        assert password not in kept and f"{REMOVED}@h" in kept


@settings(max_examples=200, deadline=None)
@given(of(LETTERS + "+/=._-", 8), st.sampled_from(["Bearer", "Basic", "bearer", "token"]))
def test_authorization_headers_go(value: str, scheme: str) -> None:
    for text in (
        f"Authorization: {scheme} {value}\r\n",
        f"{{'Authorization': '{scheme} {value}'}}",
        json.dumps({"headers": {"authorization": f"{scheme} {value}"}}),
        f'curl -H "Authorization: {scheme} {value}" https://host',
    ):
        assert value not in Redactor().text(text), text


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=6, max_size=30).filter(lambda x: len(x.strip()) >= 6), SURROUNDINGS)
def test_known_values_go_wherever_they_stand(secret: str, around: str) -> None:
    if secret in REMOVED or any(secret in part for part in ("list", "text")):
        return
    redactor = Redactor(secrets=[secret])
    assert secret not in redactor.text(f"{around}x{secret}y{around}").replace(REMOVED, "")
    assert json.dumps(secret)[1:-1] not in redactor.text(json.dumps({"text": f"x{secret}y"})).replace(REMOVED, "")


def test_private_keys_go_also_where_a_log_was_cut() -> None:
    body = "\n".join("A1b2C3d4" * 8 for _ in range(4))
    key = f"-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH PRIVATE KEY-----"
    for text in (f"x\n{key}\ny", f"x\n{key[:150]}", key[40:].partition("\n")[2]):
        assert "A1b2C3d4" not in Redactor().text(text)


@pytest.mark.parametrize(
    "text",
    [
        "tokens_per_s: 123.4, tokenizer: bytes, max_tokens=100",
        '{"pad_token": "<pad>", "eos_token": "</s>", "next_token": "hello there"}',
        'step 3, loss 2.31, key "layers.0.weight": shape [4, 8]',
        "def encode(token: str) -> int",
        "rank 1 has not enqueued all_reduce 3 of the default group; rank 0 waits in it",
        '  File "/x/torch/nn/modules/module.py", line 1789 in _call_impl',
        "git@host.example:repo.git https://host.example/a@b",
        "token: 12345",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    redactor = Redactor("/home/alice", "alice")
    assert redactor.text(text) == text and not redactor.removed


def test_home_and_user_are_replaced_as_whole_names_and_counted() -> None:
    redactor = Redactor("/home/alice", "alice")
    assert redactor.text("/home/alice/runs /home/alicex alice@box malice (alice)") == (
        "~/runs /home/alicex USER@box malice (USER)"
    )
    assert dict(redactor.removed) == {"home directory": 1, "user name": 2}
    # A name that is a word of the reports is replaced in paths alone.
    assert Redactor("/data", "rank").text("rank 1 in /home/rank/x") == "rank 1 in /home/USER/x"
    assert Redactor("/", "").text("/ and /x") == "/ and /x"


def test_json_stays_json_and_only_secrets_change() -> None:
    redactor = Redactor()
    document = {
        "password": "x",
        "passwords": {"db": "y", "port": 3},
        "n": 1.5,
        "ok": None,
        "api_key": ["k1long", "k2long"],
    }
    assert redactor.json(document) == {
        "password": REMOVED, "passwords": {"db": REMOVED, "port": REMOVED}, "n": 1.5, "ok": None,
        "api_key": [REMOVED, REMOVED],
    }  # fmt: skip
    assert json.loads(redactor.json_text('{"a": [1, {"token": "abcdefgh"}]}')) == {"a": [1, {"token": REMOVED}]}
    assert redactor.json_text("no json, token=abcdefgh") == f"no json, token={REMOVED}"


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "tokens", "tokenizer", "key", "eos_token", "keyboard", "author", ""])
def test_names_that_are_not_secret(name: str) -> None:
    assert not is_secret_name(name)


def test_the_url_of_a_webhook_goes_from_configs_and_variables() -> None:
    redactor = Redactor()
    config = {
        "zerotop": {"notify": [{"webhook": "https://example.com/hook/SECRET", "on": ["failed"], "command": None}]}
    }
    assert redactor.json(config) == {
        "zerotop": {"notify": [{"webhook": REMOVED, "on": ["failed"], "command": None}]},
    }
    assert "SECRET" not in redactor.text("DISCORD_WEBHOOK_URL=https://example.com/hook/SECRET\n")
