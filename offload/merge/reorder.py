"""The lines of a packet file in another order than that in which they stand: by the times in them, or by arrival.

The headers are walked once, for where each source's frames stand; then each source is read on its own, and the heads
are merged as they are in a merge by time (`order.py`). So it is exact, however far the lines are from their places.
Memory: a frame of each source, and 8 bytes for each frame. For one thread.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import PacketError
from ..files.frame_source import FrameSource
from ..packets.codec import Frame, PacketDecoder, unpack_header
from ..packets.format import HEADER_BYTES, FrameType
from .lines import LineReader, Lines
from .order import ALWAYS, NEVER, Chunk, Order, cut
from .times import Times

By = Literal["time", "arrival"]

_KEPT = (FrameType.LINES, FrameType.PACKETS, FrameType.SOURCE, FrameType.GAP)


@dataclass(slots=True, eq=False)
class _Source:
    times: Times
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    at: int = 0
    key: int = NEVER
    queue: deque[Chunk[_Item]] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Item:
    source_id: int
    lines: Lines
    seq: int


class Reordered:
    """Lines in order; iterate once.

    Args:
        reader: what makes lines of frames; nobody else feeds it.
        by: "time", with lines without a time behind that before them in their source; or "arrival".
        formats: as for ByTime.
        begin: the place of a frame; those before it are left out.
        until: Unix nanoseconds; frames from the first on that came then or later are left out.

    Raises:
        PacketError: no valid frame at this place. What stands before it was given.
    """

    def __init__(
        self,
        frames: FrameSource,
        reader: LineReader,
        by: By,
        *,
        formats: Sequence[str] = (),
        begin: int = 0,
        until: int | None = None,
    ) -> None:
        self._frames = frames
        self._reader = reader
        self._by_time = by == "time"
        self._formats = formats
        self._begin = begin
        self._until = until
        self._sources: dict[int, _Source] = {}
        self._order: Order[_Item] = Order()
        self._error: PacketError | None = None
        self._end = 0

    def __iter__(self) -> Iterator[Lines]:
        self._index()
        for source_id in self._sources:
            self._load(source_id)
        for item, start, end, last in self._order.take(ALWAYS):
            lines = item.lines
            if start == 0 and last:
                yield lines
            else:
                part, off = lines.data[start:end], lines.source_off + start
                yield replace(lines, seq=item.seq, source_off=off, data=part, unterminated=lines.unterminated and last)
                item.seq += part.count(b"\n")
            if last:
                self._load(item.source_id)
            self._order.late.clear()
        if self._error is not None:
            raise self._error
        self._frames.seek(self._end)  # whoever asks how the file ends gets an answer
        self._frames.read()

    def _index(self) -> None:
        try:
            for frame in self._frames.headers():
                header = frame.header
                self._end = frame.offset + header.frame_len
                if self._until is not None and header.time_ns >= self._until:
                    return
                if header.type is FrameType.SOURCE:
                    self._reader.names.see(frame)
                if header.type in _KEPT and frame.offset >= self._begin:
                    source = self._sources.get(header.source_id)
                    if source is None:
                        source = self._sources[header.source_id] = _Source(Times(self._formats))
                    source.offsets.append(frame.offset)
        except PacketError as exc:
            self._error = exc

    def _load(self, source_id: int) -> None:
        """Read a source on until it has a chunk more, or has ended."""
        source = self._sources[source_id]
        while not source.queue:
            if source.at < len(source.offsets):
                source.at += 1
                batch = self._reader.feed(self._frame(source.offsets[source.at - 1]))
            elif source.at == len(source.offsets):
                source.at += 1
                batch = self._reader.end(source_id)
            else:
                return
            for lines in batch:
                # Of equal times, what came first; of what came at once, what stands first.
                self._put(source, lines, lines.time_ns << 64 | source.offsets[min(source.at, len(source.offsets)) - 1])

    def _put(self, source: _Source, lines: Lines, number: int) -> None:
        if not self._by_time:
            chunks = [(lines, [lines.time_ns], [len(lines.data)])]
        elif lines.packets is None:
            source.times.arrive(lines.time_ns)
            keys, ends = cut(lines.data, source.times, source.key)
            chunks = [(lines, keys, ends)]
        else:
            source.times.arrive(lines.time_ns)
            chunks = []
            for count, packet in enumerate(lines.packets):
                found = source.times.of(packet)
                source.key = source.key if found is None else found
                chunks.append((replace(lines, seq=lines.seq + count, packets=[packet]), [source.key], [0]))
        for part, keys, ends in chunks:
            source.key = keys[-1]
            self._order.put(source.queue, Chunk(number, keys, ends, _Item(lines.source_id, part, part.seq)))

    def _frame(self, offset: int) -> Frame:
        header = unpack_header(self._frames.read_at(offset, HEADER_BYTES), offset=offset)
        (frame,) = PacketDecoder(offset=offset).feed(self._frames.read_at(offset, header.frame_len))
        return frame
