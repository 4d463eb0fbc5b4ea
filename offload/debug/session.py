"""What one session of the detector keeps: its stalls, how its loops fared, and what was logged when. All of it bounded.

A line is logged at once for the first stall of its fingerprint; what follows within a minute is counted, and told with
its quantiles by one line when the minute is over, or the session. A stall that lasts 16 times the threshold gets a line
of its own while it lasts, so that one that never ends is heard of.
"""

from __future__ import annotations

import logging
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable

from .clocks import Clock
from .edge import BINS, POINTS
from .record import LoopRecord, Report, Stall, Verdict

STALLS = 1000  # kept with all that is known of them
LOOPS = 4096  # names of loops that are over
FINGERPRINTS = 4096
MINUTE = 60.0  # seconds for one line a fingerprint
LOUD = 16  # times the threshold, after which a stall is logged that has not ended

log = logging.getLogger("offload.debug")
LEVELS = {Verdict.FAIL: logging.WARNING, Verdict.UNMEASURED: logging.INFO, Verdict.PASS: logging.DEBUG}


class Session:
    """One session. Any thread may ask for the report; the watchdog alone adds to it."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.began = Clock.now()
        self.wall = time.time()
        self.ended: float | None = None
        self._stalls: dict[int, Stall] = {}
        self._past: dict[tuple[str, str, bool, str], LoopRecord] = {}
        self._lost = 0
        self._last = 0
        self._lock = threading.Lock()

    def number(self) -> int:
        self._last += 1
        return self._last

    def at(self, clock: float) -> float:
        """The time of the detector's clock as seconds since 1970."""
        return self.wall + clock - self.began

    def add(self, stall: Stall) -> None:
        """Keep a stall; one with the same number gives way to it."""
        with self._lock:
            if stall.number not in self._stalls and len(self._stalls) >= STALLS:
                self._stalls.pop(next(iter(self._stalls)))
                self._lost += 1
            self._stalls[stall.number] = stall

    def bury(self, record: LoopRecord) -> None:
        """Keep how a loop fared that is over; those of one name are one."""
        key = (record.name, record.thread, record.resource, record.precision)
        with self._lock:
            if key not in self._past and len(self._past) >= LOOPS:
                self._past.pop(next(iter(self._past)))
            known = self._past.get(key)
            self._past[key] = record if known is None else _joined(known, record)

    def report(self, live: Iterable[LoopRecord]) -> Report:
        with self._lock:
            loops = dict(self._past)
            for record in live:
                key = (record.name, record.thread, record.resource, record.precision)
                known = loops.get(key)
                loops[key] = record if known is None else _joined(known, record)
            return Report(
                self.wall,
                (self.ended or Clock.now()) - self.began,
                self.threshold,
                platform.python_version(),
                f"{sys.platform}-{platform.machine()}",
                tuple(sorted(self._stalls.values(), key=lambda stall: (stall.began, stall.number))),
                tuple(loops.values()),
                self._lost,
            )


def _joined(a: LoopRecord, b: LoopRecord) -> LoopRecord:
    points = sorted([*a.timeline, *b.timeline])
    while len(points) > POINTS:
        # Pairs of one loop after another: their mean is near enough for a picture.
        pairs = zip(points[::2], points[1::2], strict=False)
        points = [(t2, (share1 + share2) / 2) for (_, share1), (t2, share2) in pairs]
    bins: tuple[int, ...] = ()
    if a.histogram or b.histogram:
        bins = tuple(x + y for x, y in zip(a.histogram or (0,) * BINS, b.histogram or (0,) * BINS, strict=True))
    return LoopRecord(
        a.name,
        a.thread,
        a.resource,
        a.precision,
        a.iterations + b.iterations,
        a.busy + b.busy,
        a.watched + b.watched,
        max(a.longest, b.longest),
        bins,
        tuple(points),
    )


class _Offence:
    """What was seen of one fingerprint since its last line."""

    __slots__ = ("durations", "last", "logged", "worst")

    def __init__(self) -> None:
        self.logged = float("-inf")
        self.durations: deque[float] = deque(maxlen=1000)
        self.worst: Stall | None = None


class Logbook:
    """Writes the lines, one a fingerprint a minute. For one thread at a time."""

    def __init__(self) -> None:
        self._offences: dict[object, _Offence] = {}
        self.pending = 0  # fingerprints of which something was counted and not told

    def add(self, stall: Stall, now: float) -> None:
        """Log it, or count it. What is allowed is not logged."""
        if stall.verdict is Verdict.PASS:
            return
        if stall.ongoing and stall.duration < LOUD * stall.threshold:
            return
        key = (stall.fingerprint, stall.ongoing)
        offence = self._offences.get(key)
        if offence is None:
            if len(self._offences) >= FINGERPRINTS:
                gone = self._offences.pop(next(iter(self._offences)))
                self.pending -= gone.worst is not None
            offence = self._offences[key] = _Offence()
        offence.durations.append(stall.duration)
        self.pending += offence.worst is None
        if offence.worst is None or stall.duration > offence.worst.duration:
            offence.worst = stall
        if now - offence.logged >= MINUTE:
            self._write(offence, now)

    def flush(self, now: float, *, all_of_it: bool = False) -> None:
        """Tell of what was counted, if its minute is over."""
        for offence in self._offences.values():
            if offence.worst is not None and (all_of_it or now - offence.logged >= MINUTE):
                self._write(offence, now)

    def _write(self, offence: _Offence, now: float) -> None:
        from .report import log_line  # only a program that stalls pays for it

        stall, durations = offence.worst, tuple(offence.durations)
        assert stall is not None, "it was counted"
        offence.logged, offence.worst = now, None
        self.pending -= 1
        offence.durations.clear()
        log.log(LEVELS[stall.verdict], "%s", log_line(stall, durations))
