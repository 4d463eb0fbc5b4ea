"""Packet files on disk, read: whole frames in order, also while the file grows.

A packet file in segments is read as one: offsets of frames are places in the `Series` of all segments that are there.
Its frames come with those that open and close segments, FILE, SOURCE with the flag RESTATED and SEAL.

Promises: readers never write, and never keep a writer out. Following goes on across the end of a segment, whatever
becomes of its name meanwhile, and gives each frame once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import PacketError
from ..packets.codec import Damage, Frame, PacketDecoder, unpack_header
from ..packets.format import HEADER_BYTES, Flag, FrameType
from .series import Part, Series

READ_BYTES = 4 << 20


class FrameSource:
    """Whole frames of a packet file in order, for one thread; nothing is held but one read and one frame.

    Args:
        path: a packet file; it may be growing. All its segments are read that are there; of a segment's own name, that.
        on_damage: as for PacketDecoder.
        follow: the file is growing, and its writer may be killed and started again: what is behind the last whole
            frame is read anew each time, for a new writer cuts it.
        alone: the segment that has this name, without those before it.

    Raises:
        OSError: as `os.open`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        on_damage: Callable[[Damage], None] | None = None,
        follow: bool = False,
        alone: bool = False,
    ) -> None:
        self.path = Path(path)
        self._follow = follow
        self._on_damage = on_damage
        self._suspect = -1  # while following: where no valid frame was found at the last look
        self.series = Series(path, alone=alone)
        self._decoder = PacketDecoder(on_damage=on_damage)
        self._at = 0
        self._part = self.series.parts[0]

    @property
    def offset(self) -> int:
        """Where the next frame is expected."""
        return self._decoder.offset

    @property
    def pending(self) -> int:
        """Bytes read that are no whole frame yet."""
        return self._decoder.pending

    def read(self) -> list[Frame] | None:
        """The frames of the next READ_BYTES; None at the present end of the file.

        Raises:
            PacketError: no valid frame at this place.
        """
        if self._part is not self.series.parts[-1] and self._at >= self._part.base + self._part.size:
            return self._next_part()
        data = self.series.read_at(self._at, READ_BYTES)
        if not data and self._follow and self.series.grow():
            return self.read()  # what it got before it was closed, and then the next
        if not data and not (self._follow and self._decoder.pending):
            return None
        self._at += len(data)
        try:
            frames = self._decoder.feed(data)
        except PacketError as exc:
            # A new writer may have cut a torn tail and written while we read: half of it old, half new. Twice at the
            # same place it is damage.
            if not self._follow or self._suspect == self._decoder.offset:
                raise self._placed(exc) from None
            self._suspect = self._decoder.offset
            self.seek(self._decoder.offset)  # behind the last whole frame
            return None
        if self._follow and self._decoder.pending and len(data) < READ_BYTES:
            self.seek(self._decoder.offset)  # behind the last whole frame
            return frames or None
        return frames

    def _next_part(self) -> list[Frame]:
        """Go on with the next segment; what the last one held behind its last whole frame is damage."""
        frames = self.end()
        self._begin_part(self.series.parts[self.series.parts.index(self._part) + 1])
        return frames

    def _begin_part(self, part: Part, offset: int | None = None) -> None:
        self._part = part
        self._at = part.base if offset is None else offset
        self._decoder = PacketDecoder(offset=self._at, on_damage=self._on_damage)

    def seek(self, offset: int) -> None:
        """Go on with the frame that begins there."""
        self._begin_part(self.series.part_at(offset), offset)

    def headers(self) -> Iterator[Frame]:
        """Every frame from the start, with its payload only where that describes the file: no LINES, PACKETS but holes.

        Raises:
            PacketError: no valid header at this place; a torn tail ends the walk instead.
        """
        self.size()
        for part in list(self.series.parts):
            at, end = part.base, part.base + part.size
            while end - at >= HEADER_BYTES:
                found = self.read_at(at, HEADER_BYTES)
                if len(found) < HEADER_BYTES and part is self.series.parts[-1]:
                    break  # a writer that began meanwhile has cut its torn tail; what it adds is behind this walk's end
                try:
                    header = unpack_header(found, offset=at)
                except PacketError as exc:
                    raise self._placed(exc) from None
                if at + header.frame_len > end:
                    break
                content = header.type in (FrameType.LINES, FrameType.PACKETS) and not header.flags & Flag.HOLE
                payload = b"" if content else self.read_at(at + HEADER_BYTES, header.payload_len)
                yield Frame(at, header, payload)
                at += header.frame_len
            if at < end and part is not self.series.parts[-1]:
                raise self._placed(PacketError(f"torn tail: {end - at} bytes of a frame", at))

    def size(self) -> int:
        """Bytes in all segments."""
        return self.series.size()

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes at another place of the file; fewer only at the end of a segment."""
        return self.series.read_at(offset, length)

    def end(self) -> list[Frame]:
        """Say that the file ends here; returns and raises as `PacketDecoder.close`."""
        try:
            return self._decoder.close()
        except PacketError as exc:
            raise self._placed(exc) from None

    def is_being_written(self) -> bool:
        return self.series.is_being_written()

    def where(self, offset: int) -> tuple[Path, int]:
        """The file that has this byte, and the byte's place in it."""
        return self.series.where(offset)

    def _placed(self, exc: PacketError) -> PacketError:
        """With its place as people find it: in a segment."""
        if len(self.series.parts) == 1:
            return exc
        path, offset = self.where(exc.offset)
        return PacketError(f"(of {path.name}) {exc.message}", offset)

    def close(self) -> None:
        self.series.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        while (frames := self.read()) is not None:
            yield from frames
