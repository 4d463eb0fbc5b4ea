"""The lines of a packet file that somebody wants: of a source, of a time, that match, the last ones. For one thread.

Times are of arrival, as frames state them; a line has that of the piece that it began with. What holds for them where a
clock was set back is in the head of `seek.py`.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from os import fsencode

from ..errors import PacketError
from ..files.frame_source import FrameSource
from ..packets.codec import Frame
from ..packets.recover import last_commit
from .lines import LineReader, Lines
from .records import Record, Records
from .reorder import By, Reordered
from .seek import SLACK, Back, begin_back, begin_in_series

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_BACK = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+")
_EPOCH = datetime.fromtimestamp(0, UTC)


def parse_time(text: str, now_ns: int | None = None) -> int:
    """A point in time as people write it, in Unix nanoseconds.

    Args:
        text: ISO 8601 ("2026-11-21T18:00:00Z"; local time without a zone), a date (where it begins, local time), or
            how long before now: "90s", "10m", "1h30m", "2d", "1w".
        now_ns: None: by the clock.

    Raises:
        ValueError: none of these.
    """
    if _BACK.fullmatch(text):
        parts = re.findall(r"([\d.]+)([smhdw])", text)
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
        return max(0, (time.time_ns() if now_ns is None else now_ns) - int(seconds * 1e9))
    try:
        moment = datetime.fromisoformat(text)
        since = (moment if moment.tzinfo else moment.astimezone()) - _EPOCH
    except (ValueError, OverflowError, OSError):
        raise ValueError(
            f"{text!r} is no time; expected a date, a time as 2026-11-21T18:00:00, or how long ago: 10m, 2h, 1d"
        ) from None
    return max(0, since // timedelta(microseconds=1) * 1000)


def parse_regex(text: str) -> re.Pattern[bytes]:
    """A regular expression for lines as bytes, without their line end; Python's syntax.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(fsencode(text))
    except re.error as exc:
        raise ValueError(f"{text!r} is no regular expression: {exc}") from None


@dataclass(frozen=True)
class Wanted:
    """Which lines.

    Attributes:
        source: a name, path or glob; None: all.
        since, until: Unix nanoseconds; `since` is in, `until` is not. None: from the start, to the end. A line that
            began before `until` and ends more than SLACK after it is given as far as it had come.
        matching: searched in each line's bytes, without its line end.
        invert: those that do not match.
        tail: only so many last ones of these; None: all.
        multiline: found in the first line of each record: records are given instead of lines (`records.py`), in the
            order in which they end. One matches if one of its lines does, and has the time of its first.
        by: None: as they stand in the file, which is how they came unless it was merged by time. "arrival": as they
            came. "time": in the order of the times in them, as in a merge by time.
        formats: of these times, as for ByTime.
    """

    source: str | None = None
    since: int | None = None
    until: int | None = None
    matching: re.Pattern[bytes] | None = None
    invert: bool = False
    tail: int | None = None
    multiline: re.Pattern[bytes] | None = None
    by: By | None = None
    formats: tuple[str, ...] = ()

    def pick(self, lines: Lines) -> Iterator[Lines]:
        """What is wanted of these lines: runs that stand behind one another."""
        if self.since is not None and lines.time_ns < self.since:
            return
        if self.until is not None and lines.time_ns >= self.until:
            return
        if self.matching is None:
            yield lines
            return
        if isinstance(lines, Record):
            if lines.found(self.matching) != self.invert:
                yield lines
            return
        each = lines.each()
        search, invert = self.matching.search, self.invert
        start = begin_off = -1
        off = lines.source_off
        for number, line in enumerate(each):
            text = line[:-1] if lines.packets is None and line.endswith(b"\n") else line
            if (search(text) is None) == invert:
                if start < 0:
                    start, begin_off = number, off
            elif start >= 0:
                yield _part(lines, each, start, number, begin_off)
                start = -1
            off += len(line)
        if start >= 0:
            yield _part(lines, each, start, len(each), begin_off)


def _part(lines: Lines, each: list[bytes], start: int, end: int, source_off: int) -> Lines:
    chosen = each[start:end]
    return replace(
        lines,
        seq=lines.seq + start,
        source_off=source_off,
        data=b"" if lines.packets is not None else b"".join(chosen),
        packets=None if lines.packets is None else chosen,
        unterminated=lines.unterminated and end == len(each),
    )


