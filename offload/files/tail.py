"""One growing log: where it was read up to, and what comes next. For one thread; it never waits.

Theory of operation. A source is a path, and over time that path names one file after another:

    path "app.log"   generation 0          1 (a new file has the name)   2 (late lines)   3 (back)
                     ├─ read ─┤ rest ─────► ├─ … ───────────┤            ├──┤             ├─ … ──►
                              offset                         │ of file 0 ─┘                │
                                                             └─ of file 1 ─────────────────┘

A `Reading` is one of these files with the offset up to which it was read. The newest has the name, the others lost it
and are kept open for `linger` seconds, for a program writes to what it has open, not to a name. What comes from another
file than the bytes before begins a generation that says which file, and from where on; so `split` can put each file
together again, and the packet file alone tells how far each was read.

    renamed, its name taken     read to its end by its open descriptor; then the files that had the name in between, in
                                the order in which they were made; then the one that has it now
    renamed, deleted            read on by its descriptor for as long as nobody has the name
    renamed while we were down  looked for beside its name, by inode and then by content, packed or not, and read on
    truncated                   what stands before the offset is compared with each read. If a copy is beside it that
                                holds what was read (copytruncate), the copy is read on; then the file, from its start
    it lost its end             its machine lost power, and wrote on. What it still has of what was read, who holds that
                                must say (`Shorter`); from there on it is read
    its inode used again        it was made at another time, or does not hold what was read: another file
    NULs, 4 KiB and more        a hole: stated by its length. At the end of a file they wait for what comes behind, for
                                programs reserve room that they fill later
    nobody has it any more      a Gap

Promises:
    - A byte is given out once, in order for each file, with its offset; only whole lines, until the file is known to
      end there: it lost its name, and nothing came for a second.
    - A line longer than the buffer comes in fragments; nothing is cut off, however long.
    - Bytes that cannot be read any more are stated as a Gap, never passed over.
    - What a file that lost its end still has of what was read is not given out again, if HEAD_BYTES or all of the file
      are. Where less agrees, it was truncated: every file of a log may begin with the same lines. So was a local file
      that changes while it is open, for its machine is up.
    - Nothing is known from a name: identity, size and time come from the descriptor that is read.

The partial last line is held as an offset, not as bytes: memory does not grow with the number of files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum

from ..packets.format import GapReason
from .beside import Beside, Taken, is_beginning
from .opened import Common as Common
from .opened import Shorter as Shorter
from .opened import Unread as Unread
from .reading import Arena, Reading, Step, fill, reading_of
from .rotated import Folders, Former, Resume
from .succession import Succession

_ROOM = 64 << 10  # an arena with less than this left is full: a read of less is not worth its system call
_QUIET = 1.0  # seconds after which the last line of a file that lost its name is given out without its end


class _After(Enum):
    END = 0  # of what is there
    MORE = 1  # that did not fit
    OTHERS = 2  # other files are read from now on


class Tail(Succession):
    """What comes next in one log.

    Args:
        path: absolute; its bytes name the source.
        source_id: its number in the packet file.
        resume: where the packet file has it; None: it is new.
        history: its earlier generations, as the packet file has them.
        follow: False: read up to the size that it has when it is opened, and end there.
        linger: seconds for which a file that lost its name is kept open after it was last written to.
        former: files that lost their name after they were read, and how to know them; added to.
        held: files that are read now -> path of their source; added to, and out of date where a tail says otherwise.
        taken: whether the file that has a path now, with this device and inode, is another source's: then it is that
            source's file under a new name, not the next one of this.
        followed: whether another source has this name: then a new file of that name is that one's next.
        folders: what is beside a path; tails share it.
        size: what it is known to have before it is opened.
        clock: seconds; decides how long a file was quiet.
        recalls: somebody has what was read, and answers a `Shorter` with `settle`; otherwise a file that is shorter was
            truncated.
    """

    def __init__(
        self,
        path: str,
        source_id: int,
        resume: Resume | None = None,
        *,
        history: list[Resume] | None = None,
        follow: bool = False,
        linger: float = 0.0,
        former: Former | None = None,
        held: dict[tuple[int, int], str] | None = None,
        taken: Taken = lambda path, identity: False,
        followed: Callable[[str], bool] = lambda path: False,
        folders: Folders | None = None,
        size: int = 0,
        clock: Callable[[], float] = time.monotonic,
        recalls: bool = False,
    ) -> None:
        super().__init__(
            path,
            source_id,
            resume,
            Beside(path, Folders() if folders is None else folders, taken, followed),
            history=history,
            follow=follow,
            former=former,
            held=held,
            taken=taken,
            size=size,
            clock=clock,
            recalls=recalls,
        )
        self._linger = linger if follow else 0.0

    @property
    def source_id(self) -> int:
        return self._out.source_id

    @source_id.setter
    def source_id(self, number: int) -> None:
        self._out.source_id = number

    def set_linger(self, seconds: float) -> None:
        """For how long files that lost their name are kept open, from now on."""
        self._linger = seconds if self._follow else 0.0

    def resume(self) -> Resume | None:
        """Where it stands in the file that has the name, and how to know that again; None: nothing was given out."""
        if not self._readings or self._out.current is None:
            return None
        newest = self._readings[-1]
        return Resume(newest.info, newest.as_entry()._replace(source_id=self.source_id, flags=newest.open))

    @property
    def offset(self) -> int:
        """Of the next byte wanted in the file that has the name."""
        return self._readings[-1].offset if self._readings else 0

    @property
    def size(self) -> int:
        """Of the file of the present generation, as of the last look."""
        return self._out.current.size if self._out.current else 0

    @property
    def mtime_ns(self) -> int:
        return self._out.current.mtime_ns if self._out.current else 0

    @property
    def lag(self) -> int:
        """Bytes that are there and not given out, as of the last look."""
        return sum(reading.lag for reading in self._readings) if self._readings else self._expected

    def read(self, arena: Arena, steps: list[Step], *, final: bool = False) -> bool:
        """Read into the arena and append the steps for the packet file; their payloads are views of the arena.

        Args:
            final: nobody will read on soon, so a last line without its end is given out too.

        Returns:
            Whether there is more that did not fit.

        Raises:
            Shorter: `settle` what it asks, and read again; the steps are right as far as they go.
            FileNotFoundError: there is no such file (and none that was read is found).
            OSError: it may not be read, is no regular file, or is packed and not whole.
        """
        while self._given_up:
            reading = self._given_up.pop(0)
            self._out.gap(reading, steps, GapReason.GIVEN_UP, reading.size)
        if not self._readings or self._readings[-1].contents is None:
            self._open(steps)
        if self._looks_back:
            self._look_back()
        while True:
            after = _After.END
            for reading in self._in_order():
                if reading.contents is None or self._waits(reading):
                    continue
                after = self._read(reading, arena, steps, ended=final or reading.ended)
                if after is _After.MORE:
                    return True
                if after is _After.OTHERS:
                    break
            if after is _After.END and (self._readings[-1].contents is None or not self._turn(steps, final=final)):
                return False

    # --- reading ------------------------------------------------------------------------------------------------------

    def _in_order(self) -> list[Reading]:
        """The readings, the oldest first; but before all the one in whose line we are."""
        current = self._out.current
        if current is None or not current.open or current not in self._readings:
            return list(self._readings)
        return [current, *(reading for reading in self._readings if reading is not current)]

    def _waits(self, reading: Reading) -> bool:
        """Whether a line of another of the files was begun and goes on, so that this one's would tear it in two."""
        current = self._out.current
        if current is None or current is reading or not current.open or current.ended or current.contents is None:
            return False
        has_name = current is self._readings[-1] and not current.behind
        patience = self._linger if has_name else min(self._linger, _QUIET)
        return current in self._readings and self._clock() - current.grew < patience

    def _read(self, reading: Reading, arena: Arena, steps: list[Step], *, ended: bool) -> _After:
        """Read a file up to its present end."""
        contents = reading.contents
        assert contents is not None
        while True:
            before = reading.size
            reading.size, mtime_ns = contents.look()
            if (reading.size, mtime_ns) != (before, reading.mtime_ns):
                reading.grew = self._clock()
            shrunk = reading.size < before
            cut = shrunk and reading.padded is None and not reading.offset and reading is self._readings[-1]
            if cut or reading.size < reading.offset or (shrunk and not reading.stands()):
                return self._cut(reading, before, steps)
            reading.mtime_ns = mtime_ns
            if mtime_ns != reading.checked_ns and reading.offset and self._is_under_another_hole(reading):
                return self._cut(reading, before, steps)
            if shrunk and (reading.padded is None or reading.size < reading.padded):
                self._out.gap(reading, steps, GapReason.TRUNCATED)  # of the last line, which was not given out yet
            padded, want = reading.padded, reading.end - reading.offset
            if want > 0:
                guard = len(reading.guard)
                if arena.room - guard < min(want, _ROOM):
                    return _After.MORE
                fresh = arena.at == 0
                length = min(want, arena.room - guard)
                start, end = fill(reading, arena, length)
                if end < start:
                    return self._cut(reading, before, steps)
                reading.padded, there = None, reading.offset + end - start
                if padded is not None and padded <= there < reading.offset + length:
                    reading.size = there  # it was cut since the look, and lost nothing but NULs
                last = there >= reading.end
                limit = end - start if fresh and not last else len(arena.data)
                at = reading.offset
                self._out.give(reading, arena, start, end, steps, ended=ended, last=last, limit=limit)
                if not last:
                    if reading.offset == at and not fresh:
                        return _After.MORE  # a line that is longer than what was left of this arena
                    continue
            elif reading.guard and mtime_ns != reading.checked_ns and not reading.stands():
                return self._cut(reading, before, steps)  # written anew, and as long as before
            else:
                reading.padded = None
            reading.checked_ns = mtime_ns
            return _After.END

    def _is_under_another_hole(self, reading: Reading) -> bool:
        """Whether all that was read is a hole, and a copy tells that the file was cut and has another hole now."""
        if any(reading.guard) or any(reading.head) or reading.behind or reading is not self._readings[-1]:
            return False
        assert reading.contents is not None
        present = Resume(reading.info, reading.as_entry())
        copy = self._beside.copy_of(present, self.identities, self._all_read())
        if copy is None:
            return False
        try:
            return not is_beginning(copy, reading.contents, reading.offset)
        finally:
            copy.close()

    # --- from one file to the next ------------------------------------------------------------------------------------

    def _turn(self, steps: list[Step], *, final: bool) -> bool:
        """All that is there was read: whether there is more to read by now, in another file or of a last line."""
        now = self._clock()
        for old in self._readings[:-1]:
            if now - old.grew < self._linger or self._waits(old):
                old.ended = False
                continue
            if old.lag and not old.ended:
                old.ended = True
                return True
            self._let_go(old)
        newest = self._readings[-1]
        if self._waits(newest):
            return False
        if self._out.current not in self._readings:
            self._out.select(newest, steps)  # so that whoever goes on from here looks for this one
        if not (self._follow or newest.behind) or not self._is_replaced(newest):
            return False
        if newest.lag and not newest.ended:
            if not final and now - newest.grew < min(self._linger, _QUIET):
                return False  # a line whose end may be on its way
            newest.ended = True
            return True
        following = self._following(newest)
        if not following:
            return False
        if newest.offset < newest.owed:
            self._out.gap(newest, steps, GapReason.TRUNCATED, newest.owed)
        newest.ended, newest.grew = False, now
        self._remember(newest)
        self._readings += following
        if not self._linger or newest.owed:
            self._let_go(newest)
        self._out.select(following[0], steps)
        return True

    def _cut(self, reading: Reading, before: int, steps: list[Step]) -> _After:
        """The file is not what it was, `before` bytes long: what was not read of it is gone, unless there is a copy."""
        assert reading.contents is not None
        if reading is not self._readings[-1]:
            if before > reading.offset:
                self._out.gap(reading, steps, GapReason.TRUNCATED)
            self._let_go(reading)
            return _After.OTHERS
        reading.size = before
        present = Resume(reading.info, reading.as_entry())
        copy = self._beside.copy_of(present, self.identities, self._all_read())
        if copy is not None:
            reading.contents.close()
            reading.contents, reading.behind, reading.owed = copy, True, before
            reading.size = reading.offset
            self._upto(reading)
            return _After.OTHERS
        contents = reading.contents
        between: list[Reading] = []
        if self._has_name(contents):  # otherwise what is beside it came after it: its turn comes
            # Of a file of which nothing was read only the time tells which copies are older.
            since_ns = 0 if reading.offset else reading.mtime_ns - 1
            between = self._between(present, contents, self.identities, since_ns)
            asks = not between and reading is self._out.current
            start = self._left_of(present, contents, live=True) if asks else 0
            if start is None:
                return _After.END
            if start:
                self._go_on_in(reading, contents, start, steps)
                return _After.OTHERS
        if not reading.offset and not between:
            self._out.gap(reading, steps, GapReason.TRUNCATED)  # of a line that was only begun; it goes on in place
            reading.size, reading.mtime_ns = contents.look()
            return _After.OTHERS
        if reading.offset or not any(r.contents and r.contents.look()[0] >= before for r in between):
            self._out.gap(reading, steps, GapReason.TRUNCATED)
        self._remember(reading)
        reading.contents = None
        self._readings[-1:] = [*between, self._upto(reading_of(contents, self.path))]
        self._out.select(self._readings[-1 - len(between)], steps)
        return _After.OTHERS
