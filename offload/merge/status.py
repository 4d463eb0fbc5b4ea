"""What a merge that follows tells of itself: a small file beside the packet file, which `offload status` reads.

It is no state: nothing ever reads it to go on, it is not synced, and a merge that cannot write it goes on without. A
file rather than a socket: it can still be read when the merge is dead or stuck, and says what it did last; nobody has
to answer; whoever may read it needs no other right; and a scraper needs no connection.

    merge ── each second ──► merged.opk.status.tmp ── rename ──► merged.opk.status ──► offload status, a scraper

Promises:
    - Whoever reads it sees all of one status, never a half.
    - It is called current only while the process that wrote it lives (its number and when it began agree) and somebody
      holds the packet file's lock. Otherwise `from_packet_file` says what the packet file itself knows.
    - `durable` is what an fsync has proved (`PacketFile.durable`), never what was only written.
    - Seconds of lag are the age of the oldest byte that is not read, as far as looks each second can tell.

Keys: see `snapshot`; numbers are bytes, seconds, Unix seconds, counts. Nothing here prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from ..files.frame_source import FrameSource
from ..files.tail import Unread
from .progress import Progress
from .settings import status_beside

VERSION = 1
EVERY = 1.0  # seconds between two
_EVERY_PER_SOURCE = 0.002  # … more for many sources: to ask and to tell of one costs some 10 µs
_QUIET = 60.0  # … between two that say the same: of a thousand sources that rest, one costs 20 ms
_MARKS = 64


class _Lag:
    """How long the oldest unread byte of a source has been there: where its file ended at each look."""

    __slots__ = ("file", "marks")

    def __init__(self) -> None:
        self.file: tuple[int, int] | None = None
        self.marks: deque[tuple[float, int]] = deque()

    def seconds(self, unread: Unread, now: float) -> float:
        if unread.file != self.file:
            self.file = unread.file
            self.marks = deque((since, 0) for since, _ in list(self.marks)[:1])  # of the file before: still unread
        at = unread.end - unread.lag  # all before it is read
        while self.marks and (not unread.lag or 0 < self.marks[0][1] <= at):
            self.marks.popleft()
        if not unread.lag:
            return 0.0
        if self.marks and not self.marks[0][1]:  # what came from the file before is over once this one is being read
            since, _ = self.marks.popleft()
            self.marks.appendleft((since, unread.end))
        elif not self.marks or self.marks[-1][1] < unread.end:
            self.marks.append((now, unread.end))
        if len(self.marks) > _MARKS:
            self.marks = deque(mark for number, mark in enumerate(self.marks) if number % 2 == 0)
        return now - self.marks[0][0]


class Teller:
    """Makes and writes the status of one merge; for one thread.

    Args:
        output: the packet file.
        progress: of the merge.
    """

    def __init__(self, output: str | os.PathLike[str], progress: Progress) -> None:
        self._output = os.path.abspath(output)
        self._progress = progress
        self._began = time.time()
        self._before: tuple[float, int, int] | None = None
        self._rates = 0.0, 0.0
        self._lags: dict[str, _Lag] = {}
        self._told: tuple[object, ...] = ()
        self._told_at = 0.0

    def due(self) -> bool:
        """Whether it would say anything new, or has not been said for long."""
        return bool(
            self._told != self._key() or any(self._rates) or self._lags or time.monotonic() - self._told_at > _QUIET
        )

    def _key(self) -> tuple[object, ...]:
        """What is different whenever anything is; costs little."""
        p = self._progress
        seen = p.lines, p.bytes, p.gaps, p.waits, p.full, p.sources, p.caught_up, p.lag_bytes, p.segment
        return *seen, p.durable, tuple(p.problems), len(p.copies)

    @property
    def every(self) -> float:
        """Seconds until the next is due."""
        return max(EVERY, _EVERY_PER_SOURCE * self._progress.sources)

    def snapshot(self, *, running: bool = True) -> dict[str, Any]:
        """The status now; its keys:

        version, pid, process, began, time, running, output; sources: path, lag_bytes, lag_seconds, held_bytes of each;
        lag_bytes, lag_seconds (the longest), held_bytes; lines, bytes, lines_per_second, bytes_per_second of this run;
        total_lines in the file; durable: upto, lines, time; gaps, late, waits; full: what the disk said, while it waits
        for room; segment; caught_up; problems: path -> why it is not read; copies.
        """
        progress, now = self._progress, time.monotonic()
        self._told, self._told_at = self._key(), now
        lines, size = self._measure(now)
        durable = progress.durable
        # First, so that what is counted came from sources that are told of: others go on reading.
        counts = {
            "lines": progress.lines,
            "bytes": progress.bytes,
            "lines_per_second": round(lines, 3),
            "bytes_per_second": round(size, 3),
            "total_lines": progress.total_lines,
            "durable": durable and {"upto": durable.upto, "lines": durable.lines, "time": durable.time},
            "gaps": progress.gaps,
            "late": getattr(progress, "late", None),
            "waits": progress.waits,
        }
        unread = progress.unread()
        sources: list[dict[str, Any]] = []
        for path, found in sorted(unread.items()):
            lag = self._lags.get(path)
            if lag is None and found.lag:
                lag = self._lags[path] = _Lag()
            seconds = 0.0 if lag is None else lag.seconds(found, now)
            told = {"path": path, "lag_bytes": found.lag, "lag_seconds": round(seconds, 3), "held_bytes": found.held}
            sources.append(told)
        self._lags = {path: lag for path, lag in self._lags.items() if lag.marks and path in unread}
        return {
            "version": VERSION,
            "pid": os.getpid(),
            "process": began(os.getpid()),
            "began": self._began,
            "time": time.time(),
            "running": running,
            "output": self._output,
            "lag_bytes": sum(s["lag_bytes"] for s in sources),
            "lag_seconds": max((s["lag_seconds"] for s in sources), default=0.0),
            "held_bytes": sum(s["held_bytes"] for s in sources),
            **counts,
            "full": None if progress.full is None else progress.full.strerror or str(progress.full),
            "segment": progress.segment,
            "caught_up": progress.caught_up,
            "problems": {p: exc.strerror or str(exc) for p, exc in sorted(progress.problems.copy().items())},
            "copies": progress.copies.copy(),
            "sources": sources,
        }

    def _measure(self, now: float) -> tuple[float, float]:
        """Lines and bytes a second since the time before."""
        lines, size = self._progress.lines, self._progress.bytes
        if self._before is not None and now - self._before[0] > 0.01:
            passed = now - self._before[0]
            self._rates = (lines - self._before[1]) / passed, (size - self._before[2]) / passed
        self._before = now, lines, size
        return self._rates

    def write(self, path: Path, *, running: bool = True) -> None:
        """Write it, whole or not at all. Raises OSError: it cannot be written there."""
        beside = path.with_name(f".{path.name}.tmp")  # hidden: never taken for a log
        try:
            beside.write_text(json.dumps(self.snapshot(running=running)) + "\n", encoding="ascii")
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def began(pid: int) -> str | None:
    """What tells a process from another that gets its number later; None: the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            ticks = file.read().rpartition(b")")[2].split()[19].decode()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}:{ticks}"
    except (OSError, IndexError, UnicodeDecodeError):
        return None


