"""What a packet file holds of a source's file, found by its place in that file (FORMAT.md, rule 5). For one thread.

A log that became shorter, as after a power cut of its machine, is compared with what was read of it. That stands at
the packet file's end, among what came from others at that time. So frames are walked from the end back, header by
header, and as far as is asked for; where those of each source stand is kept, and no frame is looked for twice. What is
written meanwhile is walked forward.

A file may stand in several generations: a later one goes on where an earlier one of it ended, or where that one still
agreed with the file. So the last one that has a byte counts.
"""

from __future__ import annotations

import errno
import os
from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import PacketError
from ..packets.codec import CommitEntry, Header, SourceInfo, hole_len, unpack_header
from ..packets.format import HEADER_BYTES, SEAL_STRUCT, Flag, FrameType
from .series import Part, Series

_WINDOW = 64 << 10  # bytes read at once where frames are short
_HOLE = 0  # in place of a payload's place, where no payload can be


_Places = defaultdict[tuple[int, int], "array[int]"]


class Range(NamedTuple):
    """Bytes [start, end) of a source's file stand in this generation."""

    generation: int
    start: int
    end: int


def ranges(generations: Iterable[tuple[SourceInfo, CommitEntry]], wanted: int) -> list[Range]:
    """Where the file of a generation stands.

    Args:
        generations: of a source, the newest first, and how far each was read.
        wanted: the generation that has the file's end.

    Returns:
        The last bytes first. What is before them is not in the packet file.
    """
    found: list[Range] = []
    file: tuple[int, int, int] | None = None
    upto = 0
    for info, entry in generations:
        if entry.generation == wanted:
            file, upto = (info.device, info.inode, info.birth_ns), entry.resume_off
        elif file is None or (info.device, info.inode, info.birth_ns) != file:
            continue
        if entry.resume_off < upto:
            break
        found.append(Range(entry.generation, info.start_off, upto))
        upto = info.start_off
        if not upto:
            break
    return found


class Recall:
    """The frames of a packet file up to a place, from there back.

    Args:
        path: the packet file; it may be growing.
        segment: the number of its live segment.
        end: where a frame ends in that, in bytes; `prev_len`: that frame's length.

    Raises:
        OSError: as `open`; FileNotFoundError: another segment is the live one.
    """

    def __init__(self, path: str | os.PathLike[str], segment: int, end: int, prev_len: int) -> None:
        self._series = Series(path)
        self._parts = list(self._series.parts)
        self._live = self._part = self._parts.pop()
        if self._part.number != segment:
            self._series.close()
            raise FileNotFoundError(errno.ENOENT, f"is segment {self._part.number}, expected {segment}", str(path))
        self._end = self._at = end
        self._prev_len = prev_len
        self._window = b""
        self._window_at = 0
        # Source and generation -> place in the source, length and place of the payload of each frame, the last first;
        # and those that came since, the first one first.
        self._places: defaultdict[tuple[int, int], array[int]] = defaultdict(lambda: array("Q"))
        self._since: defaultdict[tuple[int, int], array[int]] = defaultdict(lambda: array("Q"))

    def grow(self, end: int) -> None:
        """Take in what was written since.

        Raises:
            OSError, PacketError: it cannot be read.
        """
        while self._end < end:
            header = unpack_header(self._series.reader(self._live)(self._end, HEADER_BYTES), offset=self._end)
            if header.type is FrameType.LINES:
                self._note(self._since, header, self._live, self._end)
            self._end += header.frame_len

    def read(self, source_id: int, wanted: list[Range], start: int, end: int) -> bytes:
        """The bytes [start, end) of a file that stands there; b"" if not all of them are there.

        Raises:
            OSError: a segment cannot be read.
        """
        data = bytearray(end - start)
        need = end
        for generation, first, last in wanted:
            while max(start, first) < need <= last:
                place = self._find(source_id, generation, need - 1)
                if place is None:
                    return b""
                at, payload = place
                begin = max(at, start)
                if payload != _HOLE:
                    part = self._series.read_at(payload + begin - at, need - begin)
                    if len(part) < need - begin:
                        return b""
                    data[begin - start : need - start] = part
                need = begin
            if need == start:
                return bytes(data)
        return b""

    def _find(self, source_id: int, generation: int, byte: int) -> tuple[int, int] | None:
        """Where the frame begins that has this byte of a generation, in the file and in the packet file."""
        since = self._since[source_id, generation]
        if since and since[0] <= byte:
            number = bisect_right(range(len(since) // 3), byte, key=lambda i: since[3 * i]) - 1
            at, length, payload = since[3 * number : 3 * number + 3]
            return (at, payload) if byte < at + length else None
        places = self._places[source_id, generation]
        while not places or places[-3] > byte:
            if not self._step():
                return None
        number = bisect_left(range(len(places) // 3), -byte, key=lambda i: -places[3 * i])
        at, length, payload = places[3 * number : 3 * number + 3]
        return (at, payload) if byte < at + length else None

    def _step(self) -> bool:
        """Take in the frame before; False: there is none."""
        while self._at == 0:
            if not self._parts:
                return False
            if self._parts[-1].number != self._part.number - 1:
                return False
            self._part = self._parts.pop()  # a closed segment ends with its SEAL
            self._at, self._prev_len = self._part.size, HEADER_BYTES + SEAL_STRUCT.size
            self._window = b""
        offset = self._at - self._prev_len
        try:
            if not HEADER_BYTES <= self._prev_len <= self._at:
                return False
            header = unpack_header(self._header_at(offset))
            if header.frame_len != self._prev_len:
                return False
            if header.type is FrameType.LINES:
                self._note(self._places, header, self._part, offset)
        except PacketError:
            return False  # damaged: nothing leads to what is before it
        self._at, self._prev_len = offset, header.prev_len
        return True

    def _note(self, places: _Places, header: Header, part: Part, offset: int) -> None:
        place, length = part.base + offset + HEADER_BYTES, header.payload_len
        if header.flags & Flag.HOLE:
            length, place = hole_len(header, self._series.reader(part)(offset + HEADER_BYTES, length)), _HOLE
        places[header.source_id, header.generation].extend((header.source_off, length, place))

    def _header_at(self, offset: int) -> bytes:
        at = offset - self._window_at
        if not 0 <= at <= len(self._window) - HEADER_BYTES:
            start = offset
            if self._prev_len < _WINDOW // 4:
                start = max(0, offset + HEADER_BYTES - _WINDOW)
            self._window, self._window_at = self._series.reader(self._part)(start, offset + HEADER_BYTES - start), start
            at = offset - start
        return self._window[at : at + HEADER_BYTES]

    def close(self) -> None:
        """Let go of the packet file."""
        self._series.close()
