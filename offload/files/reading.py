"""One file of a log while it is read: up to where, how to know it again, and what a tail makes of it.

A tail gives out steps: a generation begins, a piece of it, a gap in it. The payloads are views of an arena that several
files fill one behind the other, so that a batch of many small reads is one write.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from ..packets.codec import CommitEntry, GapInfo, SourceInfo, line_pieces
from ..packets.format import (
    GUARD_BYTES,
    HEAD_BYTES,
    HOLE_STRUCT,
    NONE_U64,
    Compression,
    EntryFlag,
    Flag,
    GapReason,
)
from .contents import Contents
from .packet_file import Piece
from .rotated import Resume, entry_of

ARENA_BYTES = 1 << 20
HOLE_BYTES = 4096  # so many NULs are no line of anybody
_NULS = re.compile(rb"\0+")


@dataclass(slots=True)
class Begin:
    """A source begins, or its next generation.

    `left`: size and mtime in ns of the file of the generation before, when that was left; None: nobody has looked.
    """

    source_id: int
    info: SourceInfo
    first: bool
    left: tuple[int, int] | None = None


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


@dataclass(slots=True, eq=False)
class Reading:
    """One file of a source: up to where it was read, and how to know it again."""

    info: SourceInfo
    contents: Contents | None = None
    offset: int = 0
    size: int = 0
    mtime_ns: int = 0
    head: bytes = b""
    guard: bytes = b""
    open: EntryFlag = EntryFlag.NONE
    entry: CommitEntry | None = None  # as a packet file has it, until it was compared with the file
    upto: int | None = None  # where it ends, unless it is followed
    owed: int = 0  # of a copy: what the file had that was copied and cut
    behind: bool = False  # found under another name: the source's name is another file's, which comes next
    ended: bool = False  # no more is expected: a rest without LF is given out too
    in_hole: bool = False
    padded: int | None = None  # from where on there was nothing but NULs at the last look
    grew: float = 0.0
    checked_ns: int = 0  # mtime when the guard was last compared
    known: Resume | None = field(default=None)  # what others can know it by, once it lost the name

    @property
    def identity(self) -> tuple[int, int]:
        return self.info.device, self.info.inode

    @property
    def end(self) -> int:
        return self.size if self.upto is None else min(self.upto, self.size)

    @property
    def lag(self) -> int:
        return max(0, self.end - self.offset)

    def as_entry(self) -> CommitEntry:
        if self.entry is not None:
            return self.entry
        return entry_of(self.head, self.guard, self.offset, self.size, self.mtime_ns)

    def stands(self) -> bool:
        """Whether what stands before the offset is what was read there."""
        assert self.contents is not None
        return self.contents.read_at(self.offset - len(self.guard), len(self.guard)) == self.guard

    def passed(self, data: bytes) -> None:
        """Take in the last bytes that were given out, or at least GUARD_BYTES of them; all that belong to the head."""
        if len(self.head) < HEAD_BYTES:
            self.head += data[: HEAD_BYTES - len(self.head)]
        self.guard = (self.guard + data[-GUARD_BYTES:])[-GUARD_BYTES:]


def reading_of(contents: Contents, path: str, start: int = 0) -> Reading:
    """A file that has the name of this source, from a byte on."""
    device, inode = contents.identity
    info = SourceInfo(device, inode, contents.birth_ns, 0, contents.compression, os.fsencode(path))
    reading = Reading(info, contents, start)
    if start:
        seen(reading, contents)
    return reading


def taken_up(contents: Contents, known: Resume) -> Reading:
    """A file that was read before, from where it was left."""
    at = known.entry.resume_off
    reading = Reading(known.info, contents, at, known.entry.size, known.entry.mtime_ns, known=known)
    seen(reading, contents)
    return reading


def seen(reading: Reading, contents: Contents) -> None:
    """Read what stands before the offset: the packet file keeps hashes, and what comes needs the bytes."""
    guard = min(reading.offset, GUARD_BYTES)
    reading.head = contents.read_at(0, min(reading.offset, HEAD_BYTES))
    reading.guard = contents.read_at(reading.offset - guard, guard)


def fill(reading: Reading, arena: Arena, length: int) -> tuple[int, int]:
    """Read the guard and what follows; return where the new bytes are, or (1, 0): the file was rewritten."""
    contents, guard = reading.contents, len(reading.guard)
    assert contents is not None
    start = arena.at + guard
    if contents.compression is not Compression.NONE:
        # Nobody writes into a packed file, and to go back in it is to begin anew.
        return start, start + contents.read_into(arena.view[start : start + length], reading.offset)
    got = contents.read_into(arena.view[arena.at : start + length], reading.offset - guard)
    if got < guard or arena.view[arena.at : start] != reading.guard:
        return 1, 0
    return start, arena.at + got


def find_hole(data: bytearray, start: int, end: int, *, inside: bool) -> tuple[int, int] | None:
    """The first run of HOLE_BYTES NULs or more in `data[start:end]`; `inside` a hole, of any that goes on with it."""
    if inside and data[start] == 0:
        run = _NULS.match(data, start, end)
        assert run is not None
        return run.span()
    # Every such run has a byte at one of these places; in text none of them is a NUL.
    if 0 not in data[start:end:HOLE_BYTES]:
        return None
    for run in _NULS.finditer(data, start, end):
        if run.end() - run.start() >= HOLE_BYTES:
            return run.span()
    return None


class Generations:
    """What a source gives out: pieces and gaps of its files, and which file they are of where that changes.

    Attributes:
        current: the file of the present generation; None: the source has none yet.
        follow: what is not there yet may come.
    """

    def __init__(self, source_id: int, *, follow: bool, current: Reading | None) -> None:
        self.source_id = source_id
        self.follow = follow
        self.current = current

    def give(
        self,
        reading: Reading,
        arena: Arena,
        start: int,
        end: int,
        steps: list[Step],
        *,
        ended: bool,
        last: bool,
        limit: int,
    ) -> None:
        """Give out what stands in the arena: lines, and long runs of NULs as holes."""
        data, at = arena.data, start
        while at < end:
            hole = find_hole(data, at, end, inside=reading.in_hole)
            if hole is None:
                self._lines(reading, arena, at, end, steps, ended=ended and last, limit=limit)
                return
            begin, stop = hole
            place = reading.offset + begin - at
            behind = place + stop - begin
            if stop == end:
                assert reading.contents is not None
                behind = max(behind, reading.contents.data_at(behind, reading.end))
            if behind >= reading.end and not (reading.ended or (ended and not self.follow)):
                # Room that the program reserved, perhaps, and will write to.
                reading.padded = place
                self._lines(reading, arena, at, begin, steps, ended=False, limit=limit)
                return
            self._lines(reading, arena, at, begin, steps, ended=False, limit=limit)
            rest = place - reading.offset
            if rest:  # the line that the hole stands in
                self._lines(reading, arena, begin - rest, begin, steps, ended=False, limit=rest)
            self.select(reading, steps)
            length = behind - place
            steps.append(Piece(self.source_id, HOLE_STRUCT.pack(length), place, 0, Flag.HOLE))
            reading.passed(bytes(min(length, HEAD_BYTES)))
            reading.offset = behind
            reading.in_hole = True
            at = stop
            arena.at = max(arena.at, at)

    def _lines(
        self, reading: Reading, arena: Arena, start: int, end: int, steps: list[Step], *, ended: bool, limit: int
    ) -> None:
        open = reading.open if reading is self.current else EntryFlag.NONE
        at = start
        for piece in line_pieces(arena.data, start, end, open, ended=ended, limit=limit):
            self.select(reading, steps)
            payload = arena.view[piece.start : piece.end]
            steps.append(Piece(self.source_id, payload, reading.offset, piece.count, piece.flags))
            reading.offset += len(payload)
            reading.open = piece.open
            at = piece.end
        if at > start:
            reading.in_hole = False
            keep = GUARD_BYTES if len(reading.head) == HEAD_BYTES else at - start
            reading.passed(bytes(arena.view[max(start, at - keep) : at]))
            arena.at = at

    def select(self, reading: Reading, steps: list[Step]) -> None:
        """What comes next is of this file: a generation, unless it is the present one's."""
        if reading is self.current:
            return
        info = reading.info._replace(start_off=reading.offset)
        before = self.current
        left = (before.size, before.mtime_ns) if before is not None and before.mtime_ns else None
        steps.append(Begin(self.source_id, info, first=before is None, left=left))
        if reading.offset:
            steps.append(Seen(self.source_id, reading.head, reading.guard))
        reading.open = EntryFlag.NONE
        self.current = reading

    def gap(self, reading: Reading, steps: list[Step], reason: GapReason, end: int = NONE_U64) -> None:
        self.select(reading, steps)
        steps.append(Gap(self.source_id, GapInfo(reading.offset, end, NONE_U64, reason)))
