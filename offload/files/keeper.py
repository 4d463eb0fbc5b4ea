"""What becomes of closed segments: they are packed, and the oldest are removed. On a thread of its own.

    writer's thread                     keeper's thread
    ───────────────                     ───────────────
    a segment is closed ──── wake ────► pack a block, pack a block, … ─► name, folder, the plain one goes
                                        remove what is too much or too old

Promises:
    - The writer never waits for it, but when it closes: then the segment that is being packed is packed to its end, and
      others while `at_close` seconds have not passed. What is left is packed at the next start.
    - Killed or cut off at any moment, each segment is there whole, plain or packed or both; the next start goes on.
    - The live file is never touched, nor a segment before it is closed and on the disk.
    - The oldest goes first, and is gone on the disk before the next one goes: none is ever missing in the middle.

What cannot be packed or removed (a full disk, a read-only folder) is logged, and tried again when the next one is
closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import OffloadError
from ..loops import LoopThread
from .append import sync_folder
from .seekable import Packed, pack
from .segments import Segments
from .series import PACKED, sealed_segments, segment_path

log = logging.getLogger("offload")

AT_CLOSE = 5.0
_LONGEST = 3600.0  # seconds between two looks at what is too old
_PART = ".part"


class Keeper:
    """Packs and removes the closed segments of a packet file. For the writer's thread.

    Args:
        live: the packet file.
        segments: `compress`, `keep_bytes`, `keep_age`.
        upto: number of the newest closed segment; -1: none.
    """

    def __init__(self, live: Path, segments: Segments, upto: int, *, at_close: float = AT_CLOSE) -> None:
        self._live = live
        self._segments = segments
        self._upto = upto
        self._at_close = at_close
        self._thread = LoopThread(f"segments {live.name}", on_close=self._finish)
        self._packing: Iterator[None] | None = None
        self._refused: set[int] = set()  # could not be packed, since the last one was closed
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, with what runs before have left."""
        self._thread.__enter__()
        self._thread.post(self._begin)

    def sealed(self, number: int) -> None:
        """This segment has been closed."""
        self._upto = number
        with contextlib.suppress(OffloadError):  # its thread is gone: the next start does it
            self._thread.post(self._wake)

    def resegment(self, segments: Segments) -> None:
        """Keep them by other rules from now on."""

        def change() -> None:
            self._segments = segments
            self._wake()

        with contextlib.suppress(OffloadError):  # its thread is gone
            self._thread.post(change)

    def close(self) -> None:
        """Return when it has ended."""
        self._thread.close()

    # --- on the keeper's thread ---------------------------------------------------------------------------------------

    def _begin(self) -> None:
        pattern = rf"\.{re.escape(self._live.stem)}\.\d{{6,}}{re.escape(self._live.suffix + PACKED + _PART)}"
        with _told("clean up"):
            for name in os.listdir(self._live.parent):
                if re.fullmatch(pattern, name):
                    os.unlink(self._live.with_name(name))
        self._wake()

    def _wake(self) -> None:
        self._refused.clear()
        if self._packing is None:
            self._go_on()

    def _go_on(self) -> None:
        """A step; the next one is a call of its own, so that closing gets its turn."""
        if self._step():
            with contextlib.suppress(OffloadError):  # closing; `_finish` goes on
                self._thread.post(self._go_on)
        else:
            self._look_later()

    def _step(self) -> bool:
        """Pack a block, or begin with the next segment; False: there is nothing left to do."""
        if self._packing is None:
            number = self._unpacked()
            if number is None:
                self._retain()
                return False
            self._packing = self._pack(number)
        try:
            next(self._packing)
        except StopIteration:
            self._packing = None
            self._retain()
        return True

    def _unpacked(self) -> int | None:
        """The oldest segment that is to be packed."""
        if not self._segments.compress:
            return None
        with _told("list"):
            for number, path in sealed_segments(self._live).items():
                if number <= self._upto and number not in self._refused and not path.name.endswith(PACKED):
                    return number
        return None

    def _pack(self, number: int) -> Iterator[None]:
        path = segment_path(self._live, number)
        target = path.with_name(path.name + PACKED)
        try:
            if _is_packed(path, target):  # by a run that was ended before it could remove the plain one
                sync_folder(path.parent)
                os.unlink(path)
            else:
                yield from pack(path, target, path.with_name(f".{target.name}{_PART}"))
        except OSError as exc:
            self._refused.add(number)
            log.warning("segment %s could not be packed, and stays as it is: %s", path, exc)

    def _retain(self) -> None:
        """Remove the oldest segments, as long as they are too many or too old."""
        most, age = self._segments.keep_bytes, self._segments.keep_age
        if most is None and age is None:
            return
        with _told("remove"):
            found: list[tuple[int, list[Path], int, float]] = []
            for number in sealed_segments(self._live):
                if number <= self._upto:
                    path = segment_path(self._live, number)
                    paths = [p for p in (path, path.with_name(path.name + PACKED)) if p.exists()]
                    stats = [p.stat() for p in paths]
                    found.append((number, paths, sum(s.st_size for s in stats), max(s.st_mtime for s in stats)))
            total, now = sum(size for _, _, size, _ in found), time.time()
            for _, paths, size, sealed in found:
                if not ((most is not None and total > most) or (age is not None and now - sealed > age)):
                    break
                for path in paths:
                    os.unlink(path)
                sync_folder(self._live.parent)
                total -= size

    def _look_later(self) -> None:
        """See again when the oldest one has become too old."""
        if self._timer is not None:
            self._timer.cancel()
        age = self._segments.keep_age
        if age is None:
            return
        later = _LONGEST
        with _told("list"):
            for number, path in sealed_segments(self._live).items():
                if number <= self._upto:
                    later = max(0.0, age - (time.time() - path.stat().st_mtime)) + 0.01
                    break
        self._timer = asyncio.get_running_loop().call_later(min(later, _LONGEST), self._wake)

    def _finish(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        deadline = time.monotonic() + self._at_close
        while (self._packing is not None or time.monotonic() < deadline) and self._step():
            pass


def _is_packed(path: Path, target: Path) -> bool:
    try:
        packed = Packed(target)
    except OSError:
        return False
    try:
        return packed.size() == path.stat().st_size
    finally:
        packed.close()


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        log.warning("could not %s closed segments: %s", what, exc)
