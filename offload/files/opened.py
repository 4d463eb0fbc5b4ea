"""The files of one log that are open, and those that were: what a Tail has in its hands. For one thread.

waiting   had the name while nobody could read on; not begun yet
readings  the newest, which has the name or had it last; before it those that lost it and may still be written to
history   closed; known by what is in them
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from ..packets.format import Compression
from .beside import Taken
from .contents import Contents, open_contents
from .reading import Reading, reading_of
from .rotated import Former, Resume


class Unread(NamedTuple):
    """Bytes of a source that are there and not given out.

    Attributes:
        lag: all of them.
        held: those of them in files that no name leads to any more: only our descriptors keep them.
        end: how far what was given out will reach when all of them are, in the file that has the name.
        file: device and inode of that file.
    """

    lag: int
    held: int
    end: int
    file: tuple[int, int] | None


class Shorter(Exception):
    """A file is not what was read of it, and may only have lost its end: who has what was read can compare them.

    Attributes:
        path: of the file.
        known: what was read, and how far.
        live: it was read just now, not by an earlier run; `known` does not say in which generation.
    """

    def __init__(self, path: str, known: Resume, *, live: bool) -> None:
        super().__init__(path)
        self.path, self.known, self.live = path, known, live


class Common(NamedTuple):
    """The answer: so many bytes of the file, from its start, are what was read; 0: it was truncated.

    Attributes:
        start: None: all of it, and it ends inside a line, which may be a new one that begins like the one that was
            read: nobody knows before it goes on.
        guard: the last GUARD_BYTES of them, for the file may be another one when the answer comes.
    """

    start: int | None
    guard: bytes = b""


class Opened:
    """What is open of a log.

    Args:
        path, history, follow, former, held, taken, size, clock: see Tail.
    """

    def __init__(
        self,
        path: str,
        *,
        history: list[Resume] | None,
        follow: bool,
        former: Former | None,
        held: dict[tuple[int, int], str] | None,
        taken: Taken,
        size: int,
        clock: Callable[[], float],
    ) -> None:
        self.path = path
        self._follow = follow
        self._former = {} if former is None else former
        self._held = {} if held is None else held
        self._history = [] if history is None else history
        self._taken = taken
        self._expected = size
        self._clock = clock
        self._readings: list[Reading] = []  # the newest last; the others lost their name
        self._waiting: list[Contents] = []  # files that have had the name since, not begun yet
        self._given_up: list[Reading] = []  # closed with bytes that were not read; to be stated

    @property
    def identities(self) -> set[tuple[int, int]]:
        """Device and inode of the files that are read; not of one that was not compared yet with what is known."""
        own = {r.identity for r in self._readings if r.contents is None and r.entry is None}
        return own.union(c.identity for c in self._contents())

    @property
    def is_open(self) -> bool:
        return any(reading.contents is not None for reading in self._readings)

    @property
    def descriptors(self) -> int:
        """How many it has open now."""
        return len(self._contents())

    @property
    def must_stay_open(self) -> bool:
        """Whether closing it now loses bytes: nothing but its descriptor leads to them."""
        unread = [r.contents for r in self._readings if r.lag and r.contents is not None]
        return any(not contents.has_name() for contents in (*unread, *self._waiting))

    def measure(self) -> Unread:
        """What is there at this moment and not given out. From any thread: it may be a little out of date."""
        lag = held = end = 0
        readings = list(self._readings)
        places = [(r.contents, r.offset, r.upto, r.size) for r in readings]
        for contents, offset, upto, size in [*places, *((c, 0, None, 0) for c in list(self._waiting))]:
            nameless = False
            if contents is not None:
                try:
                    status = os.fstat(contents.fd)
                except OSError:
                    continue  # closed meanwhile
                size = status.st_size if contents.compression is Compression.NONE else size
                nameless = not status.st_nlink
            rest = max(0, (size if upto is None else min(upto, size)) - offset)
            lag, held, end = lag + rest, held + rest * nameless, offset + rest
        return Unread(lag, held, end, readings[-1].identity) if readings else Unread(self._expected, 0, 0, None)

    def close(self) -> None:
        """Let go of all descriptors; the next read opens the file again and compares it with what is known."""
        for reading in self._readings[:-1]:
            self._let_go(reading)
        for reading in self._readings:
            if reading.contents is not None:
                reading.contents.close()
                reading.contents, reading.behind = None, False
        while self._waiting:
            self._waiting.pop().close()

    def hold(self) -> None:
        """Open the file that has the name now and read nothing: whoever writes what is read is slower than rotation."""
        try:
            status = os.stat(self.path)
            identity = status.st_dev, status.st_ino
            if status.st_size and identity not in self.identities and not self._taken(self.path, identity):
                self._waiting.append(open_contents(self.path))
        except OSError:
            pass  # read() tells

    def held(self) -> tuple[int, int]:
        """Unread bytes that no name leads to any more, and when the oldest file of them was last written to, in ns.

        Looks at the files now. Where somebody deletes what we have open, its room on the disk is free only once we have
        read it to its end.
        """
        nameless = self._nameless()
        return sum(bytes for _, bytes in nameless), min((c.changed_ns() for c, _ in nameless), default=0)

    def give_up(self) -> None:
        """Close the oldest file that no name leads to any more, unread as it is; the next read states a Gap."""
        nameless = self._nameless()
        if not nameless:
            return
        contents = min(nameless, key=lambda pair: pair[0].changed_ns())[0]
        reading = next((r for r in self._readings if r.contents is contents), None)
        if reading is None:
            self._waiting.remove(contents)
            reading = reading_of(contents, self.path)
        reading.size, reading.mtime_ns = contents.look()
        self._given_up.append(reading)
        self._let_go(reading)

    def _nameless(self) -> list[tuple[Contents, int]]:
        """Open files that no name leads to any more, and how many of their bytes were not read."""
        own = [(r.contents, r.offset) for r in self._readings if r.contents is not None]
        found = [(c, offset) for c, offset in (*own, *((w, 0) for w in self._waiting)) if not c.has_name()]
        return [(c, size - offset) for c, offset in found if (size := c.look()[0]) > offset]

    def _contents(self) -> list[Contents]:
        return [r.contents for r in self._readings if r.contents is not None] + self._waiting

    def _let_go(self, reading: Reading) -> None:
        """Close a file that lost its name; it is known by what is in it."""
        self._remember(reading)
        if reading.contents is not None:
            reading.contents.close()
            reading.contents = None
        if reading in self._readings:
            self._readings.remove(reading)

    def _remember(self, reading: Reading) -> None:
        entry = reading.as_entry()
        if reading.known is None:
            reading.known = Resume(reading.info, entry)
            self._history.append(reading.known)
        reading.known.entry = entry
        self._former[reading.identity] = reading.known

    def _all_read(self) -> list[Resume]:
        """What was read before the newest, also of files that are still open: by now they may stand packed beside."""
        return [*self._history, *(Resume(reading.info, reading.as_entry()) for reading in self._readings[:-1])]

    def _upto(self, reading: Reading) -> Reading:
        assert reading.contents is not None
        if not self._follow:
            reading.upto = reading.contents.look()[0]
        reading.grew = self._clock()
        self._held[reading.identity] = self._held[reading.contents.identity] = self.path
        return reading