def read_status(output: Path, status: Path | None = None) -> dict[str, Any]:
    """What is known of the merge into a packet file.

    Returns:
        The keys of `Teller.snapshot`, as far as known, with `running`: whether anybody writes the packet file now, and
        `current`: whether the rest was told by who does.

    Raises:
        OSError: the packet file cannot be read. PacketError: it is none.
    """
    with FrameSource(output) as source:
        running = source.is_being_written()
        told = _told(status_beside(output) if status is None else status)
        if running and told is not None and told.get("running") and _lives(told):
            return told | {"running": True, "current": True}
        return _from_packet_file(source, os.path.abspath(output)) | {"running": running, "current": False}


def _told(path: Path) -> dict[str, Any] | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return told if isinstance(told, dict) and told.get("version") == VERSION else None


def _lives(told: dict[str, Any]) -> bool:
    pid = told.get("pid")
    process = began(pid) if isinstance(pid, int) else None
    if process is not None or os.path.isdir("/proc/self"):
        return process is not None and process == told.get("process")
    return time.time() - float(told.get("time", 0.0)) < 2 * _QUIET  # no way to ask: what is old is not believed


def _from_packet_file(source: FrameSource, output: str) -> dict[str, Any]:
    """What a packet file says when nobody tells more: how far it has each source, against the files as they are."""
    recovery = source.series.recover()
    ledger = recovery.ledger
    sources = []
    for state in ledger.sources.values():
        path, lag = os.fsdecode(state.path), None
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            same = (status.st_dev, status.st_ino) == (state.info.device, state.info.inode)
            lag = max(0, status.st_size - state.resume_off) if same and not state.info.compression else None
        sources.append({"path": path, "lag_bytes": lag, "lag_seconds": None, "held_bytes": None})
    sources.sort(key=lambda told: str(told["path"]))
    return {
        "version": VERSION,
        "output": output,
        "total_lines": ledger.total_lines,
        "durable": {"upto": ledger.durable_upto, "lines": None, "time": None},
        "torn_bytes": recovery.torn,
        "segment": 0 if ledger.info is None else ledger.info.segment,
        "sources": sources,
        "lag_bytes": sum(told["lag_bytes"] or 0 for told in sources),
        "problems": {},
    }


