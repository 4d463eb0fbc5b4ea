"""Records of several lines, joined as they are read: a stack trace with its message. For one thread.

A record begins with a line in which a pattern is found and goes on to the next such line of the same source, across
frames, rotation and other sources' lines in between. It is given out when it ends: when the next begins, at the end of
all, or, while somebody waits, after a quiet moment (`quiet`). Lines before the first beginning are a record too, one
without a head.

Memory is bounded: a record of more than MAX_BYTES is given in parts, and so is the largest where all that are open
together would take more than ALL_BYTES.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .lines import Lines, lines_of

MAX_BYTES = 4 << 20
ALL_BYTES = 32 << 20
QUIET = 0.5  # seconds after which a record is taken for whole while following


@dataclass(slots=True)
class Record(Lines):
    """Lines that belong together; number, time and place are those of the first.

    Attributes:
        headless: its first line is no beginning: that stands before what was read, or there is none.
        rest: it goes on with a record of which a part was given out before.
        part: it goes on in another.
    """

    headless: bool = False
    rest: bool = False
    part: bool = False

    def each(self) -> list[bytes]:
        return [self.data]

    def said(self) -> dict[str, Any]:
        """How many lines it has, and whether it is only a part."""
        said: dict[str, Any] = {"lines": self.data.count(b"\n") + (not self.data.endswith(b"\n"))}
        return said | {word: True for word, holds in (("rest", self.rest), ("part", self.part)) if holds}

    def found(self, pattern: re.Pattern[bytes]) -> bool:
        """Whether the pattern is found in one of its lines."""
        return any(pattern.search(line.removesuffix(b"\n")) is not None for line in lines_of(self.data))


@dataclass(slots=True, eq=False)
class _Open:
    first: Record
    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    fed: float = 0.0
    unterminated: bool = False


class Records:
    """Joins the lines of each source.

    Args:
        beginning: found in the first line of each record, without its line end.
        max_bytes: see the head of this module.
        clock: seconds.

    Attributes:
        parts: how many records were given in parts.
    """

    def __init__(
        self,
        beginning: re.Pattern[bytes],
        *,
        max_bytes: int = MAX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._search = beginning.search
        self._max_bytes = max_bytes
        self._clock = clock
        self._open: dict[int, _Open] = {}
        self._given: set[int] = set()  # sources whose last record was given out before the next began
        self._size = 0
        self.parts = 0

    def feed(self, lines: Lines) -> Iterator[Lines]:
        """The next lines of a source; the records that end there. Packets are records already."""
        if lines.packets is not None:
            yield from self._end(lines.source_id)
            yield lines
            return
        begin = at = first = 0
        search = self._search
        each = lines.each()
        for number, line in enumerate(each):
            if search(line[:-1] if line.endswith(b"\n") else line) is not None:
                if at > begin:
                    yield from self._add(lines, first, begin, each[first:number])
                yield from self._end(lines.source_id)
                self._given.discard(lines.source_id)
                self._begin(lines, number, at, headless=False)
                first, begin = number, at
            at += len(line)
        yield from self._add(lines, first, begin, each[first:])
        found = self._open.get(lines.source_id)
        if found is not None:
            found.fed, found.unterminated = self._clock(), lines.unterminated

    def quiet(self, seconds: float = QUIET) -> Iterator[Lines]:
        """The records that nothing was added to for so long."""
        now = self._clock()
        for source_id in [number for number, found in self._open.items() if now - found.fed >= seconds]:
            yield from self._end(source_id)
            self._given.add(source_id)

    def close(self) -> Iterator[Lines]:
        """The records that have not ended."""
        for source_id in list(self._open):
            yield from self._end(source_id)

    def restart(self) -> None:
        """Forget what was fed."""
        self._open.clear()
        self._given.clear()
        self._size = 0

    def _begin(self, lines: Lines, number: int, at: int, *, headless: bool, rest: bool = False) -> _Open:
        place = lines.seq + number, lines.time_ns, b"", False, None, lines.source_off + at, lines.generation
        found = _Open(Record(lines.source_id, lines.name, *place, headless=headless, rest=rest))
        self._open[lines.source_id] = found
        return found

    def _add(self, lines: Lines, number: int, at: int, each: list[bytes]) -> Iterator[Lines]:
        """Lines that go on with their source's record; the first is number `number` of `lines` and begins at `at`."""
        found = self._open.get(lines.source_id)
        if found is None:
            rest = lines.source_id in self._given
            found = self._begin(lines, number, at, headless=not rest, rest=rest)
        if found.parts and not found.parts[-1].endswith(b"\n"):
            found.parts.append(b"\n")  # a file that ended without one, and the next goes on
        for line in each:
            if found.size and found.size + len(line) > self._max_bytes:
                self.parts += not found.first.rest
                yield self._part(found)
                found = self._begin(lines, number, at, headless=False, rest=True)
            found.parts.append(line)
            found.size += len(line)
            self._size += len(line)
            number, at = number + 1, at + len(line)
        if self._size > ALL_BYTES:
            largest = max(self._open, key=lambda source_id: self._open[source_id].size)
            self.parts += not self._open[largest].first.rest
            yield self._part(self._open.pop(largest))
            self._given.add(largest)

    def _part(self, found: _Open) -> Lines:
        record = self._whole(found)
        record.part = True
        return record

    def _end(self, source_id: int) -> Iterator[Lines]:
        found = self._open.pop(source_id, None)
        if found is not None and found.parts:
            yield self._whole(found)

    def _whole(self, found: _Open) -> Record:
        self._size -= found.size
        record = found.first
        record.data, record.unterminated = b"".join(found.parts), found.unterminated
        return record
