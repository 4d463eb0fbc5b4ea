"""Whole lines out of a packet file, for people and for programs. For one thread; nothing here prints."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from ..files.packet_file import FrameSource
from ..packets.codec import Frame
from ..packets.format import HEADER_BYTES, FrameType
from .names import Names


@dataclass(slots=True)
class Lines:
    """Whole lines of one source that stand behind one another, as they were, with their number and time of arrival.

    `data` ends at a line end, unless the line has none (`unterminated`); `seq` is the number of its first line.
    """

    source_id: int
    name: str
    seq: int
    time_ns: int
    data: bytes
    unterminated: bool = False
    packets: list[bytes] | None = None  # of a PACKETS frame

    def each(self) -> list[bytes]:
        """The lines or packets, each with its LF where it has one."""
        if self.packets is not None:
            return self.packets
        return _lines(self.data)


def _lines(data: bytes) -> list[bytes]:
    """Lines with their LF; `splitlines` would end one at a CR too."""
    *whole, rest = data.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


class LineReader:
    """Whole lines out of frames that may hold pieces of them.

    The pieces of a line that is not whole yet are held as places in the file, not as bytes, until it ends: at its LF,
    at the end of its source's generation, or at the end of all.
    """

    def __init__(self, source: FrameSource, wanted: str | None = None) -> None:
        self.names = Names(source)
        self._source = source
        self._wanted = wanted
        self._held: dict[int, list[tuple[int, int]]] = {}
        self._first: dict[int, tuple[int, int]] = {}  # number and time of the held line

    def feed(self, frame: Frame) -> Iterator[Lines]:
        header = frame.header
        if header.type is FrameType.SOURCE:
            self.names.see(frame)
        if header.type not in (FrameType.LINES, FrameType.PACKETS, FrameType.SOURCE, FrameType.GAP):
            return
        source_id = header.source_id
        if self._wanted is not None and not self.names.matches(source_id, self._wanted):
            return
        if header.type is not FrameType.LINES:
            yield from self._end(source_id)
            if header.type is FrameType.PACKETS:
                packets = frame.packets()
                yield Lines(source_id, self.names[source_id], header.seq, header.time_ns, b"", packets=packets)
            return
        cut = frame.payload.rfind(b"\n") + 1
        held = source_id in self._held
        # A line that goes on has its number from where it began: it may have been counted there.
        seq, time_ns = self._first[source_id] if held else (header.seq, header.time_ns)
        if cut:
            data = frame.payload if cut == len(frame.payload) else frame.payload[:cut]
            data = self._bytes(source_id) + data if held else data
            yield Lines(source_id, self.names[source_id], seq, time_ns, data)
        if cut < len(frame.payload):
            if source_id not in self._held:
                self._first[source_id] = (seq + frame.payload.count(b"\n"), header.time_ns)
            place = (frame.offset + HEADER_BYTES + cut, len(frame.payload) - cut)
            self._held.setdefault(source_id, []).append(place)

    def close(self) -> Iterator[Lines]:
        """The lines that never got an end."""
        for source_id in list(self._held):
            yield from self._end(source_id)

    def _end(self, source_id: int) -> Iterator[Lines]:
        if source_id in self._held:
            seq, time_ns = self._first[source_id]
            data = self._bytes(source_id)
            yield Lines(source_id, self.names[source_id], seq, time_ns, data, unterminated=True)

    def _bytes(self, source_id: int) -> bytes:
        return b"".join(self._source.read_at(*place) for place in self._held.pop(source_id))


class LineWriter:
    """Writes lines for people: as they were, with a line end put in only where two would run together."""

    def __init__(self, out: BinaryIO, *, prefix: bool = False) -> None:
        self._out = out
        self._prefix = prefix
        self._open = False

    def write(self, lines: Lines) -> None:
        data = lines.data
        if lines.packets is not None:
            data = b"".join(p if p.endswith(b"\n") else p + b"\n" for p in lines.packets)
        if self._prefix:
            name = os.fsencode(lines.name) + b": "
            data = b"".join(name + line for line in _lines(data))
        if self._open:
            self._out.write(b"\n")
        self._out.write(data)
        self._open = lines.unterminated


def json_lines(lines: Lines) -> Iterator[str]:
    """A JSON object for each line: source, seq, time_ns, its bytes without LF as `text`, or `base64` if not UTF-8."""
    for number, line in enumerate(lines.each()):
        record: dict[str, Any] = {"source": lines.name, "seq": lines.seq + number, "time_ns": lines.time_ns}
        if lines.packets is not None:
            record["packet"] = True
        elif line.endswith(b"\n"):
            line = line[:-1]
        else:
            record["unterminated"] = True
        try:
            record["text"] = line.decode()
        except UnicodeDecodeError:
            record["base64"] = base64.b64encode(line).decode()
        yield json.dumps(record, ensure_ascii=False)
