"""Regular files by their descriptors: opening without being kept waiting, reading at a place, one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from pathlib import Path

from ..errors import BusyResourceError

PATIENCE = 5.0  # seconds in which a reader that looks whether somebody writes gets to its end, however busy the machine


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; a FIFO would block, a device never ends.

    Raises:
        OSError: as `os.open`; IsADirectoryError for a folder; a plain OSError for what else is no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    fd = os.open(path, flags)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return fd, status
    os.close(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "no regular file", path)


def read_at(fd: int, offset: int, length: int) -> bytes:
    """At most `length` bytes at `offset`; fewer only at the end of the file."""
    parts: list[bytes] = []
    while length > 0:
        if hasattr(os, "pread"):
            data = os.pread(fd, length, offset)
        else:  # Windows; one thread uses the descriptor, so the shared position does no harm
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, length)
        if not data:
            break
        parts.append(data)
        offset += len(data)
        length -= len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def lock(fd: int, path: Path) -> None:
    """Lock a file for this descriptor's only use until it is closed.

    Raises:
        BusyResourceError: somebody else has the lock.
    """
    try:
        if os.name == "nt":
            import msvcrt

            # A byte far behind any data: locks are mandatory there, and readers must not meet it.
            os.lseek(fd, 1 << 62, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            patient_until = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                # A reader in `is_locked` shares the lock for a moment. If we may not share it, it is a writer.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(fd, fcntl.LOCK_UN)
                if time.monotonic() > patient_until:
                    raise BlockingIOError
                time.sleep(0.001)
    except (BlockingIOError, PermissionError):
        raise BusyResourceError(f"{path} is being written by somebody else; wait for it or write elsewhere") from None


def is_locked(fd: int) -> bool:
    """Whether somebody writes this packet file now; best effort, for messages."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False
