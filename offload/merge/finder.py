"""Which files a merge reads: looked up again and again, each given to the source whose file it is (`known.py`)."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ..files.series import is_segment_of
from ..files.tail import Tail
from ..files.watch import Watch
from .known import Known
from .progress import Progress
from .sources import Sources

UNNUMBERED = -1  # a source that is not in the packet file yet


class Finder:
    """For the reader's thread.

    Args:
        sources: what is wanted; can be set.
        known: whose file is whose; its tails are added to.
        progress: sources and problems are told there.
        output: the packet file, which is never a source; None: it is elsewhere.

    Attributes:
        links: what sources that are links lead to -> the source.
        taken: device and inode of the packet file as it was opened.
    """

    def __init__(self, sources: Sources, known: Known, progress: Progress, output: Path | None) -> None:
        self.sources = sources
        self.links: dict[str, str] = {}
        self.taken: tuple[int, int] | None = None
        self._known = known
        self._tails = known.tails
        self._progress = progress
        self._output = output
        self._followed_links: set[str] = set()  # sources that are links, or were

    def scan(self, watch: Watch | None, changed: Iterable[str] = ()) -> set[str]:
        """Find files that are not known yet; return the sources that have something new to read in `changed`."""
        folders = list(self.sources.folders())
        own = {self.taken, self._identity()}
        files, missing = self.sources.scan()
        self._followed_links |= {path for path in files if path not in self._tails and os.path.islink(path)}
        self.links.clear()  # what one led to before is a file that lost its name
        for path in self._followed_links:
            target = os.path.realpath(path)
            self.links[target] = path
            folders.append(os.path.dirname(target))
        if watch is not None:
            for folder in folders:
                watch.add(folder)
        for path, status in files.items():
            known = path not in self._tails and self._known.resume(path) is not None
            if known and not self._known.is_taken(path, path, (status.st_dev, status.st_ino)):
                self._add(path, status.st_size)
        late: set[str] = set()
        seen = own | {self._identity()}  # where a segment was closed meanwhile
        strangers = {path: found for path in changed if path not in files and (found := _regular(path)) is not None}
        for path, status in (files | strangers).items():
            identity = status.st_dev, status.st_ino
            if path in self._tails or identity in seen or self._known.is_held(identity):
                continue  # known; a link to a source, or the file that one is still reading under the name it had
            if self._output is not None and is_segment_of(self._output, path):
                continue
            seen.add(identity)
            try:
                owner = self._known.owner(path, status)
            except OSError as exc:
                if path in files:
                    missing[path] = exc  # not complete yet; the next look tells
                continue
            if owner is not None:
                late |= {owner[0]}
            elif path in files:
                self._add(path, status.st_size)
        self._progress.sources = len(self._tails)
        self._progress.problems.update(missing)  # before others go: whoever looks meanwhile misses none
        for path in [p for p in self._progress.problems if p not in self._tails and p not in missing]:
            del self._progress.problems[path]
        return late

    def no_longer_wanted(self) -> list[Tail]:
        """What the sources do not name any more."""
        files, _ = self.sources.scan()
        return [tail for path, tail in self._tails.items() if path not in files and not self.sources.covers(path)]

    def _identity(self) -> tuple[int, int] | None:
        """Of the packet file, which is another one in each segment."""
        status = None if self._output is None else _regular(os.fspath(self._output))
        return None if status is None else (status.st_dev, status.st_ino)

    def _add(self, path: str, size: int) -> None:
        resume = self._known.resume(path)
        self._known.add(path, UNNUMBERED if resume is None else resume.entry.source_id, size)


def _regular(path: str) -> os.stat_result | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
