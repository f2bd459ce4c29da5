"""Commands that messages and documents name are there, with the options that they are named with."""

from __future__ import annotations

import re
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