class Picker:
    """The wanted lines in the wanted order.

    Args:
        frames: at its start; nobody else reads it.
        follow: more is expected at the end; a line that has no end yet is kept back.

    Attributes:
        ended: nothing that is wanted can come any more.

    Raises:
        ValueError: to follow what is to be put in order, which only its end allows.
    """

    def __init__(self, frames: FrameSource, wanted: Wanted, *, follow: bool = False) -> None:
        self._frames = frames
        self._wanted = wanted
        self._follow = follow
        self._error: PacketError | None = None
        self._tail = wanted.tail
        self._begin = 0
        self.ended = False
        if follow and wanted.by is not None:
            raise ValueError("what grows cannot be put in order as it is read; merge it by time instead")
        self._records = None if wanted.multiline is None else Records(wanted.multiline)
        self._ordered = False  # whether it was read in another order
        self._beheaded = False  # whether a record was left out as its beginning was not fed
        self._reader = LineReader(frames, wanted.source)
        self.names = self._reader.names
        if wanted.since is not None:
            self._begin = begin_in_series(frames.series, wanted.since)
            frames.seek(self._begin)
        self._from = self._begin  # where reading began

    @property
    def parts(self) -> int:
        """How many records were so long that they were given in parts."""
        return 0 if self._records is None else self._records.parts

    def quiet(self) -> Iterator[Lines]:
        """While following: the records that nothing was added to for a while."""
        if self._records is not None:
            for record in self._records.quiet():
                yield from self._wanted.pick(record)

    def read(self) -> Iterable[Lines] | None:
        """The next lines; None: there are no more at present.

        Raises:
            PacketError: no valid frame at this place. Lines before it were given.
        """
        if self._error is not None:
            raise self._error
        if self._tail is not None:
            tail, self._tail = self._tail, None
            return self._last(tail)
        return self._next()

    def close(self) -> Iterator[Lines]:
        """The lines, and the records, that never got an end."""
        for lines in self._reader.close():
            yield from self._chosen(lines)
        for record in self._records.close() if self._records is not None else ():
            yield from self._given(record)

    def _next(self) -> Iterable[Lines] | None:
        if self.ended:
            return None
        if self._wanted.by is not None:
            if self._ordered:
                return None
            self._ordered = True
            return self._reordered(self._wanted.by)
        frames = self._frames.read()
        return None if frames is None else self._picked(frames)

    def _picked(self, frames: Iterable[Frame]) -> Iterator[Lines]:
        until = self._wanted.until
        for frame in frames:
            if until is not None and frame.header.time_ns >= until + SLACK:
                self.ended = True
                return
            for lines in self._reader.feed(frame):
                yield from self._chosen(lines)

    def _reordered(self, by: By) -> Iterator[Lines]:
        until = None if self._wanted.until is None else self._wanted.until + SLACK
        formats = self._wanted.formats
        for lines in Reordered(self._frames, self._reader, by, formats=formats, begin=self._begin, until=until):
            yield from self._chosen(lines)
        self.ended = until is not None

    def _chosen(self, lines: Lines) -> Iterator[Lines]:
        if self._records is None:
            yield from self._wanted.pick(lines)
            return
        for record in self._records.feed(lines):
            yield from self._given(record)

    def _given(self, record: Lines) -> Iterator[Lines]:
        if isinstance(record, Record) and record.headless and self._from:
            self._beheaded = True  # its first lines stand before what was read
            return
        yield from self._wanted.pick(record)

    def _last(self, count: int) -> Iterable[Lines]:
        """The last lines: from where that many may begin, and from further back as long as it was not enough."""
        if self._wanted.by is not None:
            return self._kept(count)
        guess = max(count, 1)
        while True:
            begin, error, _ = self._back(guess)
            self._reader.restart()
            if self._records is not None:
                self._records.restart()
            self._from = begin
            self._frames.seek(begin)
            self.ended = False
            kept = self._kept(count)
            whole = begin <= self._begin or error is not None
            headless = self._reader.headless or self._beheaded
            if whole or (not headless and sum(len(lines.each()) for lines in kept) >= count):
                self._error = self._error or error
                return kept
            guess *= 4

    def _back(self, lines: int) -> Back:
        """Where so many lines begin at the latest, from the last segment back."""
        series, begin = self._frames.series, self._begin
        size = series.size()
        for part in reversed(series.parts):
            if part.base + part.size <= begin:
                break
            read_at = series.reader(part)
            # What stands behind the last COMMIT is read in any case.
            commit = last_commit(read_at, part.size if part is not series.parts[-1] else size - part.base)
            if commit is None:
                continue  # nothing, or damaged all over
            floor = max(0, begin - part.base)
            place, error, lines = begin_back(
                read_at, commit.end, commit.header.frame_len, lines, wanted=self._counts, floor=floor
            )
            if lines <= 0 or error is not None:
                return Back(part.base + place, error, lines)
        return Back(begin, None, lines)

    def _counts(self, source_id: int) -> bool:
        return self._wanted.source is None or self.names.matches(source_id, self._wanted.source)

    def _kept(self, count: int) -> list[Lines]:
        """The last lines from here on; what ends before them is let go as it comes."""
        kept: deque[tuple[Lines, int]] = deque()
        total = behind = 0
        self._error, self._beheaded = None, False

        def keep(batch: Iterable[Lines]) -> None:
            nonlocal total, behind
            for lines in batch:
                size = len(lines.each())
                kept.append((lines, size))
                total += size
                behind = size if self._beheaded else behind + size  # … the last record that was left out
                self._beheaded = False
                while kept and total - kept[0][1] >= count:
                    total -= kept.popleft()[1]

        try:
            while (batch := self._next()) is not None:
                keep(batch)
        except PacketError as exc:
            self._error = exc
        if not self._follow:
            keep(self.close())
        self._beheaded = self._beheaded or behind < min(total, count)
        if total > count:
            lines, size = kept.popleft()
            each, skip = lines.each(), total - count
            off = lines.source_off + sum(map(len, each[:skip]))
            kept.appendleft((_part(lines, each, skip, size, off), size - skip))
        return [lines for lines, _ in kept]
