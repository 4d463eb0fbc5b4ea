"""Which files a merge has open: as many as the system grants; and of these, what no name leads to any more.

How many descriptors the rest of the program needs, nobody knows: what it has when a merge begins, and some more. If
that was too few, whatever can be opened again is closed, until there is room for what is to be read.

A file that is deleted while we have it open keeps its room on the disk until we have read it. If the output is slow, or
waits for room on that very disk, that may be much.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable

from ..files.tail import Tail
from .progress import Progress

_OTHERS = 64  # descriptors that are left to the rest of the program, beside those that it has already
_AT_ONCE = 16  # so many more, each time that this was too few


class Held:
    """The tails that stay open between two reads, for one thread.

    Args:
        progress: is told how many unread bytes there are in them that nothing but our descriptors leads to.
        most: such bytes; of more, the oldest files are given up, each with a GAP. None: as many as there are. Can be
            set.
        follow: what is read to its end stays open.
    """

    def __init__(self, progress: Progress, most: int | None, *, follow: bool) -> None:
        self.most = most
        self._progress = progress
        self._follow = follow
        self._next = 0.0
        self._open: dict[Tail, int] = {}  # -> how many descriptors each has
        self._open_count = 0
        self._descriptors = _spare_descriptors()

    def keep(self, tail: Tail, wanted: bool) -> bool:
        """Leave a tail open that is wanted; False if there are no descriptors left for it."""
        self._open_count -= self._open.pop(tail, 0)
        count = tail.descriptors
        room = self._open_count + count <= self._descriptors
        # What no name leads to any more is read to its end first, whatever the others lack.
        if wanted and count and (room or tail.must_stay_open):
            self._open[tail] = count
            self._open_count += count
        elif not wanted or self._follow:
            tail.close()
        return room

    def makes_room(self, exc: OSError) -> bool:
        """If a file could not be opened for want of descriptors: leave others more of them. False: there are none."""
        if exc.errno not in (errno.EMFILE, errno.ENFILE):
            return False
        least, before = self._open_count - _AT_ONCE, self._open_count
        for tail in list(self._open):
            if self._open_count > least and not tail.must_stay_open:
                self.let_go(tail)
                tail.close()
        self._descriptors = max(1, self._open_count)
        return self._open_count < before

    def let_go(self, tail: Tail) -> None:
        """It was closed."""
        self._open_count -= self._open.pop(tail, 0)

    def hold(self, tails: Iterable[Tail]) -> None:
        """The output is slow: have the files open that come meanwhile, before they lose their names too."""
        for tail in tails:
            if self._open_count >= self._descriptors:
                return
            self._open_count -= self._open.pop(tail, 0)
            tail.hold()
            self._open[tail] = tail.descriptors
            self._open_count += self._open[tail]

    def count(self, pause: float) -> None:
        """Look at what is held and give up what is too much, unless it is less than `pause` seconds since."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + pause
        held = {tail: found for tail in self._open if (found := tail.held())[0]}
        total = sum(count for count, _ in held.values())
        while self.most is not None and total > self.most:
            tail = min(held, key=lambda tail: held[tail][1])
            tail.give_up()
            self._open_count += tail.descriptors - self._open[tail]
            self._open[tail] = tail.descriptors
            total -= held.pop(tail)[0]
            if (found := tail.held())[0]:
                held[tail] = found
                total += found[0]
        self._progress.held_bytes = total


def _spare_descriptors() -> int:
    """How many files may stay open: what the system grants this process, but for some that others need."""
    try:
        import resource
    except ImportError:  # Windows: what the C library grants
        return 512 - _OTHERS
    granted, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if granted == resource.RLIM_INFINITY:
        return 1 << 30
    try:
        used = len(os.listdir("/dev/fd"))
    except OSError:
        used = 0
    return max(1, granted - used - _OTHERS)
