"""Ordered appends to a file, on a thread of its own.

    async with FileSink("out.log") as sink:        any loop or thread      │  thread "out.log"
        await sink.write(b"a line\\n")              Intake: list of writes ─┼─► one write for all that is there
        await sink.commit()                                                │   one fsync for all who wait for it

Promises:
    - Writes land in the order made, whole; the file only ever ends at the end of a write.
    - `write` takes its place at once and costs a list append: the thread takes all that is there in one system call.
      Over `max_bytes` not yet written, awaiting it waits until the thread has caught up; or the write is refused, or
      dropped and counted, by `overflow`.
    - What a `commit` was made after is on the disk when it returns. Tasks that commit at the same time share one fsync.
    - Nothing is lost in silence. What the disk refuses is cut back to the last whole write, and the next `write`,
      `flush` and `aclose` raise BrokenResourceError from the OSError: they never go on as if nothing had happened.
    - A write is in one file, never over two: in the one that is open when its turn comes. A file is synced before it
      makes way for another (`Rotation`, `reopen`), so that a later `commit` speaks for both.
    - With `replace`, whoever opens the path sees the old content or the whole new one, even after a power cut.
    - `aclose`, and the interpreter's exit, write what was accepted, then close the file.
    - The main loop never touches the disk, not even to open or close.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import Future as ThreadFuture
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import OffloadError
from ..loops import Call
from . import hangup
from .append import AppendFile, Buffer, as_bytes, sync_folder, whole_pieces
from .intake import MAX_BYTES, Overflow, Writing
from .rotation import Rotation

Fsync = Literal["none", "interval", "always"]

log = logging.getLogger("offload")


class SinkStats(NamedTuple):
    """How a FileSink fares.

    Attributes:
        waiting_bytes: accepted and not written yet.
        written_bytes: by this sink, in all files.
        dropped: writes that found no room, with overflow="drop".
        syncs: fsyncs of its files.
        files: opened since the start, the first included.
    """

    waiting_bytes: int
    written_bytes: int
    dropped: int
    syncs: int
    files: int


class FileSink(Writing[bytes]):
    """Ordered appends to one file from any loop or thread; see the head of this module for what it promises.

    Args:
        path: made if it is not there; its folder must be.
        append: False empties the file first.
        max_bytes: bytes that may wait for the disk before `write` makes its caller wait.
        overflow: what else `write` does at that bound: "raise" QueueFullError, or "drop" the piece and count it. If
            nothing waits, there is room for one piece of any size.
        encoding: of text given to `write`.
        fsync: "none" leaves it to the system and to `commit`; "interval" syncs what was written within `interval`
            seconds, and at the end; "always" each batch, before `flush` or a wait for room returns.
        interval: seconds.
        rotate: when to begin a new file.
        replace: write to a file beside it, `path.tmp-…`, that takes its place when the sink is closed. If the block
            raises, the program ends without closing it, or the disk refuses, the old file stays as it was.
        reopen_on_sighup: `reopen` at each SIGHUP, as log rotation by others expects; start it in the main thread. The
            handler that was there is called too, and is there again afterwards.
        exit_timeout: seconds for which the interpreter's exit, and a caller after Ctrl-C, waits for the disk.

    Use it as `async with`, or by `start()` and `aclose()`; in programs without a loop as `with`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        append: bool = True,
        max_bytes: int = MAX_BYTES,
        overflow: Overflow = "wait",
        encoding: str = "utf-8",
        fsync: Fsync = "none",
        interval: float = 1.0,
        rotate: Rotation | None = None,
        replace: bool = False,
        reopen_on_sighup: bool = False,
        exit_timeout: float = 5.0,
    ) -> None:
        if overflow not in ("wait", "raise", "drop"):
            raise ValueError(f"overflow is {overflow!r}, expected 'wait', 'raise' or 'drop'")
        if fsync not in ("none", "interval", "always"):
            raise ValueError(f"fsync is {fsync!r}, expected 'none', 'interval' or 'always'")
        if interval <= 0:
            raise ValueError(f"interval is {interval} s, expected more than 0")
        if replace and (rotate is not None or reopen_on_sighup):
            raise ValueError("a file that replaces another cannot be rotated or opened again")
        super().__init__(path, "sink", f"sink {path}", max_bytes, exit_timeout)
        self._append = append
        self._overflow: Overflow = overflow
        self._encoding = encoding
        self._fsync: Fsync = fsync
        self._interval = interval
        self._rotate = rotate
        self._replace = replace
        self._keep = False  # the new content takes the old one's place
        self._reopen_on_sighup = reopen_on_sighup
        self._file: AppendFile | None = None
        self._begun = 0.0  # when the file was, for its rotation by time
        self._dirty = True  # a file that was just made has no durable name yet
        self._timer: asyncio.TimerHandle | None = None
        self._written = self._syncs = self._files = 0

    def write(self, data: str | Buffer) -> Awaitable[None]:
        """Append one piece; its place is taken now, awaiting waits for room only.

        Args:
            data: text (encoded as the sink was told) or bytes; a mutable buffer is copied.

        Raises:
            ClosedResourceError: the sink is closed or not started; nothing was accepted.
            QueueFullError: no room, with overflow="raise"; nothing was accepted.
            BrokenResourceError: the disk refused an earlier write; `__cause__` is its OSError.

        Call from any loop; in a thread without one, it waits for room itself. Cancelling the wait does not take the
        piece back.
        """
        data = as_bytes(data, self._encoding)
        return self._put(data, len(data), self._overflow)

    def flush(self, *, fsync: bool = False) -> Call[None]:
        """Have everything written so far in the file; with `fsync` on the disk.

        Raises (when awaited):
            BrokenResourceError: the disk refused; the file ends with the last whole write that it took.
        """
        return self._thread.call(self._flush, fsync)

    def commit(self) -> Call[None]:
        """Have everything written so far on the disk: `flush(fsync=True)`.

        Its place is taken now. Commits that are made while an fsync runs are all served by the next one.
        """
        return self._thread.call(self._flush, True)

    def submit_flush(self, *, fsync: bool = False) -> ThreadFuture[None]:
        """As `flush`, for plain threads: `submit_flush().result()` blocks until it is done."""
        return self._thread.submit(self._flush, fsync)

    def reopen(self) -> Call[None]:
        """Close the file and open the path again: somebody has renamed the file.

        Writes made before are in the old one, synced; those made until it returns may be in either.

        Raises (when awaited):
            OSError: as `os.open`; the sink goes on with the file that it has.
            BrokenResourceError: the disk refused.
        """
        return self._thread.call(self._reopen)

    def stats(self) -> SinkStats:
        """How it fares; from any thread."""
        intake = self._intake
        return SinkStats(intake.waiting_bytes, self._written, intake.dropped, self._syncs, self._files)

    # --- on the caller's thread -------------------------------------------------------------------------------------

    def _enter(self) -> None:
        if self._reopen_on_sighup:
            hangup.listen(self, self._hang_up)

    def _leave(self, exc: BaseException | None) -> None:
        self._keep = self._keep or exc is None
        hangup.ignore(self)

    def _hang_up(self) -> None:
        with contextlib.suppress(OffloadError):  # closed or broken: whoever writes is told
            self._thread.post(self._reopen_or_say)

    # --- on the sink's thread ---------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._replace:
            self._file = _beside(self.path)
        else:
            self._use(self._opened_file())
            if not self._append:
                self._current.cut(0)
        self._opened = True

    def _opened_file(self) -> AppendFile:
        file = AppendFile(self.path)
        try:
            if self._fsync != "none":
                file.will_sync()
        except OSError:
            file.close()
            raise
        return file

    def _use(self, file: AppendFile) -> None:
        """Go on with this file."""
        self._begun = time.time() if file.created or not file.end else os.fstat(file.fd).st_mtime
        self._file = file
        self._dirty = True
        self._files += 1

    @property
    def _current(self) -> AppendFile:
        assert self._file is not None, "it was opened before anything was accepted"
        return self._file

    def _take(self, batch: list[bytes]) -> None:
        if self._error is not None:
            return
        with self._breaking():
            for pieces in self._by_file(batch):
                # Joining small pieces costs less than handing each to the system.
                data = b"".join(pieces)
                self._dirty = True
                self._current.append([data], partial(whole_pieces, [len(piece) for piece in pieces]))
                self._written += len(data)
            if self._fsync == "always":
                self._sync()
        if self._fsync == "interval" and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick)

    def _by_file(self, batch: list[bytes]) -> Iterator[list[bytes]]:
        """What of a batch belongs into the file that is open; it is another one after each."""
        rotate = self._rotate
        if rotate is not None and self._current.end and rotate.is_due(self._begun, time.time()):
            self._turn_over(rotate)
        at = 0
        if rotate is not None and rotate.max_bytes is not None:
            size = self._current.end
            for n, piece in enumerate(batch):
                if size and size + len(piece) > rotate.max_bytes:
                    if n > at:
                        yield batch[at:n]
                    self._turn_over(rotate)
                    at, size = n, self._current.end
                size += len(piece)
        yield batch[at:] if at else batch

    def _turn_over(self, rotate: Rotation) -> None:
        """Rename the file and begin the next; it may be that somebody else has renamed it already."""
        old = self._current
        self._sync()
        try:
            ours = os.path.samestat(os.fstat(old.fd), os.stat(self.path))
        except FileNotFoundError:
            ours = False
        old.close()  # first: Windows renames no open file
        if ours:
            rotate.move(self.path, self._begun)
        self._use(self._opened_file())

    def _sync(self) -> None:
        if self._dirty:
            self._current.sync()
            self._dirty = False
            self._syncs += 1

    def _flush(self, fsync: bool) -> None:
        self._intake.take_all()
        if fsync and self._error is None:
            with self._breaking():
                self._sync()
        self._check()

    def _tick(self) -> None:
        self._timer = None
        if self._error is None:
            with self._breaking():
                self._sync()

    def _reopen(self) -> None:
        self._flush(fsync=False)
        new = self._opened_file()
        with self._breaking():
            self._sync()
        self._current.close()
        self._use(new)
        self._check()

    def _reopen_or_say(self) -> None:
        try:
            self._reopen()
        except (OSError, OffloadError):
            log.exception("sink %s could not be opened again; it goes on with the file that it has", self.path)

    def _finish(self) -> None:
        file = self._file
        if file is None:
            return
        self._intake.finish(self._closed if self._error is None else self._broken)
        if self._timer is not None:
            self._timer.cancel()
        with self._breaking():
            if self._error is None and (self._keep if self._replace else self._fsync != "none"):
                self._sync()
        with self._breaking():
            file = self._current
            file.close()
            if self._replace:
                self._take_place(file.path)
        self._check()

    def _take_place(self, new: Path) -> None:
        if self._keep and self._error is None:
            old = Path(os.path.realpath(self.path))
            os.replace(new, old)
            sync_folder(old.parent)
        else:
            new.unlink()


def _beside(path: Path) -> AppendFile:
    """A new file in the folder of `path`, with its rights. A link is followed: it stays a link."""
    path = Path(os.path.realpath(path))
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EEXIST, "is not a regular file, which another could replace", str(path))
    while not (file := AppendFile(f"{path}.tmp-{os.urandom(4).hex()}")).created:
        file.close()
    if mode is not None:
        os.chmod(file.path, stat.S_IMODE(mode))
    file.created = False  # no folder need keep this name: it loses it, or is removed
    return file
