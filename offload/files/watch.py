"""Which files in some folders have changed: inotify where the system has it, else time.

Promises: a change is reported, or "anything may have changed" is; never nothing. inotify's queue may overflow, a file
system may not report what another machine wrote, and a burst of events costs more to read than to look: each of these
ends in "anything". Whoever uses this looks at everything now and then anyway.

asyncinotify is imported when the first folder is watched: it costs as much as the rest of the program's start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncinotify import Inotify

# Past this many events looking at all files is cheaper than reading on (10 µs an event, 2 µs a stat).
_MANY = 64


class Watch:
    """Changes in folders; for one loop.

    Args:
        poll: do not use inotify (for network mounts, which do not report what others write).
        interval: seconds between two looks where there is no inotify.
    """

    def __init__(self, *, poll: bool = False, interval: float = 0.1) -> None:
        self._interval = interval
        self._inotify: Inotify | None = None
        self._poll = poll or sys.platform != "linux"
        self._folders: set[str] = set()
        self._names: dict[int, set[str]] = {}  # of each watch: links make it more than one
        self._changed = asyncio.Event()
        self._missed = False

    @property
    def polls(self) -> bool:
        return self._poll

    def add(self, folder: str) -> None:
        """Watch a folder too; one that cannot be watched makes all of them be looked at by time."""
        if self._poll or folder in self._folders:
            return
        try:
            self._stand_by(folder)
        except OSError:
            # No instances or watches left, or no such folder (any more): by time, then.
            self._poll = True
            self.close()
            return
        self._folders.add(folder)
        self._missed = True  # what happened before the watch stood

    def _stand_by(self, folder: str) -> None:
        from asyncinotify import Inotify, Mask

        mask = Mask.MODIFY | Mask.CREATE | Mask.MOVED_TO | Mask.MOVED_FROM | Mask.DELETE | Mask.ATTRIB
        if self._inotify is None:
            self._inotify = Inotify(sync_timeout=0)
            os.set_blocking(self._inotify.fd, False)
        watch = self._inotify.add_watch(folder, mask | Mask.MOVE_SELF | Mask.ONLYDIR)
        self._names.setdefault(watch.wd, set()).add(folder)

    async def wait(self, longest: float) -> None:
        """Return when something may have changed, after `wake()`, or after `longest` seconds."""
        if self._missed:
            return
        self._changed.clear()
        inotify, loop = self._inotify, asyncio.get_running_loop()
        if inotify is None:
            longest = min(longest, self._interval)
        else:
            # Only while we wait: in between, events may gather in the kernel without waking anybody.
            loop.add_reader(inotify.fd, self._changed.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(longest):
                    await self._changed.wait()
        finally:
            if inotify is not None:
                loop.remove_reader(inotify.fd)

    def wake(self) -> None:
        """End the present `wait`; on the loop that waits."""
        self._changed.set()

    def take(self) -> set[str] | None:
        """Paths that changed since the last time; None: any may have."""
        if self._missed or self._inotify is None:
            self._missed = False
            self._discard()
            return None
        from asyncinotify import Mask

        paths: set[str] = set()
        for _ in range(_MANY):
            event = self._inotify.sync_get()
            if event is None:
                return paths
            if event.watch is None or event.name is None or event.mask & (Mask.Q_OVERFLOW | Mask.IGNORED):
                self._discard()
                return None
            name = os.fspath(event.name)
            paths.update(os.path.join(folder, name) for folder in self._names[event.watch.wd])
        self._discard()
        return None

    def _discard(self) -> None:
        """Throw away what waits in the kernel."""
        inotify = self._inotify
        if inotify is None:
            return
        with contextlib.suppress(BlockingIOError):
            while os.read(inotify.fd, 1 << 16):
                pass
        # What was thrown away may have said that a folder is gone, and another may have its name by now.
        for folder in list(self._folders):
            try:
                self._stand_by(folder)
            except OSError:
                self._folders.discard(folder)

    def close(self) -> None:
        inotify, self._inotify = self._inotify, None
        if inotify is not None:
            inotify.close()
