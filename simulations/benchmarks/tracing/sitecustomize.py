"""Times of a deployment's parts, from within its processes: Python imports this first where PYTHONPATH has its folder.

For the benchmark of rounds alone. Each call of a function of `TRACED` leaves a line in the file that $FEDTIDE_TRACE
names. The processes do what they do without it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any

FILE = os.environ.get("FEDTIDE_TRACE", "")
TRACED = {
    "server.rounds": ("ask_sites",),
    "flwr.supernode.start_client_internal": ("_pull_and_store_message", "_push_messages"),
    "flwr.supernode.runtime.run_clientapp": ("pull_task_input", "push_message"),
    "client.app": ("_answered",),
    "client.site": ("train_round", "release_statistics"),
}


def started() -> float:
    """When this process was started, in seconds since the epoch."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        ticks = float(stat.read().rpartition(")")[2].split()[19])
        return time.time() - float(uptime.read().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")


def traced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, leaving a line at each call that gives something."""

    def called(*arguments: Any, **named: Any) -> Any:
        began = time.time()
        result = function(*arguments, **named)
        if result is not None or name.startswith("_push") or name.startswith("push"):
            line = {
                "what": name,
                "process": os.getpid(),
                "folder": os.getcwd(),
                "started": started(),
                "began": began,
                "ended": time.time(),
                "cpu": time.process_time(),
            }
            descriptor = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(descriptor, json.dumps(line).encode() + b"\n")
            os.close(descriptor)
        return result

    return called


class Loader(importlib.abc.InspectLoader):
    """Loads a module as ever, then puts traced functions in the place of its own."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        own = vars(module)
        for name in TRACED[module.__name__]:
            own[name] = traced(name, own[name])

    def get_source(self, fullname: str) -> str | None:
        source: str | None = self._loader.get_source(fullname)
        return source

    def get_code(self, fullname: str) -> CodeType | None:
        code: CodeType | None = self._loader.get_code(fullname)
        return code


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `TRACED` as the other finders do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TRACED:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(fullname, path, target)) is not None:
                spec.loader = Loader(spec.loader)
                return spec
        return None


if FILE:
    sys.meta_path.insert(0, Finder())
