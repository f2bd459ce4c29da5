"""The bundle that Flower carries from the server to the sites: two thin modules and the hash of our own code.

Neither side runs what the bundle brings: the server's module imports the installed ServerApp, and a site answers
with the ClientApp that its administrator installed. What the bundle says is which version the server runs, as a
sha256 over the sources of `common` and `client`, so that another version of the code is another bundle.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

APP_NAME = "fedtide"
SERVER_MODULE, CLIENT_MODULE = "fedtide_server", "fedtide_client"
CODE_PACKAGES = ("client", "common")

RUN_DIR, REGISTRY_DIR = "run-dir", "registry-dir"
"""Keys of the ServerApp's run configuration: absolute folders of the run and of the registry."""


class BundleError(RuntimeError):
    """The bundle cannot be built from what is installed here."""


@dataclass(frozen=True)
class Bundle:
    """A Flower app folder, ready for `flwr run`.

    Attributes:
        path: the folder.
        sha256: of the bundle file that Flower builds of it: what a site's list holds.
        code: sha256 over the installed sources of `common` and `client`.
    """

    path: Path
    sha256: str
    code: str


@cache
def installed_code() -> str:
    """sha256, hex, over the installed sources of `common` and `client`: names and contents."""
    digest = hashlib.sha256(b"fedtide/code/1\n")
    for package in CODE_PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise BundleError(f"the package {package} is not installed: install fedtide again")
        folder = Path(next(iter(found.submodule_search_locations)))
        for file in sorted(folder.rglob("*.py"), key=lambda each: each.relative_to(folder).as_posix()):
            name = f"{package}/{file.relative_to(folder).as_posix()}"
            digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def bundle_files() -> dict[str, bytes]:
    """The app's files by name, the same bytes for the same installed code."""
    from importlib.metadata import version

    code = installed_code()
    project = f"""[project]
name = "{APP_NAME}"
version = "{version(APP_NAME)}"
description = "Fedtide, as installed at the server and at each site"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "{APP_NAME}"
fab-include = ["{SERVER_MODULE}.py", "{CLIENT_MODULE}.py"]

[tool.flwr.app.components]
serverapp = "{SERVER_MODULE}:app"
clientapp = "{CLIENT_MODULE}:app"

[tool.flwr.app.config]
{RUN_DIR} = ""
{REGISTRY_DIR} = ""
"""
    module = """\"\"\"{what} of the installed package; nothing else travels.\"\"\"

from {package}.app import app

CODE = "{code}"

__all__ = ["CODE", "app"]
"""
    return {
        "pyproject.toml": project.encode(),
        f"{SERVER_MODULE}.py": module.format(what="The ServerApp", package="server", code=code).encode(),
        f"{CLIENT_MODULE}.py": module.format(what="The ClientApp", package="client", code=code).encode(),
    }


def bundle_data() -> bytes:
    """The bundle of the installed version, as Flower builds it."""
    from flwr.cli.build import build_fab_from_files

    data, _ = build_fab_from_files(bundle_files())
    return bytes(data)


def bundle_hash() -> str:
    """sha256, hex, of `bundle_data`."""
    return hashlib.sha256(bundle_data()).hexdigest()


def build_bundle(folder: Path) -> Bundle:
    """Writes the app's folder, for `flwr run`; Flower asks that its name be letters, digits and hyphens.

    Raises:
        BundleError: the folder holds something else.
    """
    from flwr.cli.build import build_fab_from_disk

    files = bundle_files()
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(each.name for each in folder.iterdir() if each.name not in files)
    if others:
        raise BundleError(f"{folder} holds {others[0]}, which is no part of the bundle: give an empty folder")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Bundle(folder, hashlib.sha256(build_fab_from_disk(folder)).hexdigest(), installed_code())
