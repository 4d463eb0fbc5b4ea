"""Whole appends to a file, and what makes them durable. No thread of its own: FileSink and PacketFile use it on theirs.

What the disk refuses is cut back to the last whole append, as far as the bytes are still the last ones of the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from .descriptor import read_at

Buffer = bytes | bytearray | memoryview

_REWRITE_BYTES = 1 << 20
_IOV_MAX = 1024 if not hasattr(os, "sysconf") else max(16, os.sysconf("SC_IOV_MAX"))


class AppendFile:
    """A file opened for appending, for one thread: whole appends or none.

    Args:
        path: made if it is not there.
        readable: open it for reading too.

    Raises:
        OSError: as `os.open`.

    Attributes:
        end: size in bytes, after the last whole append.
        created: whether opening made the file, and its folder has not been synced since.
        regular: whether it is a regular file, which can be cut.
    """

    def __init__(self, path: str | os.PathLike[str], *, readable: bool = False) -> None:
        flags = os.O_APPEND | (os.O_RDWR if readable else os.O_WRONLY)
        flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self.path = Path(path)
        self.created = False
        self._folder = -1
        try:
            self.fd = os.open(path, flags)
        except FileNotFoundError:
            self.fd = os.open(path, flags | os.O_CREAT, 0o666)
            self.created = True
        status = os.fstat(self.fd)
        self.regular = stat.S_ISREG(status.st_mode)
        self.end = status.st_size if self.regular else 0

    def append(self, buffers: Sequence[Buffer], whole: Callable[[int], int]) -> None:
        """Append these bytes.

        Args:
            whole: asked if not all of them could be written: how many may stay, of so many that were.

        Raises:
            OSError: the file ends where `whole` said (a pipe or device may have taken more; and a file that others have
                written meanwhile is not cut).
        """
        taken = last = 0
        try:
            for pieces in _chunks(buffers, _IOV_MAX):
                for last in _write_all(self.fd, pieces):
                    taken += last
        except BaseException:
            # What the disk refused says more than what the cut met (a file that may only grow refuses it).
            with contextlib.suppress(OSError):
                self._cut_back(taken, taken - whole(taken), last)
            raise
        self.end += taken

    def _cut_back(self, taken: int, spare: int, last: int) -> None:
        """Take away the last `spare` of the bytes just taken, in so far as they are the last bytes of the file."""
        if not self.regular:
            return
        size = os.fstat(self.fd).st_size
        # Somebody else may write the same file: by a size of our own we would cut their bytes, or put NULs in. What one
        # system call wrote lies together, and O_APPEND leaves our position behind it.
        ours = size == self.end + taken
        if ours or (spare <= last and os.lseek(self.fd, 0, os.SEEK_CUR) == size):
            self.cut(size - spare)

    def cut(self, end: int) -> None:
        """Take away what stands behind byte `end`."""
        if self.regular:
            os.ftruncate(self.fd, end)
            self.end = end

    def is_whole(self) -> bool:
        """Whether the file ends with the last whole append: a refused one could be cut back, and nobody else wrote."""
        return self.regular and os.fstat(self.fd).st_size == self.end

    def rewrite(self, start: int, end: int, check: Callable[[bytes], object]) -> None:
        """Write these bytes of the file again, as they are, so that a sync is about them; not on Windows.

        Args:
            check: gets them in order, each part before it is written; what it raises ends it.

        Raises:
            OSError: they could not be read or written; those that were written are what they were.
        """
        if not hasattr(os, "pwrite"):
            return
        import fcntl

        flags = fcntl.fcntl(self.fd, fcntl.F_GETFL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, flags & ~os.O_APPEND)  # with it, Linux lets pwrite append
        try:
            while start < end:
                data = read_at(self.fd, start, min(_REWRITE_BYTES, end - start))
                if not data:
                    raise OSError(errno.EIO, f"it ends at byte {start}, expected {end}")
                check(data)
                while data:
                    done = os.pwrite(self.fd, data, start)
                    start, data = start + done, data[done:]
        finally:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, flags)

    def sync(self) -> None:
        """Return once all of it is on the disk, as far as the system can tell."""
        if not self.regular:
            return
        sync_descriptor(self.fd)
        if self.created:
            self.will_sync()
            if self._folder >= 0:
                os.fsync(self._folder)
            self.created = False
            self._close_folder()

    def will_sync(self) -> None:
        """Open by now what `sync` needs: when its turn comes, others may have taken every descriptor.

        Raises:
            OSError: as `os.open`, of the folder.
        """
        if self.created and self._folder < 0:
            self._folder = _open_folder(self.path.parent)

    def close(self) -> None:
        self._close_folder()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _close_folder(self) -> None:
        fd, self._folder = self._folder, -1
        if fd >= 0:
            os.close(fd)


def sync_descriptor(fd: int) -> None:
    """fsync, in the strongest form that the system has (macOS: F_FULLFSYNC; elsewhere the data and its length)."""
    try:
        import fcntl

        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is not None:
            fcntl.fcntl(fd, full)
            return
    except ImportError:
        pass
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where a folder can be opened (not on Windows)."""
    fd = _open_folder(path)
    if fd >= 0:
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _open_folder(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY) if hasattr(os, "O_DIRECTORY") else -1


def _chunks(buffers: Sequence[Buffer], size: int) -> Iterator[Sequence[Buffer]]:
    if len(buffers) <= size:
        yield buffers
        return
    for at in range(0, len(buffers), size):
        yield buffers[at : at + size]


def _write_all(fd: int, buffers: Sequence[Buffer]) -> Iterator[int]:
    """Write these buffers whole, however little each system call takes; yield how much each took."""
    if hasattr(os, "writev") and len(buffers) > 1:
        done = os.writev(fd, buffers)
        yield done
        if done == sum(map(len, buffers)):
            return
        rest = memoryview(b"".join(buffers))[done:]
    else:
        rest = memoryview(buffers[0] if len(buffers) == 1 else b"".join(buffers))
    while rest:
        done = os.write(fd, rest)
        yield done
        rest = rest[done:]


def whole_pieces(sizes: Iterable[int], taken: int) -> int:
    """How many of `taken` bytes are whole pieces, in a row of pieces of these sizes."""
    kept = 0
    for size in sizes:
        if kept + size > taken:
            break
        kept += size
    return kept


def as_bytes(data: str | Buffer, encoding: str = "utf-8") -> bytes:
    """What somebody wrote, as bytes that nobody can change any more.

    Raises:
        TypeError: it is neither text nor bytes; `bytes()` would take a number for a length.
    """
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return data.encode(encoding)
    if isinstance(data, bytearray | memoryview):
        return bytes(data)
    raise TypeError(f"write got {type(data).__name__}, expected str or bytes")
