"""Ordered appends to a file, on a thread of its own.

    async with FileSink("out.log") as sink:        any loop or thread      │  thread "out.log"
        await sink.write(b"a line\\n")              Intake: list of writes ─┼─► one write for all that is there
        await sink.flush(fsync=True)                                       │

Promises:
    - Writes land in the order made, whole; the file only ever ends at the end of a write.
    - `write` takes its place at once and costs a list append: the thread takes all that is there in one system call.
      Over `max_bytes` not yet written, awaiting it waits until the thread has caught up.
    - Nothing is lost in silence. What the disk refuses is cut back to the last whole write, and the next `write`,
      `flush` and `aclose` raise BrokenResourceError from the OSError: they never go on as if nothing had happened.
    - `aclose`, and the interpreter's exit, write what was accepted, then close the file.
    - The main loop never touches the disk, not even to open or close.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from ..errors import BrokenResourceError, ClosedResourceError, OffloadError
from ..loops import Call, LoopThread

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

# As many bytes may wait for the disk: enough to ride out a slow fsync, little enough not to be missed.
MAX_BYTES = 4 << 20
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

    def sync(self) -> None:
        """Return once all of it is on the disk, as far as the system can tell."""
        if not self.regular:
            return
        sync_descriptor(self.fd)
        if self.created:
            sync_folder(self.path.parent)
            self.created = False

    def close(self) -> None:
        fd, self.fd = self.fd, -1
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
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


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


class Done:
    """An awaitable that is done: awaiting it does not give up the loop."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, None, None]:
        return _NOTHING  # type: ignore[return-value]


_NOTHING: Iterable[Any] = iter(())
DONE = Done()


class Intake(Generic[T]):
    """Items on their way to a LoopThread, in order, bounded in bytes; a wake and a call for each batch, not each item.

    Args:
        thread: its owner's thread.
        take: called on the thread with each batch, in order; must not raise.
        max_bytes: how much may wait before `put` asks its caller to wait too.
    """

    def __init__(self, thread: LoopThread, take: Callable[[list[T]], None], max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}, expected at least 1")
        self._thread = thread
        self._take = take
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._items: list[T] = []
        self._accepted = self._taken = self._batch = 0  # bytes
        self._posted = False
        self._refusal: Callable[[], OffloadError] | None = None
        _intakes.add(self)

    @property
    def waiting_bytes(self) -> int:
        """Bytes accepted that `take` has not finished with."""
        return self._accepted - self._taken

    def put(self, item: T, size: int) -> Awaitable[None]:
        """Take the next place; from any thread, with or without a loop.

        Returns:
            Done, or, over the bound, a Call that ends when this item has been taken. A thread without an event loop
            cannot await: there, `put` itself waits.

        Raises:
            OffloadError: as `refuse` was told, or the thread is gone; nothing was accepted.
        """
        with self._lock:
            if self._refusal is not None:
                raise self._refusal()
            self._items.append(item)
            self._accepted += size
            posted, self._posted = self._posted, True
        try:
            if not posted:
                self._thread.post(self.take_all)
            if self._accepted - self._taken > self._max_bytes and not self._thread.is_here():
                return self._room()
        except ClosedResourceError:
            pass  # closing since we looked: the owner's on_close calls `finish`, which takes this item too
        except OffloadError as exc:
            # The thread is gone, and the next `put` would not notice: it would rely on what we did not post.
            kind, message, cause = type(exc), str(exc), exc.__cause__
            self.refuse(lambda: _from(kind(message), cause))
            raise
        return DONE

    def _room(self) -> Awaitable[None]:
        """Wait until the item has been taken: by the batch that was posted, or by us if its post is still to come."""
        if asyncio._get_running_loop() is not None:
            return self._thread.call(self.take_all)
        self._thread.submit(self.take_all).result()
        return DONE

    def take_all(self) -> None:
        """Hand what is there to `take`; on the thread."""
        with self._lock:
            self._posted = False
            items, self._items = self._items, []
            upto = self._accepted
        if items:
            self._take(items)
        self._taken = upto

    def finish(self, refusal: Callable[[], OffloadError]) -> None:
        """Accept nothing more and hand over what is there; on the thread."""
        self.refuse(refusal)
        self.take_all()

    def refuse(self, refusal: Callable[[], OffloadError]) -> None:
        """Accept nothing more; from any thread."""
        with self._lock:
            self._refusal = refusal

    def after_fork(self) -> None:
        """In a forked child: what was put in the parent is written there; who puts here is told that it cannot be."""
        self._lock = threading.RLock()
        self._items = []
        self._posted = False


