"""Which files in some folders have changed: inotify where the system has it, else time.

Promises: a change is reported, or "anything may have changed" is; never nothing. inotify's queue may overflow, and a
burst of events costs more to read than to look: both end in "anything". Folders where inotify does not tell (on network
mounts, which do not report what another machine wrote; where no watch could be had; where a change was missed before)
are listed again and again and compared, while the others keep inotify. Whoever uses this looks at everything now and
then anyway.

asyncinotify is imported when the first folder is watched: it costs as much as the rest of the program's start.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
from collections import Counter
from typing import TYPE_CHECKING

from .mounts import MOUNTINFO, network_mount

if TYPE_CHECKING:
    from asyncinotify import Inotify

# Past this many events looking at all files is cheaper than reading on (10 µs an event, 2 µs a stat).
_MANY = 64
_STRIKES = 2  # a file's time may be put back, which looks like a change that nobody told of


class Watch:
    """Changes in folders; for one loop.

    Args:
        poll: do not use inotify at all.
        interval: seconds between two looks where there is no inotify.
        mountinfo: the system's list of mounts.
    """

    def __init__(self, *, poll: bool = False, interval: float = 0.1, mountinfo: str = MOUNTINFO) -> None:
        self._interval = interval
        self._always_poll = poll or sys.platform != "linux"
        self._inotify: Inotify | None = None
        self._poll = self._always_poll
        self._mountinfo = mountinfo
        self._folders: dict[str, int] = {}  # -> the device that each is on
        self._polled: dict[str, dict[str, Stamp]] = {}  # folders -> paths in them as of the last look
        self._strikes: Counter[str] = Counter()
        self._names: dict[int, set[str]] = {}  # of each watch: links make it more than one
        self._changed = asyncio.Event()
        self._missed = False

    @property
    def polls(self) -> bool:
        """Whether some folder is looked at by time."""
        return bool(self._polled)

    @property
    def polled(self) -> list[str]:
        """The folders that are looked at by time."""
        return list(self._polled)

    def add(self, folder: str) -> None:
        """Watch a folder too; one that inotify cannot watch, or would say nothing of, is looked at by time."""
        try:
            status = os.stat(folder)
            device = status.st_dev if stat.S_ISDIR(status.st_mode) else -1
        except OSError:
            device = -1
        if self._folders.get(folder) == device:
            return  # and no other was mounted there
        self._folders[folder] = device
        self._polled.pop(folder, None)
        self._missed = True  # what happened before the watch stood
        if self._poll or network_mount(os.path.realpath(folder), self._mountinfo) is not None:
            self._polled[folder] = _list(folder)
            return
        try:
            self._stand_by(folder)
        except OSError:
            # No instances or watches left, or no such folder (any more).
            self._polled[folder] = _list(folder)

    def distrust(self, folder: str) -> bool:
        """A change in this folder was found that nobody had told of; the second time, it is looked at by time.

        Returns:
            Whether it is from now on.
        """
        self._strikes[folder] += 1
        if folder not in self._folders or folder in self._polled or self._strikes[folder] < _STRIKES:
            return False
        self._polled[folder] = _list(folder)
        self._missed = True
        return True

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
        if self._polled or self._poll:
            longest = min(longest, self._interval)
        if inotify is not None:
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
        paths = self._compare()
        if self._missed:
            self._missed = False
            self._discard()
            return None
        if self._inotify is None:
            return paths
        from asyncinotify import Mask

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

    def _compare(self) -> set[str]:
        """Paths in the polled folders that are not as they were."""
        changed: set[str] = set()
        for folder, before in self._polled.items():
            now = self._polled[folder] = _list(folder)
            if now != before:
                changed |= {path for path in now.keys() | before.keys() if now.get(path) != before.get(path)}
        return changed

    def _discard(self) -> None:
        """Throw away what waits in the kernel."""
        inotify = self._inotify
        if inotify is None:
            return
        with contextlib.suppress(BlockingIOError):
            while os.read(inotify.fd, 1 << 16):
                pass
        # What was thrown away may have said that a folder is gone, and another may have its name by now.
        for folder in [folder for folder in self._folders if folder not in self._polled]:
            try:
                self._stand_by(folder)
            except OSError:
                del self._folders[folder]

    def forget(self) -> None:
        """Watch no folder any more; anything may have changed."""
        self.close()
        self._folders.clear()
        self._polled.clear()
        self._names.clear()
        self._poll, self._missed = self._always_poll, True

    def close(self) -> None:
        inotify, self._inotify = self._inotify, None
        if inotify is not None:
            inotify.close()


Stamp = tuple[int, int, int]


def _list(folder: str) -> dict[str, Stamp]:
    """The paths in a folder, with inode, size and time of the last change of what each leads to."""
    found: dict[str, Stamp] = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                # A link by where it leads; not the entry's own `stat`, which on Windows is of when it was listed.
                status = os.stat(entry.path)
                found[entry.path] = status.st_ino, status.st_size, status.st_mtime_ns
    return found
