"""Lines of many sources in the order of the times in them, while they grow: what stands between reading and writing.

    Tail.read ─► steps ─► TimeOrder.put ─► held, by source ─► TimeOrder.released ─► steps ─► writer
                            copies them                         as far as the watermark has passed

The watermark is the time before which nothing more is expected, the least of these over all sources:

    it has more to read       the latest time that was read of it: what comes is later
    it is read to its end     the latest time that was read of it, or `lateness` ago if that is later: a line is in its
                              file within `lateness` of its time
    a batch, read to its end  any time: nothing comes
    no time is found in it    any time: its own lines are written as they come

What has waited for `lateness` does not wait on for sources that are read to their ends, whatever their clocks say. (To
let idle sources hold up nobody was considered: then the first line after a pause of any source is late.)

Promises:
    - Within a source the order is never changed; so each line is there once, wherever the merge is killed: what is held
      is not in the file, and is read again.
    - If each source is in order itself, and each line is in its file within `lateness` of its time, the packet file is
      in order; a batch's always. Of equal times, what was read first stands first.
    - A line that comes later is written at once, and counted (`Progress.late`): the count is exactly that of the lines
      which stand behind one with a later time.
    - Memory is bounded. A source that holds its share of HELD_BYTES is not read on: the file is the buffer. Where even
      what was read of each source once is too much (some thousand large files), the earliest go out before their time.
    - Each frame has the time at which its lines were read. Where that was more than KEPT ago, KEPT: so `--since` and
      `--until` are right (seek.py).

A stop or the end of a batch releases everything. Lines of a file that is deleted while they are held are lost if the
merge is killed then: for `lateness`, and without this order for a moment, nothing else has them.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from ..files.packet_file import Piece
from ..files.reading import ARENA_BYTES, Begin, Step
from ..packets.format import GUARD_BYTES, Flag, FrameType
from .order import ALWAYS, NEVER, Chunk, Order, cut
from .times import Times, check_formats

if TYPE_CHECKING:
    from ..files.tail import Tail
    from .progress import Progress

HELD_BYTES = 16 << 20  # what the sources hold together is read on up to this, and a read of each
MOST_BYTES = 128 << 20  # more is never held
KEPT = 30 * 10**9  # nanoseconds: half of what seek.py allows for
_LEAST = (64 << 10) + 2 * GUARD_BYTES  # an arena for less would read nothing
_STEP = 0.01  # seconds: what is due together goes out together


@dataclass(frozen=True, slots=True)
class ByTime:
    """Write lines in the order of the times in them, as far as they come within `lateness`.

    Args:
        formats: how times are written, as for `strptime`; none: the common ones are found by themselves (`times.py`).
        lateness: seconds for which a line waits for earlier ones of other sources; one that comes later still is
            written at once.

    Raises:
        TypeError, ValueError: says what is wrong with these.
    """

    formats: tuple[str, ...] = ()
    lateness: float = 5.0

    def __post_init__(self) -> None:
        if isinstance(self.formats, str):
            raise TypeError(f"formats are {self.formats!r}, expected a tuple of them; write ({self.formats!r},)")
        if not (self.lateness >= 0 and math.isfinite(self.lateness)):
            raise ValueError(f"lateness is {self.lateness}, expected seconds, 0 or more")
        check_formats(self.formats)


@dataclass(slots=True, eq=False)
class _Held:
    """A step that waits; of a Piece, a copy."""

    source: _Source
    step: Step
    data: bytes
    time_ns: int
    since: float  # by the monotonic clock
    latest: int


class _Source:
    __slots__ = ("held", "key", "latest", "queue", "read", "times")

    def __init__(self, formats: Iterable[str]) -> None:
        self.queue: deque[Chunk[_Held]] = deque()
        self.times = Times(tuple(formats))
        self.key = NEVER  # of the last line
        self.latest = NEVER
        self.held = 0  # bytes
        self.read = False  # something was

    @property
    def is_timeless(self) -> bool:
        return self.read and self.latest == NEVER


class TimeOrder:
    """Holds the steps of all sources and gives them back in the order of time; see the head of this module.

    For one thread: the merge's reader.

    Args:
        progress: `late` is counted there.
        clock, monotonic: Unix nanoseconds; seconds.
    """

    def __init__(
        self,
        settings: ByTime,
        progress: Progress,
        *,
        clock: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._lateness_ns = int(settings.lateness * 1e9)
        self._progress = progress
        self._clock = clock
        self._monotonic = monotonic
        self._sources: dict[Tail, _Source] = {}
        self._behind: dict[Tail, _Source] = {}  # those with more to read
        self._recent: dict[Tail, _Source] = {}  # those read to their ends, with a time not longer ago than `lateness`
        self._idle: set[Tail] = set()  # those read to their ends, without one; in which no time is found, in none
        self._order: Order[_Held] = Order()
        self._held = 0  # bytes
        self._number = 0
        self._arrival = 0
        self._final = False
        self._last: Tail | None = None
        self._out: list[Step] = []
        self._stats: dict[int, tuple[int, int]] = {}

    def set_lateness(self, seconds: float) -> None:
        """How long a line waits for earlier ones, from now on."""
        self._settings = replace(self._settings, lateness=seconds)
        self._lateness_ns = int(seconds * 1e9)

    # --- what is read when --------------------------------------------------------------------------------------------

    @staticmethod
    def arena_bytes(sources: int) -> int:
        """How large an arena should be, for a read of each source to stay within HELD_BYTES."""
        return max(_LEAST, min(ARENA_BYTES + GUARD_BYTES, HELD_BYTES // max(1, sources)))

    @property
    def deferred(self) -> list[Tail]:
        """Those that were left with more to read as they hold enough."""
        return list(self._behind)

    def expect(self, tails: Iterable[Tail], *, final: bool) -> None:
        """These are read next: nothing passes what they have. `final`: nothing comes behind their ends."""
        self._final, self._last = final, None
        for tail in tails:
            source = self._sources.get(tail)
            if source is None:
                source = self._sources[tail] = _Source(self._settings.formats)
            self._behind[tail] = source
            self._recent.pop(tail, None)
            self._idle.discard(tail)

    def next(self, queue: deque[Tail]) -> Tail | None:
        """Take the next one to read out of the queue; None: each holds its share, and only time can change that."""
        if self._final and queue[0] is self._last:
            return queue.popleft()  # put back in front: it must be read to its end first
        most = max(_LEAST, HELD_BYTES // len(self._sources))
        for _ in range(2):
            for _ in range(len(queue)):
                tail = queue.popleft()
                if self._sources[tail].held < most:
                    return tail
                queue.append(tail)
            self._take(self._watermark())  # others were read to their ends since
        return None

    # --- in -----------------------------------------------------------------------------------------------------------

    def put(self, tail: Tail, steps: list[Step], *, more: bool) -> None:
        """Take what was read of a source, and empty the list; `more`: it was not read to its end."""
        source = self._sources[tail]
        self._last = tail
        if steps:
            self._arrival = arrival = max(self._arrival + 1, self._clock())
            source.times.arrive(arrival)
            for step in steps:
                if type(step) is Begin and step.first:
                    self._out.append(step)  # nothing of its source can be before it, and sources are numbered as read
                else:
                    self._hold(source, step, arrival)
            steps.clear()
        if not more:
            self._behind.pop(tail, None)
            if not source.is_timeless:
                self._recent[tail] = source

    def _hold(self, source: _Source, step: Step, arrival: int) -> None:
        data, keys, ends = b"", [source.key], [0]
        if type(step) is Piece:
            data = bytes(step.payload)
            source.read = True
            if step.type is FrameType.LINES and not step.flags & Flag.HOLE:
                keys, ends = cut(data, source.times, source.key, inside=bool(step.flags & (Flag.MIDDLE | Flag.LAST)))
            else:
                ends = [len(data)]
        source.key = keys[-1]
        latest = max(keys)
        source.latest = max(source.latest, latest)
        held = _Held(source, step, data, arrival, self._monotonic(), latest)
        self._number += 1
        source.held += len(data)
        self._held += len(data)
        self._order.put(source.queue, Chunk(self._number, keys, ends, held))

    # --- out ----------------------------------------------------------------------------------------------------------

    def released(self, stats: dict[int, tuple[int, int]]) -> tuple[list[Step], dict[int, tuple[int, int]]]:
        """What may be written now, in order; and of all that was read since, what `PacketFile.append` wants to know."""
        self._stats.update(stats)
        self._take(self._watermark())
        if self._held > MOST_BYTES:
            self._take(ALWAYS, down_to=MOST_BYTES)
        if not self._out:
            return [], {}
        out, self._out = self._out, []
        stats, self._stats = self._stats, {}
        return out, stats

    def let_go(self) -> None:
        """Everything may be written."""
        self._final = True
        self._behind.clear()

    def due(self) -> float:
        """When time alone may release something, by the monotonic clock; never: infinity."""
        now, lateness = self._monotonic(), self._settings.lateness
        first, due = True, math.inf
        for chunk in self._order.heads():
            due = min(due, chunk.item.since + lateness)
            if first:
                first = False
                due = min(due, now + (chunk.keys[chunk.at] + self._lateness_ns - self._clock()) / 1e9)
        return due if due == math.inf else max(due, now + _STEP)

    def is_due(self) -> bool:
        return self.due() <= self._monotonic() + _STEP

    def _watermark(self) -> int:
        behind = min((source.latest for source in self._behind.values() if not source.is_timeless), default=ALWAYS)
        return behind if self._final else min(behind, self._idle_watermark())

    def _idle_watermark(self) -> int:
        """What those that are read to their ends leave."""
        horizon = self._clock() - self._lateness_ns
        for tail in [tail for tail, source in self._recent.items() if source.latest <= horizon]:
            del self._recent[tail]
            self._idle.add(tail)
        mark = horizon if self._idle else min((source.latest for source in self._recent.values()), default=ALWAYS)
        waited = self._monotonic() - self._settings.lateness
        for head in self._order.heads():
            for chunk in takewhile(lambda chunk: chunk.item.since <= waited, head.item.source.queue):
                mark = max(mark, chunk.item.latest)
        return mark

    def _take(self, bound: int, *, down_to: int = -1) -> None:
        # Nobody is told a time of more than KEPT ago, which is when the frames before may say.
        oldest = self._clock() - KEPT
        for held, start, end, last in self._order.take(bound):
            step, data = held.step, held.data
            if type(step) is Piece:
                step = _part(step, data, start, end, max(held.time_ns, oldest))
            self._out.append(step)
            if last:
                held.source.held -= len(data)
                self._held -= len(data)
                if self._held <= down_to:
                    break
        late = self._order.late
        if late:
            self._progress.late += sum(_lines(held, start, end) for held, start, end in late)
            late.clear()


def _part(piece: Piece, data: bytes, start: int, end: int, time_ns: int) -> Piece:
    """These lines of a piece."""
    if start == 0 and end == len(data):
        return Piece(piece.source_id, data, piece.source_off, piece.count, piece.flags, piece.type, time_ns)
    count, flags = data.count(b"\n", start, end), Flag.NONE
    if piece.flags and start == 0 and piece.flags & (Flag.MIDDLE | Flag.LAST):
        # The line that goes on here may have been counted where it began.
        count -= data.count(b"\n") + bool(piece.flags & Flag.UNTERMINATED) - piece.count
        flags = Flag.LAST
    if piece.flags and end == len(data) and piece.flags & Flag.UNTERMINATED:
        count += 1
        flags = Flag.UNTERMINATED
    return Piece(
        piece.source_id, memoryview(data)[start:end], piece.source_off + start, count, flags, piece.type, time_ns
    )


def _lines(held: _Held, start: int, end: int) -> int:
    return _part(held.step, held.data, start, end, 0).count if type(held.step) is Piece else 0