def _from(error: OffloadError, cause: BaseException | None) -> OffloadError:
    error.__cause__ = cause
    return error


_intakes: weakref.WeakSet[Intake[Any]] = weakref.WeakSet()


def _after_fork() -> None:
    for intake in list(_intakes):
        intake.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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


class FileSink:
    """Ordered appends to one file from any loop or thread; see the head of this module for what it promises.

    Args:
        path: made if it is not there; its folder must be.
        append: False empties the file first.
        max_bytes: bytes that may wait for the disk before `write` makes its caller wait.
        encoding: of text given to `write`.

    Use it as `async with`, or by `start()` and `aclose()`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        append: bool = True,
        max_bytes: int = MAX_BYTES,
        encoding: str = "utf-8",
    ) -> None:
        self.path = Path(path)
        self._append = append
        self._encoding = encoding
        self._file: AppendFile | None = None
        self._error: OSError | None = None
        self._thread = LoopThread(f"sink {self.path.name}", on_close=self._finish)
        self._intake: Intake[bytes] = Intake(self._thread, self._write_batch, max_bytes)

    async def start(self) -> Self:
        """Open the file, on the sink's thread.

        Raises:
            OSError: as `os.open` (FileNotFoundError, PermissionError, IsADirectoryError …).
        """
        await self._thread.start()
        try:
            await self._thread.call(self._open)
        except BaseException:
            await self._thread.aclose()
            raise
        return self

    def write(self, data: str | Buffer) -> Awaitable[None]:
        """Append one piece; its place is taken now, awaiting waits for room only.

        Args:
            data: text (encoded as the sink was told) or bytes; a mutable buffer is copied.

        Raises:
            ClosedResourceError: the sink is closed or not started; nothing was accepted.
            BrokenResourceError: the disk refused an earlier write; `__cause__` is its OSError.

        Call from any loop; in a thread without one, it waits for room itself. Cancelling the wait does not take the
        piece back.
        """
        data = as_bytes(data, self._encoding)
        if self._file is None and self._error is None:
            raise ClosedResourceError(f"sink {self.path} is not open; use it as `async with`, or await its start()")
        return self._intake.put(data, len(data))

    def flush(self, *, fsync: bool = False) -> Call[None]:
        """Have everything written so far in the file; with `fsync` on the disk.

        Raises (when awaited):
            BrokenResourceError: the disk refused; the file ends with the last whole write that it took.
        """
        return self._thread.call(self._flush, fsync)

    async def aclose(self) -> None:
        """Write what was accepted, close the file, end the thread. Cancelling does not shorten it.

        Raises:
            BrokenResourceError: the disk refused something that was accepted.
        """
        await self._thread.aclose()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        except BrokenResourceError:
            if not isinstance(exc, BrokenResourceError):  # otherwise the block knows already
                raise

    # --- on the sink's thread ---------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._file = AppendFile(self.path)
        if not self._append:
            self._file.cut(0)

    def _write_batch(self, batch: list[bytes]) -> None:
        assert self._file is not None
        if self._error is not None:
            return
        try:
            # Joining small pieces costs less than handing each to the system.
            self._file.append([b"".join(batch)], lambda taken: whole_pieces(map(len, batch), taken))
        except OSError as exc:
            self._error = exc
            self._intake.refuse(self._broken)

    def _flush(self, fsync: bool) -> None:
        self._intake.take_all()
        if self._error is None and fsync and self._file is not None:
            try:
                self._file.sync()
            except OSError as exc:
                self._error = exc
                self._intake.refuse(self._broken)
        if self._error is not None:
            raise self._broken()

    def _finish(self) -> None:
        if self._file is None:
            return
        self._intake.finish(self._closed if self._error is None else self._broken)
        try:
            self._file.close()
        except OSError as exc:
            self._error = self._error or exc
        if self._error is not None:
            raise self._broken()

    def _closed(self) -> OffloadError:
        return ClosedResourceError(f"sink {self.path} is closed")

    def _broken(self) -> OffloadError:
        error = BrokenResourceError(f"sink {self.path} could not be written: {self._error}")
        error.__cause__ = self._error
        return error
