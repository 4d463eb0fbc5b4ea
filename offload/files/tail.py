"""One growing file: where it was read up to, and what comes next. For one thread; no clock, no waiting.

    path "app.log"   generation 0           1 (renamed away, new file)      2 (truncated)
                     ├─ read ─┤ rest ─────► ├─ … ──────────────────────────► ├─ …
                              offset

Promises:
    - A byte is given out once, in order, with its offset; only whole lines, until the file is known to end there.
    - A line longer than the buffer comes in fragments; nothing is cut off, however long.
    - What was read is compared again with each read: the last GUARD_BYTES before the offset. So a file that was
      truncated and grew again past the offset is noticed, and begins a new generation.
    - A file that was renamed is read to its end by the descriptor that is open, before the file that has its name now.
      One renamed while nobody looked is looked for in its folder.
    - Bytes that cannot be read any more are stated as a Gap, never passed over.

The partial last line is held as an offset, not as bytes: memory does not grow with the number of files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..packets.codec import CommitEntry, GapInfo, SourceInfo, line_pieces
from ..packets.format import GUARD_BYTES, HEAD_BYTES, NONE_U64, Compression, EntryFlag, GapReason
from ..packets.ledger import digest
from .packet_file import Piece, open_regular, read_at

ARENA_BYTES = 1 << 20
_ROOM = 64 << 10  # an arena with less than this left is full: a read of less is not worth its system call


@dataclass(slots=True)
class Begin:
    """A source begins, or its next generation."""

    source_id: int
    info: SourceInfo
    first: bool


@dataclass(slots=True)
class Gap:
    """Bytes of a source that nobody can read any more."""

    source_id: int
    info: GapInfo


@dataclass(slots=True)
class Seen:
    """What a file holds where it was read before: the packet file keeps hashes, and a longer guard needs the bytes."""

    source_id: int
    head: bytes
    guard: bytes


Step = Begin | Gap | Seen | Piece


@dataclass(slots=True)
class Resume:
    """Where a packet file has a source: its present generation, and how far that was read."""

    info: SourceInfo
    entry: CommitEntry


Former = dict[tuple[int, int], CommitEntry]
"""Device and inode of files that lost their name after they were read -> how far, and how to know them."""


class Arena:
    """A buffer that several reads fill one behind the other."""

    __slots__ = ("at", "data", "view")

    def __init__(self, size: int = ARENA_BYTES + GUARD_BYTES) -> None:
        self.data = bytearray(size)
        self.view = memoryview(self.data)
        self.at = 0

    @property
    def room(self) -> int:
        return len(self.data) - self.at


class Tail:
    """What comes next in one file.

    Args:
        path: absolute; its bytes name the source.
        source_id: its number in the packet file.
        resume: where the packet file has it; None: it is new.
        follow: False: read up to the size that it has when it is opened, and end there.
        former: files that were read to their end and then lost their name, and how to know them; added to.
        taken: whether the file that has a path now, with this device and inode, is another source's: then it is that
            source's file under a new name, not the next one of this.

    Attributes:
        offset: of the next byte wanted, in the present generation.
        size: as of the last look; `size - offset` is the lag.
    """

    def __init__(
        self,
        path: str,
        source_id: int,
        resume: Resume | None = None,
        *,
        follow: bool = False,
        former: Former | None = None,
        taken: Callable[[str, tuple[int, int]], bool] = lambda path, identity: False,
    ) -> None:
        self.path = path
        self._taken = taken
        self.source_id = source_id
        self.offset = self.size = 0
        self.mtime_ns = 0
        self._fd = -1
        self._follow = follow
        self._former = {} if former is None else former
        self._upto: int | None = None
        self._resume = resume  # until what it says has been compared with the file
        self._known = resume is not None  # whether the source is in the packet file
        self._renamed: CommitEntry | None = None
        self._checked_ns = 0  # mtime when the guard was last compared
        self._behind = False  # the open file has lost its name to another, which comes next
        self._identity: tuple[int, int] | None = None
        self._open = EntryFlag.NONE
        self._guard = b""
        if resume is not None:
            self.offset, self.size = resume.entry.resume_off, resume.entry.size
            self.mtime_ns = resume.entry.mtime_ns
            self._open = resume.entry.flags
            self._identity = (resume.info.device, resume.info.inode)

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the file that is read; None before it was compared with what is known of it."""
        return self._identity if self._resume is None else None

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    @property
    def lag(self) -> int:
        """Bytes that are there and not given out, as of the last look."""
        upto = self.size if self._upto is None else self._upto
        return max(0, upto - self.offset)

    def begin_at(self, entry: CommitEntry) -> None:
        """Begin behind what was read of this file when it had another name; before the first read."""
        self._renamed = entry

    def close(self) -> None:
        """Let go of the descriptor; the next read opens the file again and compares it with what is known."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def read(self, arena: Arena, steps: list[Step], *, final: bool = False) -> bool:
        """Read into the arena and append the steps for the packet file; their payloads are views of the arena.

        Args:
            final: nobody will read on soon, so a last line without its end is given out too.

        Returns:
            Whether there is more that did not fit.

        Raises:
            FileNotFoundError: there is no such file (and never was one open).
            OSError: it may not be read, or is no regular file.
        """
        if self._fd < 0:
            self._open_file(steps)
        ended = final
        while True:
            status = os.fstat(self._fd)
            shrunk = status.st_size < self.size
            self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
            if self.size < self.offset or (shrunk and not self._is_same()):
                self._restart(steps, GapReason.TRUNCATED)
                continue
            if shrunk:
                self._gap(steps, GapReason.TRUNCATED)  # of the last line, which was not given out yet
            upto = self.size if self._upto is None else min(self._upto, self.size)
            if upto > self.offset:
                guard = len(self._guard)
                want = upto - self.offset
                if arena.room - guard < min(want, _ROOM):
                    return True
                fresh = arena.at == 0
                start, end = self._fill(arena, min(want, arena.room - guard))
                if end < start:
                    self._restart(steps, GapReason.TRUNCATED)
                    continue
                last = self.offset + end - start >= upto
                limit = end - start if fresh and not last else len(arena.data)
                at = self.offset
                self._take(arena, start, end, steps, ended=ended and last, limit=limit)
                if not last:
                    if self.offset == at and not fresh:
                        return True  # a line that is longer than what was left of this arena
                    continue
            elif self._guard and self.mtime_ns != self._checked_ns and not self._is_same():
                self._restart(steps, GapReason.TRUNCATED)  # written anew, and as long as before
                continue
            self._checked_ns = self.mtime_ns
            if not (self._follow or self._behind) or not self._replaced():
                return False
            if self.offset < upto and not ended:
                ended = True  # first the rest of the old file
                continue
            assert self._identity is not None
            self._former[self._identity] = self._entry()
            self.close()
            self._begin_next(steps)
            ended = final

    def _fill(self, arena: Arena, length: int) -> tuple[int, int]:
        """Read the guard and what follows; return where the new bytes are, or (1, 0): the file was rewritten."""
        guard = len(self._guard)
        target = arena.view[arena.at : arena.at + guard + length]
        if hasattr(os, "preadv"):
            got = os.preadv(self._fd, [target], self.offset - guard)
        else:
            data = read_at(self._fd, self.offset - guard, len(target))
            got = len(data)
            target[:got] = data
        start = arena.at + guard
        if got < guard or arena.view[arena.at : start] != self._guard:
            return 1, 0
        return start, arena.at + got

    def _take(self, arena: Arena, start: int, end: int, steps: list[Step], *, ended: bool, limit: int) -> None:
        at = start
        for piece in line_pieces(arena.data, start, end, self._open, ended=ended, limit=limit):
            payload = arena.view[piece.start : piece.end]
            steps.append(Piece(self.source_id, payload, self.offset, piece.count, piece.flags))
            self.offset += len(payload)
            self._open = piece.open
            at = piece.end
        if at > start:
            self._guard = (self._guard + bytes(arena.view[max(start, at - GUARD_BYTES) : at]))[-GUARD_BYTES:]
            arena.at = at

    # --- which file it is ---------------------------------------------------------------------------------------------

    def _open_file(self, steps: list[Step]) -> None:
        resumed = self._resume is not None
        self._behind = False  # it was of the descriptor that was closed
        try:
            fd, status = open_regular(self.path)
        except FileNotFoundError:
            # Renamed, and its name not taken yet?
            old = self._find() if self._known else None
            if old is None:
                raise
            fd, status = old, os.fstat(old)
            self._behind = True
        same = (status.st_dev, status.st_ino) == self._identity
        if self._known and not self._behind and not (same and self._continues(fd, status)):
            # First the file itself, under another name: many logs begin alike, and little may have been read of it.
            old = self._find()
            if old is not None:
                os.close(fd)
                fd, self._behind = old, True
                status = os.fstat(fd)
            elif same or not self._continues(fd, status):
                if self.offset or self.size:
                    self._gap(steps, GapReason.TRUNCATED if same else GapReason.UNLINKED)
                self._begin(steps, status)
        elif not self._known:
            start, self._renamed = self._renamed, None
            self._begin(steps, status, 0 if start is None else start.resume_off)
            resumed = start is not None
        self._fd, self._identity = fd, (status.st_dev, status.st_ino)
        if resumed and self.offset:
            self._guard = read_at(fd, max(0, self.offset - GUARD_BYTES), min(self.offset, GUARD_BYTES))
            steps.append(Seen(self.source_id, read_at(fd, 0, min(self.offset, HEAD_BYTES)), self._guard))
        if not self._follow:
            self._upto = status.st_size

    def _continues(self, fd: int, status: os.stat_result) -> bool:
        """Whether this file begins with what was read; the inode alone proves nothing, for they are used again."""
        if status.st_size < self.offset:
            return False
        if not self.offset and (status.st_dev, status.st_ino) != self._identity:
            return False  # nothing was read of it that could tell, but there may have been the beginning of a line
        if self._resume is None:
            return self._is_same(fd)
        guard = holds(fd, self._resume.entry)
        if guard is None:
            return False
        self._guard, self._resume = guard, None
        return True

    def _is_same(self, fd: int | None = None) -> bool:
        """Whether what stands before the offset is what was read there."""
        guard = len(self._guard)
        return read_at(self._fd if fd is None else fd, self.offset - guard, guard) == self._guard

    def _entry(self) -> CommitEntry:
        """How to know the present file again."""
        guard, size = self._guard, self.size
        return CommitEntry(
            self.source_id, 0, 0, self.offset, 0, size, self.mtime_ns, 0, len(guard), self._open, b"", digest(guard)
        )

    def _find(self) -> int | None:
        """The descriptor of the file that was read, under whatever name it has in its folder now."""
        for path in _same_inode(os.path.dirname(self.path), self._identity):
            try:
                fd, status = open_regular(path)
            except OSError:
                continue
            if self._continues(fd, status):
                return fd
            os.close(fd)
        return None

    def _replaced(self) -> bool:
        """Whether the name belongs to another file now, with something in it."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        identity = status.st_dev, status.st_ino
        return identity != self._identity and status.st_size > 0 and not self._taken(self.path, identity)

    def _begin(self, steps: list[Step], status: os.stat_result, start: int = 0) -> None:
        self._identity = (status.st_dev, status.st_ino)
        self.offset, self._guard, self._open, self._resume = start, b"", EntryFlag.NONE, None
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        path = os.fsencode(self.path)
        info = SourceInfo(status.st_dev, status.st_ino, 0, start, Compression.NONE, path)
        steps.append(Begin(self.source_id, info, first=not self._known))
        self._known = True

    def _begin_next(self, steps: list[Step]) -> None:
        self._fd, status = open_regular(self.path)
        self._behind = False
        self._begin(steps, status)
        if not self._follow:
            self._upto = status.st_size

    def _restart(self, steps: list[Step], reason: GapReason) -> None:
        """The open file is not what it was: what was not read of it is gone."""
        self._gap(steps, reason)
        self._begin(steps, os.fstat(self._fd))
        if self._upto is not None:
            self._upto = self.size

    def _gap(self, steps: list[Step], reason: GapReason) -> None:
        steps.append(Gap(self.source_id, GapInfo(self.offset, NONE_U64, NONE_U64, reason)))


def holds(fd: int, entry: CommitEntry) -> bytes | None:
    """Whether an open file begins with what was read of it by head and guard: then the guard's bytes, else None."""
    guard = read_at(fd, entry.resume_off - entry.guard_len, entry.guard_len)
    head = read_at(fd, 0, entry.head_len)
    if (entry.guard_len and digest(guard) != entry.guard) or (entry.head_len and digest(head) != entry.head):
        return None
    return guard


def is_former(path: str, entry: CommitEntry) -> bool:
    """Whether this file is one that was read already, under another name; its inode may belong to a new one."""
    try:
        fd, status = open_regular(path)
    except OSError:
        return False
    try:
        return status.st_size >= entry.resume_off and holds(fd, entry) is not None
    finally:
        os.close(fd)


def _same_inode(folder: str, identity: tuple[int, int] | None) -> Iterator[str]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        try:
            status = entry.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == identity:
            yield entry.path
