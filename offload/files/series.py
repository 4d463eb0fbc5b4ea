"""The segments of one packet file, by their names, and one stream of bytes out of them.

    merged.000000.opk        sealed; the names sort as the numbers do
    merged.000001.opk.zst    sealed, packed (`seekable.py`)
    merged.opk               the live one: the name that the user gave
    .merged.opk.next         the live one to come, while a segment is closed (`rolling.py`)

A `Series` joins those that are there, in the order of their numbers, the live one last, as if they stood in one file:
its bytes are those of all segments, and `where` tells the segment of a byte and its place there. Segments are opened
when they are read, a few at once. One that is packed or gets another name meanwhile is found by its number; a reader of
the live one keeps its descriptor, so that it can read to the seal, whatever became of the name.
"""

from __future__ import annotations

import errno
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import PacketError
from ..packets.codec import FileInfo, Frame, unpack_header
from ..packets.format import HEADER_BYTES, MAGIC, FrameType
from ..packets.recover import ReadAt, Recovery, recover
from .descriptor import is_locked, open_regular, read_at
from .seekable import ZSTD_MAGIC, Packed

PACKED = ".zst"
_OPEN = 8  # segments kept open at once
_LISTINGS = 20  # of the segments, until one that is removed meanwhile counts as an error


def live_path(path: str | os.PathLike[str]) -> Path:
    """The file that a packet file's name leads to; its segments stand beside it."""
    return Path(os.path.realpath(path))


def segment_path(live: Path, number: int) -> Path:
    """The name of a sealed segment."""
    return live.with_name(f"{live.stem}.{number:06}{live.suffix}")


def next_path(live: Path) -> Path:
    """The name that a segment has until it is the live one."""
    return live.with_name(f".{live.name}.next")


def segment_number(live: Path, name: str) -> int | None:
    """The number of the sealed segment of this file that has this name (without its folder), packed or not."""
    found = re.fullmatch(rf"{re.escape(live.stem)}\.(\d{{6,}}){re.escape(live.suffix)}({re.escape(PACKED)})?", name)
    return None if found is None else int(found[1])


def sealed_segments(live: Path) -> dict[int, Path]:
    """The sealed segments that are there: number -> path, in order; the plain one where it is there packed too."""
    found: dict[int, Path] = {}
    for name in os.listdir(live.parent):
        number = segment_number(live, name)
        if number is not None and (number not in found or not name.endswith(PACKED)):
            found[number] = live.with_name(name)
    return dict(sorted(found.items()))


def is_segment_of(live: Path, path: str) -> bool:
    """Whether this path is of this packet file: by its name, and by how it begins."""
    if os.path.realpath(os.path.dirname(path)) != os.fspath(live.parent):
        return False
    name = os.path.basename(path)
    if name == live.name:
        return True
    if segment_number(live, name) is None:
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in (MAGIC, ZSTD_MAGIC)
    except OSError:
        return False


class Bytes(Protocol):
    """A segment that is open."""

    def read_at(self, offset: int, length: int) -> bytes: ...
    def size(self) -> int: ...
    def close(self) -> None: ...


class Plain:
    """A segment as it was written."""

    def __init__(self, path: Path) -> None:
        self.fd, self.status = open_regular(os.fspath(path))

    @property
    def identity(self) -> tuple[int, int]:
        return self.status.st_dev, self.status.st_ino

    def read_at(self, offset: int, length: int) -> bytes:
        return read_at(self.fd, offset, length)

    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def is_locked(self) -> bool:
        return is_locked(self.fd)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def open_segment(path: Path) -> Bytes:
    """Open a sealed segment, packed or not, also if it is packed at this moment.

    Raises:
        OSError: as `open_regular`; packed, and there is nothing to unpack it with, or it is damaged.
    """
    plain = path.with_name(path.name.removesuffix(PACKED)) if path.name.endswith(PACKED) else path
    for name in (plain, plain.with_name(plain.name + PACKED)):
        try:
            return Packed(name) if name.name.endswith(PACKED) else Plain(name)
        except FileNotFoundError:
            continue
    what = "this segment is gone, as retention does"
    raise FileNotFoundError(errno.ENOENT, what, os.fspath(plain))


def _sealed_size(path: Path) -> int:
    """Bytes of a sealed segment, unpacked. Raises as `open_segment`."""
    if not path.name.endswith(PACKED):
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            pass  # packed meanwhile
    segment = open_segment(path)
    try:
        return segment.size()
    finally:
        segment.close()


def file_info(read: ReadAt) -> FileInfo | None:
    """What the FILE frame of a segment says; None: there is none, or it is damaged."""
    try:
        header = unpack_header(read(0, HEADER_BYTES))
        if header.type is not FrameType.FILE:
            return None
        return FileInfo.unpack(Frame(0, header, read(HEADER_BYTES, header.payload_len)))
    except PacketError:
        return None


@dataclass(slots=True)
class Part:
    """A segment in a series: `size` is that of its bytes; of the last one, which may grow, as of the last look."""

    number: int
    path: Path
    base: int
    size: int

    @property
    def name(self) -> str:
        return self.path.name


