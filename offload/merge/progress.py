"""How far a merge is, and what it does when the disk is full."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..files.frame_file import Durable
from ..files.packet_file import PacketFile
from ..files.tail import Tail, Unread
from .repair import Repair

_FIRST_LOOK, _LOOK = 0.05, 1.0  # seconds between two tries of a write that found no room; doubled from one to the other


@dataclass
class Progress:
    """How far a merge is; written by its reader, read by anybody.

    Attributes:
        sources: files found.
        lines, bytes: handed to the packet file in this run.
        gaps: stretches that nobody can read any more.
        regressions: how often a source was found shorter than what was read of it, as after a power cut.
        late: of a merge by time, lines that were written behind one with a later time.
        problems: path -> why it is not read.
        copies: path -> source that has all of it, as far as anybody can tell until one of them is written to.
        caught_up: everything that was there at the last look is read.
        held_bytes: unread in files that are open and that no name leads to any more, as of the last look: room on the
            disk that somebody freed and that is not free.
        unreported: how often a look found what had been written a second ago or more, and what no event had told of.
        full: what the system said, while the merge waits for room on the disk, or for a descriptor for its next
            segment; otherwise None.
        damaged, repair: the packet file was damaged where the merge goes on, and was written anew: the name that the
            damaged one has now, and what was done. Otherwise None.
        waits: how often it began to wait for room.
    """

    sources: int = 0
    lines: int = 0
    bytes: int = 0
    gaps: int = 0
    regressions: int = 0
    late: int = 0
    problems: dict[str, OSError] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    caught_up: bool = False
    held_bytes: int = 0
    unreported: int = 0
    full: OSError | None = None
    damaged: Path | None = None
    repair: Repair | None = None
    waits: int = 0
    started: float = field(default_factory=time.monotonic)
    _tails: dict[str, Tail] = field(default_factory=dict)
    _ended: float = 0.0
    _file: PacketFile | None = None

    @property
    def seconds(self) -> float:
        """How long the run has taken."""
        return (self._ended or time.monotonic()) - self.started

    def ended(self) -> None:
        self._ended = time.monotonic()

    @property
    def lag_bytes(self) -> int:
        """Bytes that are in the sources and not read, as of the last look."""
        return sum(tail.lag for tail in list(self._tails.values()))

    @property
    def durable(self) -> Durable | None:
        """Up to where the packet file is known to be on the disk; None: it is not open, or not on this machine."""
        return None if self._file is None else self._file.durable

    @property
    def segment(self) -> int:
        """Number of the packet file's present segment."""
        info = None if self._file is None else self._file.ledger.info
        return 0 if info is None else info.segment

    @property
    def total_lines(self) -> int:
        """Lines in the packet file's present segment, those of earlier runs too."""
        return self.lines if self._file is None else self._file.ledger.total_lines

    def opened(self, file: object) -> None:
        """This is written."""
        if isinstance(file, PacketFile):
            self._file = file

    def unread(self) -> dict[str, Unread]:
        """What is there now and not read, for each source: path -> bytes. Costs a system call a source."""
        return {path: tail.measure() for path, tail in list(self._tails.items())}


class Patience:
    """Waits for room on the disk: what a PacketFile calls when there is none (its `full`), on the writer's thread.

    Meanwhile the packet file ends with a whole frame, and nothing is read once the arenas are full: the sources are the
    buffer.

    Args:
        progress: `full` is set while it waits.
        tell: called with the error as it begins to wait, with None as the merge goes on.
    """

    def __init__(self, progress: Progress, tell: Callable[[OSError | None], object] | None) -> None:
        self._progress = progress
        self._tell = tell
        self._over = threading.Event()
        self._pause = _FIRST_LOOK

    def __call__(self, error: OSError | None) -> bool:
        """Wait a moment; False: nobody waits any more. With None: there was room."""
        if error is not None and self._over.is_set():
            return False
        if (error is None) != (self._progress.full is None):
            self._progress.full = error
            self._progress.waits += error is not None
            self._pause = _FIRST_LOOK
            if self._tell is not None:
                self._tell(error)
        if error is None:
            return True
        pause, self._pause = self._pause, min(_LOOK, 2 * self._pause)
        return not self._over.wait(pause)

    def end(self) -> None:
        """Wait no more, from now on; from any thread."""
        self._over.set()
