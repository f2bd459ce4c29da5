"""A disk that loses power between every two writes of a real process, to see what a ledger's folder would hold then.

The process runs under ptrace and is stopped at each write, rename, removal and sync. A disk may keep or lose what was
written since the last sync of each file, and each name since the last sync of the folder, in any combination: `Cut`
lists them. Nothing of the ledger or of SQLite is replaced. No compiler, no privilege and no special disk is needed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

State = dict[str, bytes]
"""File name -> content, of the files in a ledger's folder."""

_WRITES, _SYNCS, _NAMES = (
    "write pwrite64 ftruncate",
    "fsync fdatasync",
    "rename renameat renameat2 unlink unlinkat",
)
_NUMBERS = {
    "x86_64": {
        **{
            "write": 1,
            "pwrite64": 18,
            "ftruncate": 77,
            "fsync": 74,
            "fdatasync": 75,
            "rename": 82,
            "unlink": 87,
        },
        **{"renameat": 264, "renameat2": 316, "unlinkat": 263},
    },
    "aarch64": {
        **{"write": 64, "pwrite64": 68, "ftruncate": 46, "fsync": 82, "fdatasync": 83},
        **{"renameat": 38, "renameat2": 276, "unlinkat": 35},
    },
}
_TRACEME, _SYSCALL, _SETOPTIONS, _SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _EXITKILL, _ENTRY, _EXIT = 1, 0x100000, 1, 2


class TracingForbiddenError(Exception):
    """This machine lets no process trace its own child, or its system calls are not listed here."""


class _Call(ctypes.Structure):
    """`struct ptrace_syscall_info` of Linux 5.3 and later."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("first", ctypes.c_int64),
        ("arguments", ctypes.c_uint64 * 8),
    )


def _ptrace(request: int, pid: int, address: int, data: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    found: int = libc.ptrace(request, pid, address, data)
    if found < 0:
        raise TracingForbiddenError(os.strerror(ctypes.get_errno()))
    return found


def be_traced() -> None:
    """To be called by the process that is looked at, once it has imported what it needs."""
    _ptrace(_TRACEME, 0, 0, None)
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True)
class Cut:
    """The moment before a write.

    Attributes:
        files: what each name may hold after a cut here: as synced, with the content synced under today's name, as
            other processes see it now. None: it is not there.
        left: the last number that had left the process by then; 0: none.
    """

    files: dict[str, tuple[bytes | None, bytes | None, bytes | None]]
    left: int

    def states(self, **instead: Sequence[bytes | None]) -> Iterator[State]:
        """All that the disk may show; `instead` says for some names what they hold, whatever was synced."""
        files = {**self.files, **instead}
        for chosen in itertools.product(*(dict.fromkeys(each) for each in files.values())):
            yield {name: data for name, data in zip(files, chosen, strict=True) if data is not None}

    @property
    def killed(self) -> State:
        """What other processes see where this one is killed, and the machine goes on."""
        return {name: each[-1] for name, each in self.files.items() if each[-1] is not None}

    @property
    def synced(self) -> State:
        """What is certainly on the disk."""
        return {name: each[0] for name, each in self.files.items() if each[0] is not None}


@dataclass
class _Disk:
    """What of a folder was synced: contents by inode, names by the folder's own sync."""

    folder: Path
    at_first: State | None
    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (inode, content) in self.now().items():
            if self.at_first is None or name in self.at_first:
                self.names[name] = inode
                self.contents[inode] = content if self.at_first is None else self.at_first[name]

    def now(self) -> dict[str, tuple[int, bytes]]:
        files = [path for path in self.folder.iterdir() if path.is_file() and not path.name.endswith("-shm")]
        return {path.name: (path.stat().st_ino, path.read_bytes()) for path in files}

    def synced(self, path: Path) -> None:
        if path == self.folder:
            self.names = {name: inode for name, (inode, _) in self.now().items()}
        elif path.parent == self.folder and path.exists():
            self.contents[path.stat().st_ino] = path.read_bytes()

    def cut(self, left: int) -> Cut:
        now, files = self.now(), {}
        for name in sorted(now.keys() | self.names.keys()):
            inode, content = now.get(name, (None, None))
            before = self.contents.get(self.names[name], b"") if name in self.names else None
            unsynced = None if inode is None else self.contents.get(inode, b"")
            files[name] = (before, unsynced, content)
        return Cut(files, left)


def cuts(folder: Path, command: Sequence[str], synced: State | None = None) -> list[Cut]:
    """Every moment at which power may be cut while a command works in a folder, and the one after its end.

    Args:
        command: Python arguments; it calls `be_traced`, and writes each number that leaves, and a line's end, to its
            standard output in one write.
        synced: what of the folder is on the disk at the beginning; None: all that is there.

    Raises:
        TracingForbiddenError: nothing can be traced here.
    """
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise TracingForbiddenError(f"the system calls of {platform.machine()} are not listed")
    names = {number: name for name, number in numbers.items()}
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, *command], stdout=writing, cwd=Path(__file__).parents[2])
    os.close(writing)
    disk, found, left, inside, path = _Disk(folder, synced), list[Cut](), 0, "", Path()
    _, status = os.waitpid(process.pid, 0)
    if not os.WIFSTOPPED(status):
        raise TracingForbiddenError(f"the process ended at once, with status {status}")
    _ptrace(_SETOPTIONS, process.pid, 0, _SYSGOOD | _EXITKILL)
    handed_on = 0
    while True:
        _ptrace(_SYSCALL, process.pid, 0, handed_on)
        _, status = os.waitpid(process.pid, 0)
        if not os.WIFSTOPPED(status):
            break
        handed_on = 0
        if os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            handed_on = os.WSTOPSIG(status)
            continue
        call = _Call()
        _ptrace(_SYSCALL_INFO, process.pid, ctypes.sizeof(call), ctypes.addressof(call))
        if call.op == _ENTRY:
            inside = names.get(call.first, "")
            if inside in (_WRITES + " " + _SYNCS).split():
                path = Path(os.readlink(f"/proc/{process.pid}/fd/{call.arguments[0]}"))
            if inside:
                found.append(disk.cut(left))
        elif call.op == _EXIT and inside in _SYNCS.split() and call.first == 0:
            disk.synced(path)
        elif call.op == _EXIT and inside == "write" and path.name.startswith("pipe:"):
            left = int(os.read(reading, call.first).split()[-1])
    process.returncode = os.waitstatus_to_exitcode(status)
    os.close(reading)
    if process.returncode:
        raise AssertionError(f"the process that was looked at ended with {process.returncode}")
    return [*found, disk.cut(left)]