class Series:
    """All segments of a packet file as one stream of bytes, for one thread.

    Args:
        path: the packet file. Its earlier segments are in it, as far as they are there; if it is a segment itself, or
            `alone`, only that one.

    Raises:
        OSError: as `open_regular`; FileNotFoundError if no segment is there either.
    """

    def __init__(self, path: str | os.PathLike[str], *, alone: bool = False) -> None:
        self._given = os.fspath(path)
        self._live = live_path(path)
        self._file_id: bytes | None = None
        self._open: OrderedDict[int, Bytes] = OrderedDict()
        self._last: Bytes | None = None
        self.parts: list[Part] = []
        self._packed = self._live.name.endswith(PACKED)
        last: Bytes
        number, before = 0, list[tuple[int, Path]]()
        try:
            last = Packed(Path(path)) if self._packed else Plain(Path(path))
        except FileNotFoundError:
            # The moment between two names, where a file cannot have two; or somebody took the live one away.
            before = [] if alone else self._sealed()
            if not before:
                raise
            number, path = before.pop()
            last = open_segment(path)
        try:
            info = file_info(last.read_at)
            if info is not None:
                number, self._file_id = info.segment, info.file_id
            if number and not (alone or self._packed):
                self._add_sealed(number, before or self._sealed())
            else:
                self._add_sealed(number, before)
        except BaseException:
            last.close()
            raise
        self._last = last
        self._add(number, Path(path), last.size())

    def _add_sealed(self, number: int, found: list[tuple[int, Path]]) -> None:
        """Take in the segments before this one, as listed just now; retention may be removing the oldest of them."""
        for attempt in range(_LISTINGS):
            try:
                for earlier, name in found:
                    if earlier < number:
                        self._add(earlier, name, _sealed_size(name))
                return
            except FileNotFoundError:
                if attempt == _LISTINGS - 1:
                    raise
                self.parts.clear()
                found = self._sealed()

    def _sealed(self) -> list[tuple[int, Path]]:
        try:
            return list(sealed_segments(self._live).items())
        except OSError:
            return []

    def _add(self, number: int, path: Path, size: int) -> None:
        base = self.parts[-1].base + self.parts[-1].size if self.parts else 0
        self.parts.append(Part(number, path, base, size))

    def _keep(self, number: int, file: Bytes) -> None:
        self._open[number] = file
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)[1].close()

    def _bytes(self, part: Part) -> Bytes:
        if part is self.parts[-1]:
            assert self._last is not None
            return self._last
        file = self._open.get(part.number)
        if file is None:
            file = open_segment(part.path)
            self._keep(part.number, file)
        else:
            self._open.move_to_end(part.number)
        return file

    # --- reading ------------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """Bytes in all segments now."""
        assert self._last is not None
        part = self.parts[-1]
        part.size = self._last.size()
        return part.base + part.size

    def part_at(self, offset: int) -> Part:
        """The segment that has this byte; behind the end, the last one."""
        if len(self.parts) == 1:
            return self.parts[0]
        return self.parts[max(0, bisect_right(self.parts, offset, key=lambda part: part.base) - 1)]

    def read_at(self, offset: int, length: int) -> bytes:
        """At most `length` bytes; fewer only at the end of a segment."""
        part = self.part_at(offset)
        return self._bytes(part).read_at(offset - part.base, length)

    def reader(self, part: Part) -> ReadAt:
        """To read one segment by places of its own."""
        return lambda offset, length: self._bytes(part).read_at(offset, length)

    def recover(self, part: Part | None = None) -> Recovery:
        """The state at the end of a segment; None: the last one. Raises PacketError as `packets.recover`."""
        part = self.parts[-1] if part is None else part
        return recover(self.reader(part), part.size if part is not self.parts[-1] else self.size() - part.base)

    def grow(self) -> bool:
        """See whether the last segment has been closed and others have come behind it; their bytes follow its own.

        Raises:
            FileNotFoundError: one of them is gone already.
        """
        last = self._last
        if not isinstance(last, Plain):
            return False
        try:
            status = os.stat(self._given)
        except OSError:
            return False  # between two names; the next look tells
        if (status.st_dev, status.st_ino) == last.identity:
            return False
        try:
            live = Plain(Path(self._given))
        except OSError:
            return False
        info, number = file_info(live.read_at), self.parts[-1].number
        if self._file_id is None:
            own = file_info(last.read_at)
            self._file_id = None if own is None else own.file_id
        if info is None or info.file_id != self._file_id or info.segment <= number:
            live.close()
            return False  # another packet file has the name: this one is at its end
        try:
            sealed = [(n, segment_path(self._live, n)) for n in range(number + 1, info.segment)]
            found = [(n, path, _sealed_size(path)) for n, path in sealed]
        except BaseException:
            live.close()
            raise
        self.parts[-1].size = last.size()
        self._keep(number, last)
        self._last = live
        for one in found:
            self._add(*one)
        self._add(info.segment, Path(self._given), live.size())
        return True

    def is_being_written(self) -> bool:
        return isinstance(self._last, Plain) and self._last.is_locked()

    def where(self, offset: int) -> tuple[Path, int]:
        """The segment that has this byte, and the byte's place in it."""
        part = self.part_at(offset)
        return part.path, offset - part.base

    def close(self) -> None:
        files = [*self._open.values(), *([] if self._last is None else [self._last])]
        self._open.clear()
        self._last = None
        for file in files:
            file.close()
