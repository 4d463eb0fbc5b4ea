"""What the system says of files: on which mount they are, who has them open, who may read them, and its limits.

Read from /proc (proc(5)) where there is one; elsewhere, and where we may not look, the answer is "unknown", no error.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from ..files import mounts

PROC = "/proc"


@dataclass(slots=True, frozen=True)
class Holder:
    """A process that has a file open."""

    pid: int
    name: str
    path: str
    deleted: bool
    writes: bool
    size: int

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name})"


def network_mount(path: str) -> tuple[str, str] | None:
    """As `mounts.network_mount`."""
    return mounts.network_mount(path, f"{PROC}/self/mountinfo")


def holders() -> Iterator[tuple[tuple[int, int], Holder]]:
    """Device and inode of each regular file that a process has open, and who it is; of those that we may look at."""
    for pid in _processes():
        name = next(_lines(f"{PROC}/{pid}/comm"), "?")
        for fd in _names(f"{PROC}/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                status = os.stat(f"{PROC}/{pid}/fd/{fd}")
                if not stat.S_ISREG(status.st_mode):
                    continue
                path = os.readlink(f"{PROC}/{pid}/fd/{fd}")
                deleted = path.endswith(" (deleted)")
                flags = [line for line in _lines(f"{PROC}/{pid}/fdinfo/{fd}") if line.startswith("flags:")]
                writes = bool(flags) and int(flags[0].split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
                path = path.removesuffix(" (deleted)")
                yield (status.st_dev, status.st_ino), Holder(pid, name, path, deleted, writes, status.st_size)


@dataclass(slots=True, frozen=True)
class InotifyUse:
    """Of what inotify grants each user, how much is in use; by the processes that we may look at."""

    watches: int
    max_watches: int
    instances: int
    max_instances: int


def inotify_use() -> InotifyUse | None:
    """For this user; None: no inotify here."""
    limits = f"{PROC}/sys/fs/inotify"
    try:
        max_watches = int(next(_lines(f"{limits}/max_user_watches")))
        max_instances = int(next(_lines(f"{limits}/max_user_instances")))
    except (StopIteration, ValueError):
        return None
    watches = instances = 0
    for pid in _processes():
        with contextlib.suppress(OSError):
            if os.stat(f"{PROC}/{pid}").st_uid != os.geteuid():
                continue
            for fd in _names(f"{PROC}/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if "inotify" in os.readlink(f"{PROC}/{pid}/fd/{fd}"):
                        instances += 1
                        watches += sum(line.startswith("inotify ") for line in _lines(f"{PROC}/{pid}/fdinfo/{fd}"))
    return InotifyUse(watches, max_watches, instances, max_instances)


def descriptor_limit() -> int | None:
    """How many files a process may have open, if it asks for all that it may; None: unknown or no limit."""
    try:
        import resource
    except ImportError:
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if hard == resource.RLIM_INFINITY else hard


def locked_door(path: str) -> str:
    """The first folder on the way to a path that may not be entered; "": all may."""
    ids = os.access in os.supports_effective_ids
    folder = os.path.dirname(path)
    way = [folder]
    while os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
        way.append(folder)
    for each in reversed(way):
        if not os.access(each, os.X_OK, effective_ids=ids):
            return each if os.path.isdir(each) else ""
    return ""


def user() -> str:
    """Whose rights we have."""
    if not hasattr(os, "geteuid"):
        return "this user"
    return _user_name(os.geteuid())


def rights(path: str) -> str:
    """Mode and owner, as `ls -l` has them; "": nobody may look."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{stat.filemode(status.st_mode)} {_user_name(status.st_uid)}:{_group_name(status.st_gid)}"


def _user_name(number: int) -> str:
    with contextlib.suppress(ImportError, KeyError):
        import pwd

        return pwd.getpwuid(number).pw_name
    return str(number)


def _group_name(number: int) -> str:
    with contextlib.suppress(ImportError, KeyError):
        import grp

        return grp.getgrgid(number).gr_name
    return str(number)


def _processes() -> Iterator[int]:
    if sys.platform == "linux":
        yield from (int(name) for name in _names(PROC) if name.isdecimal())


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _lines(path: str) -> Iterator[str]:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="surrogateescape") as file:
        yield from (line.rstrip("\n") for line in file)
