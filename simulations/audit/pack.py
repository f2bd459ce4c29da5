"""What one hands to an auditor: a run's record, the evidence, and the registry's public part; nothing else.

The list says what goes in, not what stays out: a run's folder may hold sites, with histories and signing keys, logs and
exact figures of quality. What was packed is looked at again, byte by byte, for private keys.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from server.runs import RunError
from simulations.audit.evidence import FOLDER as EVIDENCE
from simulations.audit.receipts import registry_of, run_folder

RECORD = (
    "plan.json",
    "catalog.jsonl",
    "receipts.jsonl",
    "rounds.jsonl",
    "privacy.json",
    "ending.json",
    "model.safetensors",
    "released.safetensors",
)
"""Files of a run that say what was asked, charged, released and claimed."""

FOLDERS = {"rounds": "[0-9]*.safetensors", "updates": "[0-9]*.safetensors", EVIDENCE: "*.json"}
"""What was broadcast, what came back, and what the audit's tools found: folder -> names."""

PUBLIC_TABLES = {"sites", "entries", "anchors", "nodes", "proofs"}
"""Of a registry: who is enrolled, what sites signed, and what the server signed. Its key lies in a file beside it."""

OWNERS_TABLES = {"outs"}
"""Of a registry: which sites its owner takes no part with, and why, in words that are not for others: left out."""

PACKED = "packed.json"
"""Says which run was packed, and whether its sites were simulated."""

_PRIVATE = b"PRIVATE KEY"


def files_of(run: Path) -> Iterator[Path]:
    """The files of a run that an auditor needs, relative to its folder."""
    listed = [run / name for name in RECORD]
    for folder, names in FOLDERS.items():
        listed += sorted((run / folder).glob(names))
    for file in listed:
        if file.is_file() and not file.is_symlink():  # a link might lead to what is private
            yield file.relative_to(run)


def pack(path: Path, output: Path, registry: Path | None = None) -> list[Path]:
    """Makes a folder that holds all that the audit's tools read of a run, and nothing of its sites.

    Args:
        path: the run's folder.
        output: must not exist; whole or not at all.
        registry: folder of the server's registry; else the one that lies in the run's folder.

    Returns:
        What was packed, relative to `output`.

    Raises:
        RunError: there is no such run, there is something at `output`, or a private key would have been packed.
    """
    run = run_folder(path)
    source = (registry or registry_of(run)) / "registry.sqlite"
    if not source.is_file():
        raise RunError(f"{source.parent} holds no registry: say where the server's lies with --registry")
    if output.exists():
        raise RunError(f"{output} is there already: give another --output, or remove it")
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        packed = list(files_of(run.path))
        for file in packed:
            (aside / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.path / file, aside / file)
        told = {"run": run.path.name, "simulated": is_simulated(run.path)}
        (aside / PACKED).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        copy = aside / "registry" / "registry.sqlite"
        copy.parent.mkdir()
        _copy_registry(source, copy)
        secrets = {_PRIVATE, *_keys(run.path, source.parent)}
        for file in aside.rglob("*"):
            if file.is_file() and any(secret in file.read_bytes() for secret in secrets):
                raise RunError(
                    f"{file.relative_to(aside)} holds a private key, so nothing is packed: take it out"
                )
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [*packed, Path(PACKED), Path("registry/registry.sqlite")]


def is_simulated(run: Path) -> bool:
    """Whether a run's sites were simulated beside it, as its folder or what it was packed from shows."""
    try:
        return bool(json.loads((run / PACKED).read_bytes())["simulated"])
    except (OSError, ValueError, KeyError, TypeError):
        return (run / "sites").is_dir()


def _keys(*folders: Path) -> Iterator[bytes]:
    """What is secret in each private key that lies in a run or a registry: the lines of a PEM, or the raw bytes."""
    for folder in folders:
        for file in [*folder.rglob("*.key"), *folder.rglob("*.pem")]:
            data = file.read_bytes()
            yield from data.splitlines()[1:-1] if data.startswith(b"-----") else [data]


def _copy_registry(source: Path, target: Path) -> None:
    """One consistent state of a registry's public tables, in one file, whoever writes to it meanwhile.

    Raises:
        RunError: it has a table that this version does not know to be public.
    """
    reading = sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30)
    try:
        tables = {
            str(row[0]) for row in reading.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
        if unknown := tables - PUBLIC_TABLES - OWNERS_TABLES:
            raise RunError(
                f"the registry has a table {min(unknown)!r}, which is not known to be public, so "
                "nothing is packed: pack with the version that made it"
            )
        reading.execute("VACUUM INTO ?", (str(target),))  # rows that were deleted stay behind
    finally:
        reading.close()
    copied = sqlite3.connect(target, isolation_level=None)
    try:
        for name in sorted(tables & OWNERS_TABLES):
            copied.execute(f"DROP TABLE {name}")
        copied.execute("VACUUM")
    finally:
        copied.close()