# --- Prometheus -------------------------------------------------------------------------------------------------------

_ONE = (  # key of the status, metric, type, help
    ("running", "up", "gauge", "Whether somebody writes the packet file now."),
    ("began", "start_time_seconds", "gauge", "When the merge began, in Unix seconds."),
    ("time", "status_timestamp_seconds", "gauge", "When it told this, in Unix seconds."),
    ("lines", "lines_total", "counter", "Lines merged since the merge began."),
    ("bytes", "bytes_total", "counter", "Bytes of sources merged since the merge began."),
    ("gaps", "gaps_total", "counter", "Stretches of sources that nobody could read any more."),
    ("late", "late_lines_total", "counter", "Lines that came too late to stand in the order of time."),
    ("waits", "waits_total", "counter", "How often the merge began to wait for room on the disk."),
    ("full", "waiting_for_room", "gauge", "Whether it waits for room on the disk now."),
    ("total_lines", "file_lines", "gauge", "Lines in the packet file's present segment."),
    ("segment", "segment", "gauge", "Number of the present segment."),
)
_DURABLE = (
    ("upto", "durable_bytes", "Bytes of the packet file that are known to be on the disk."),
    ("lines", "durable_lines", "Lines of the packet file that are known to be on the disk."),
    ("time", "durable_timestamp_seconds", "When that was last proved, in Unix seconds."),
)
_EACH = (
    ("lag_bytes", "source_lag_bytes", "Bytes of a source that are there and not read."),
    ("lag_seconds", "source_lag_seconds", "For how long the oldest of them have been there."),
    ("held_bytes", "source_held_bytes", "Those of them in deleted files, which only the merge keeps."),
)


def prometheus(told: dict[str, Any]) -> str:
    """The status as text for Prometheus (text exposition format 0.0.4); what is not known is left out."""
    file = {"file": told["output"]}
    lines: list[str] = []

    def family(name: str, kind: str, help: str, samples: list[tuple[dict[str, str], float]]) -> None:
        if samples:
            lines.append(f"# HELP offload_merge_{name} {help}")
            lines.append(f"# TYPE offload_merge_{name} {kind}")
            for labels, value in samples:
                inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
                lines.append(f"offload_merge_{name}{{{inside}}} {value!r}")

    for key, name, kind, help in _ONE:
        value = told.get(key)
        if key == "full" and key in told:
            value = value is not None
        family(name, kind, help, [] if value is None else [(file, value + 0)])
    for key, name, help in _DURABLE:
        value = (told.get("durable") or {}).get(key)
        family(name, "gauge", help, [] if value is None else [(file, value)])
    for key, name, help in _EACH:
        each = [(file | {"source": s["path"]}, s[key]) for s in told["sources"] if s.get(key) is not None]
        family(name, "gauge", help, each)
    problems = [(file | {"source": path, "reason": reason}, 1) for path, reason in told["problems"].items()]
    family("source_problem", "gauge", "A source that is not read, and why.", list(problems))
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    # A name may be any bytes, and the format is UTF-8.
    clean = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return clean.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
