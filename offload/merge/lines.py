"""Whole lines out of a packet file, for people and for programs. For one thread; nothing here prints."""

from __future__ import annotations

import base64
import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from ..files.frame_source import FrameSource
from ..packets.codec import Frame
from ..packets.format import HEADER_BYTES, Flag, FrameType
from .names import Names


@dataclass(slots=True)
class Lines:
    """Whole lines of one source that stand behind one another, as they were, with their number and time of arrival.

    `data` ends at a line end, unless the line has none (`unterminated`); `seq` is the number of its first line and
    `source_off` where that begins, in bytes of this generation of the source.
    """

    source_id: int
    name: str
    seq: int
    time_ns: int
    data: bytes
    unterminated: bool = False
    packets: list[bytes] | None = None  # of a PACKETS frame
    source_off: int = 0
    generation: int = 0

    def each(self) -> list[bytes]:
        """The lines or packets, each with its LF where it has one."""
        if self.packets is not None:
            return self.packets
        return lines_of(self.data)

    def said(self) -> dict[str, Any]:
        """What a program should know besides, of each of them."""
        return {}


def lines_of(data: bytes) -> list[bytes]:
    """Lines with their LF; `splitlines` would end one at a CR too."""
    *whole, rest = data.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


class _Start(NamedTuple):
    """Of a line: number, time of arrival, place in its source."""

    seq: int
    time_ns: int
    source_off: int
    generation: int


class LineReader:
    """Whole lines out of frames that may hold pieces of them.

    The pieces of a line that is not whole yet are held as places in the file, not as bytes, until it ends: at its LF,
    at the end of its source's generation, or at the end of all. A line whose beginning was not fed is left out.

    Args:
        wanted: the source; None: all of them.
        text: give lines as people mean them: without the byte order mark (UTF-8) that a file begins with, and without
            the CR before an LF. The packet file keeps both.

    Attributes:
        headless: how many pieces of lines were left out as what is before them was not fed.
    """

    def __init__(self, source: FrameSource, wanted: str | None = None, *, text: bool = False) -> None:
        self.names = Names(source)
        self._source = source
        self._wanted = wanted
        self._text = text
        self._fresh: set[int] = set()  # sources whose next line is the first of a file
        self._held: dict[int, list[tuple[int, int]]] = {}
        self._first: dict[int, _Start] = {}  # of the held line
        self.headless = 0

    def feed(self, frame: Frame) -> Iterator[Lines]:
        header = frame.header
        if header.type is FrameType.SOURCE:
            self.names.see(frame)
        if header.type not in (FrameType.LINES, FrameType.PACKETS, FrameType.SOURCE, FrameType.GAP):
            return
        if header.flags & Flag.HOLE:
            return  # NULs of no line
        if header.type is FrameType.SOURCE and header.flags & Flag.RESTATED:
            return  # it was begun in an earlier segment, and goes on
        source_id = header.source_id
        if self._wanted is not None and not self.names.matches(source_id, self._wanted):
            return
        if header.type is not FrameType.LINES:
            yield from self.end(source_id)
            if header.type is FrameType.SOURCE and header.source_off == 0:
                self._fresh.add(source_id)
            if header.type is FrameType.PACKETS:
                start = _Start(header.seq, header.time_ns, header.source_off, header.generation)
                yield Lines(source_id, self.names[source_id], *start[:2], b"", False, frame.packets(), *start[2:])
            return
        payload, seq, at = frame.payload, header.seq, 0
        goes_on = bool(header.flags & (Flag.MIDDLE | Flag.LAST))
        cut = payload.rfind(b"\n") + 1
        if goes_on:
            # The line that goes on has its number and time from where it began: it may have been counted there.
            at = payload.find(b"\n") + 1
            if source_id in self._held:
                seq = self._first[source_id].seq + 1
                if at:
                    yield self._whole(source_id, self._first[source_id], self._bytes(source_id) + payload[:at])
            else:
                self.headless += 1
                if not at:
                    return
                counted = payload.count(b"\n") + bool(header.flags & Flag.UNTERMINATED)
                seq += 1 + header.count - counted  # not if it was counted where it began
        if at < cut:
            start = _Start(seq, header.time_ns, header.source_off + at, header.generation)
            yield self._whole(source_id, start, payload if cut - at == len(payload) else payload[at:cut])
        if cut < len(payload):
            if source_id not in self._held:
                seq += payload.count(b"\n", at)
                self._first[source_id] = _Start(seq, header.time_ns, header.source_off + cut, header.generation)
            place = (frame.offset + HEADER_BYTES + cut, len(payload) - cut)
            self._held.setdefault(source_id, []).append(place)

    def restart(self) -> None:
        """Forget what was fed: it is fed again, or from another place on."""
        self._fresh.clear()
        self._held.clear()
        self._first.clear()
        self.headless = 0

    def close(self) -> Iterator[Lines]:
        """The lines that never got an end."""
        for source_id in list(self._held):
            yield from self.end(source_id)

    def end(self, source_id: int) -> Iterator[Lines]:
        """The line of this source that never got an end."""
        if source_id in self._held:
            yield self._whole(source_id, self._first[source_id], self._bytes(source_id), unterminated=True)

    def _whole(self, source_id: int, start: _Start, data: bytes, *, unterminated: bool = False) -> Lines:
        if self._text:
            data = (data.removeprefix(BOM_UTF8) if source_id in self._fresh else data).replace(b"\r\n", b"\n")
        self._fresh.discard(source_id)
        return Lines(source_id, self.names[source_id], *start[:2], data, unterminated, None, *start[2:])

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
            data = b"".join(name + line for line in lines_of(data))
        if self._open:
            self._out.write(b"\n")
        self._out.write(data)
        self._open = lines.unterminated


def json_lines(lines: Lines) -> Iterator[str]:
    """A JSON object for each line: source, seq, time_ns, its bytes without LF as `text`, or `base64` if not UTF-8."""
    for number, line in enumerate(lines.each()):
        record: dict[str, Any] = {"source": lines.name, "seq": lines.seq + number, "time_ns": lines.time_ns}
        record |= lines.said()
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
