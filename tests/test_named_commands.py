"""Commands that messages and documents name are there, with the options that they are named with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from common.cli import app

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`fedtide ([a-z][^`]*)`")
WORD, OPTION = re.compile(r"[a-z][a-z-]*"), re.compile(r"--[a-z][a-z-]*")
FILES = sorted(
    [file for name in ("common", "client", "server", "simulations") for file in (ROOT / name).rglob("*.py")]
    + [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
)


def fault_of(said: str) -> str | None:
    """What is wrong with a command as it is named; None where nothing is."""
    command: click.Command = typer.main.get_command(app)
    words = said.split()
    while isinstance(command, click.Group) and words:
        if not WORD.fullmatch(words[0]):
            break
        found = command.get_command(click.Context(command), words.pop(0))
        if found is None:
            return "no such command"
        command = found
    known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    unknown = [name for name in OPTION.findall(" ".join(words)) if name not in known | {"--help"}]
    return f"no option {unknown[0]}" if unknown else None


def test_every_command_that_is_named_is_there() -> None:
    named = {}
    for file in FILES:
        # Strings go on in the next line of the source, as sentences do in a document.
        text = re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8"))
        for said in NAMED.findall(re.sub(r"\s+", " ", text)):
            first = said.split(" | ")[0]  # "`fedtide site init | up`" names several
            named[first] = file.name
    assert len(named) > 40
    faults = {said: (fault, named[said]) for said in named if (fault := fault_of(said))}
    assert faults == {}


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("server sites DIR", None),
        ("server sites --registry DIR", None),
        ("server list", "no such command"),
        ("server run DIR --again", "no option --again"),
        ("simulte", "no such command"),
    ],
)
def test_one_that_is_not_there_is_found(said: str, fault: str | None) -> None:
    assert fault_of(said) == fault


BARE = re.compile(r"(?<![\w(-])--[a-z][a-z-]*[a-z]")
GROUPS = {
    "client": {"site", "segments", "drift", "feedback"},
    "server": {"server", "recommend", "predict"},
    "simulations": {"simulate", "compare", "sweep", "audit", "data"},
}
"""Package -> commands that say its words; those of `common` may be said by any."""
OF_OTHERS = re.compile(r"`?(python -m|pip|systemctl|fedtide) ")


def leaves(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that takes options, by its words."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from leaves(found, f"{path} {name}".strip())
    else:
        yield path, command


def sentences(source: str) -> Iterator[str]:
    """Texts of a module for people: with a space in them, and no docstring's."""
    tree = ast.parse(source)
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.value


def options_by_command() -> dict[str, set[str]]:
    return {
        path: {name for each in command.params for name in [*each.opts, *each.secondary_opts]}
        for path, command in leaves(typer.main.get_command(app))
    }


def unknown_options(said: str, known: set[str]) -> list[str]:
    """Options that a sentence names and no command that says it has."""
    if " " not in said.strip() or OF_OTHERS.search(said):
        return []
    return [name for name in BARE.findall(said) if name not in known]


def test_every_option_that_a_message_names_is_one_of_a_command_that_says_it() -> None:
    options = options_by_command()
    seen, faults = 0, {}
    for file in (each for each in FILES if each.suffix == ".py"):
        package, *below = file.relative_to(ROOT).parts
        everyone = set().union(*GROUPS.values(), {"plan"})
        groups = (
            everyone if "faults" in below else GROUPS.get(package, everyone)
        )  # faults quotes servers and sites
        known = {name for path, names in options.items() if path.split()[0] in groups for name in names} | {
            "--help"
        }
        source = file.read_text(encoding="utf-8")
        known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', source))  # of a program of its own
        for said in sentences(source):
            seen += bool(BARE.search(said))
            if wrong := unknown_options(said, known):
                faults[f"{file.relative_to(ROOT)}: {said}"] = wrong
    assert seen > 40
    assert faults == {}


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("promise fewer with --users-at-least", []),
        ("promise fewer with --users-atleast", ["--users-atleast"]),
        ("--user-column is not there", ["--user-column"]),
        ("give --typical-plan or --typical", ["--typical"]),
        ("--only-a-flag", []),  # an argument for a process, no sentence
        ("run `python -m simulations.grid --bench 0`", []),
    ],
)
def test_an_option_that_no_command_has_is_found(said: str, wrong: list[str]) -> None:
    known = {name for path, names in options_by_command().items() if path == "site init" for name in names}
    assert unknown_options(said, known) == wrong
