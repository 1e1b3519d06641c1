"""What the documents name exists: files, functions, tests, keys of the config, and the layers in their order."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from runtime.config import load
from zerotop.commands.examples import add_examples
from zerotop.commands.table import COMMANDS, command_parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"], key=lambda path: path.name
)
HISTORY = {"CHANGELOG.md"}
"""Names of its time are right there."""
TOPS = "runtime|zerotop|tests|docs|benchmarks|csrc|examples|themes|tools"
PATH = re.compile(rf"(?<![\w./-])(?<!--markdown )(?:{TOPS})/[\w./*-]*[\w/*]")
FUNCTION = re.compile(r"([\w/]+\.py):([A-Za-z_][\w.]*\w)")
TEST = re.compile(r"([\w/]*\btest_\w+\.py)(?:::(test_\w+))?|`(test_\w+)`")
OVERRIDE = re.compile(r"(?:--set|such as) ([a-z_]\w*(?:\.\w+)+=[^\s`;,]+)")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")


@cache
def names_in(path: Path) -> frozenset[str]:
    """`function`, `Class` and `Class.method` of a source file, nested functions included."""

    def walk(node: ast.AST, inside: str) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield inside + child.name
                yield from walk(child, f"{inside}{child.name}." if isinstance(child, ast.ClassDef) else inside)

    return frozenset(walk(ast.parse(path.read_text(encoding="utf-8")), ""))


def in_class(path: Path, name: str) -> bool:
    """Whether `name` is in the file; a method may come from a base class there."""
    kind, _, method = name.rpartition(".")
    known = names_in(path)
    return name in known or (kind in known and any(other.endswith(f".{method}") for other in known))


def anchors(document: Path) -> set[str]:
    """GitHub's names of the headings."""
    found = re.findall(r"(?m)^#+ (.+)$", document.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_and_link_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = []
    for link, heading in LINK.findall(text):
        target = document.parent / link if link else document
        if not target.exists() or (heading and heading not in anchors(target)):
            missing.append(f"{link}#{heading}")
    if document.name not in HISTORY:
        missing += [path for path in PATH.findall(text) if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_function_is_where_the_document_says(document: Path) -> None:
    found = FUNCTION.findall(document.read_text(encoding="utf-8"))
    wrong = [f"{path}:{name}" for path, name in found if not (ROOT / path).exists() or not in_class(ROOT / path, name)]
    assert not wrong
    assert found or document.name != "architecture.md"


@cache
def _tests_of(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_promise_names_exists(document: Path) -> None:
    everywhere = sorted((ROOT / "tests").rglob("test_*.py"))
    wrong = []
    for file, test, alone in TEST.findall(document.read_text(encoding="utf-8")):
        path = ROOT / "tests" / file.removeprefix("tests/")
        if file and not (path.exists() and (not test or test in _tests_of(path))):
            wrong.append(f"{file}::{test}")
        if alone and not any(alone in _tests_of(path) for path in everywhere):
            wrong.append(alone)
    assert not wrong or document.name in HISTORY


def overrides_in_help() -> list[tuple[str, str]]:
    """(command, KEY=VALUE) of every `--set` in the help of a command."""
    found = []
    for command in COMMANDS:
        parser = command_parser(command)
        add_examples(parser, command)
        found += [(command, one) for one in OVERRIDE.findall(" ".join(parser.format_help().split()))]
    return found


def overrides_in_documents() -> list[tuple[str, str]]:
    return [
        (document.name, one)
        for document in DOCUMENTS
        if document.name not in HISTORY
        for one in OVERRIDE.findall(document.read_text(encoding="utf-8"))
    ]


def test_every_key_that_set_is_said_to_take_is_one_of_the_config() -> None:
    found = overrides_in_help() + overrides_in_documents()
    assert {"run", "launch", "branch", "watch.md", "README.md"} <= {where for where, _ in found}
    for _, override in found:
        load({"optimizer": {"type": "AdamW"}}, [override])  # raises ConfigError, which names the key


def test_the_architecture_lists_the_layers_of_the_contracts() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    wanted = []
    for package in ("runtime", "zerotop"):
        (layers,) = (contract["layers"] for contract in contracts if contract.get("containers") == [package])
        wanted += [name.strip() for layer in layers for name in layer.split("|")]
    assert re.findall(r"`(\w+)`", " ".join(cells)) == wanted
