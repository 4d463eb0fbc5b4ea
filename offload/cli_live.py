"""The live view of `offload run --live`: the loops and their stalls, at the bottom of the terminal.

    │ the program's own output scrolls here, as ever      │  rows 1 … n: the terminal's scroll region
    │ ── offload ── over 50 ms ── 0:12 ── 3 stalls ────── │
    │ main   ██████░░░░  43 %  ▁▂▂█▃  longest 153 ms      │  below it: ours
    │ 153 ms ×3  main  waits, clock_nanosleep  app.py:31  │

The terminal itself keeps the two apart: it scrolls a region only, so that the program's stdout stays what it was, also
for bytes that it, or a process of its, writes past Python. A redrawing of the view is one write, which puts the cursor
back where the program had it. Programs that take the whole screen for themselves do not get along with it.

One daemon thread draws, four times a second; whatever befalls it, the program goes on.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from .debug.summary import culprit, seconds, times, why

if TYPE_CHECKING:
    from .debug.record import LoopRecord, Report, Stall

INTERVAL = 0.25
WINDOW = 4  # drawings that a busy share is taken over: a second
PAST = 20  # seconds of busy shares that are shown
MOST_OFFENCES = 100
SAVE, RESTORE, WHOLE_SCREEN, ERASE_BELOW, ERASE_LINE = "\x1b7", "\x1b8", "\x1b[r", "\x1b[J", "\x1b[2K"
BLOCKS = " ▁▂▃▄▅▆▇█"


class LiveView:
    """The view: `on_stall` is for the detector, from any thread; `start` and `stop` are for one thread.

    Args:
        threshold: seconds, for the title.
    """

    def __init__(self, threshold: float) -> None:
        self._title = f"offload: loops held for over {seconds(threshold)}"
        self._console = Console(file=sys.__stderr__, highlight=False)
        self._offences: dict[Hashable, _Offence] = {}
        self._going: dict[int, Hashable] = {}  # numbers of stalls that go on
        self._stalls = 0
        self._shares: dict[str, _Share] = {}
        self._size = (0, 0)  # columns and rows for which the region is set; (0, 0): it is not
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def on_stall(self, stall: Stall) -> None:
        """Take a stall in; one that is ongoing comes again with the same number."""
        with self._lock:
            before = self._going.pop(stall.number, None)
            if before is not None and before in self._offences:
                self._offences[before].count -= 1
                if not self._offences[before].count:  # what was first thought of it was wrong, or comes again below
                    del self._offences[before]
            if stall.ongoing:
                self._going[stall.number] = stall.fingerprint
            offence = self._offences.pop(stall.fingerprint, None) or _Offence()
            offence.count += 1
            offence.last = stall
            self._offences[stall.fingerprint] = offence  # the latest last
            self._stalls = max(self._stalls, stall.number)
            if len(self._offences) > MOST_OFFENCES:
                del self._offences[next(iter(self._offences))]

    def start(self, report: Callable[[], Report]) -> None:
        """Draw from now on; `report` is asked for the state of the loops, on the view's own thread."""
        self._thread = threading.Thread(target=self._run, args=(report,), name="offload-live", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give the terminal back; waits for a drawing under way. Idempotent."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None

    def _run(self, report: Callable[[], Report]) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal has gone
            try:
                while not self._ended.wait(INTERVAL):
                    self._draw(report())
            finally:
                if self._size != (0, 0):
                    self._write(SAVE + WHOLE_SCREEN + RESTORE + ERASE_BELOW)

    def _draw(self, report: Report) -> None:
        columns, rows = os.get_terminal_size(sys.__stderr__.fileno())  # type: ignore[union-attr]
        height = min(rows // 3, 14)
        if height < 3 or columns < 20:
            return
        out = []
        top = rows - height
        if self._size != (columns, rows):
            # Room for us by scrolling, then the region; setting it moves the cursor, so the cursor is saved around it.
            out += [SAVE, WHOLE_SCREEN, RESTORE, ERASE_BELOW, "\n" * height, f"\x1b[{height}A"]
            out += [SAVE, f"\x1b[1;{top}r", RESTORE]
            self._size = (columns, rows)
        out.append(SAVE)
        for number, line in enumerate(self._lines(report, columns, height), top + 1):
            out.append(f"\x1b[{number};1H{ERASE_LINE}{line}")
        out.append(RESTORE)
        self._write("".join(out))

    def _write(self, text: str) -> None:
        stream = sys.__stderr__
        assert stream is not None, "the view is only made for a terminal"
        stream.write(text)
        stream.flush()

    def _lines(self, report: Report, columns: int, height: int) -> list[str]:
        with self._lock:
            offences = list(reversed(self._offences.values()))
            stalls = self._stalls
        for record in report.loops:
            self._shares.setdefault(record.name, _Share()).add(record)
        # The loops that are worth a line: those that have something to do, the busiest first.
        loops = sorted(report.loops, key=lambda loop: self._shares[loop.name].now, reverse=True)
        room = height - 1
        loops_room = max(1, min(len(loops), room - min(len(offences), room // 2)))
        title = Rule(
            Text(f"{self._title} · {_clock(report.duration)} · {times(stalls, 'stall')}", style="bold"),
            align="left",
            style="dim",
        )
        parts: list[RenderableType] = [title, self._loop_table(loops[:loops_room])]
        parts.append(_offence_table(offences[: room - loops_room], columns))
        with self._console.capture() as captured:
            self._console.print(Group(*parts), no_wrap=True, crop=True, width=columns)
        lines = captured.get().splitlines()[:height]
        return lines + [""] * (height - len(lines))

    def _loop_table(self, loops: list[LoopRecord]) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        for justify in ("left", "left", "right", "left", "right", "right"):
            table.add_column(justify=justify, no_wrap=True, overflow="ellipsis")
        for loop in loops:
            share = self._shares[loop.name]
            table.add_row(
                Text(loop.name, style="bold"),
                _bar(share.now),
                f"{share.now:.0%} busy",
                Text("".join(_block(value) for value in share.past), style="cyan"),
                f"longest {seconds(loop.longest)}",
                Text(f"{loop.iterations:,} turns", style="dim"),
            )
        return table


class _Share:
    """The busy share of one loop: over the last second, and second by second before."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=WINDOW + 1)
        self._drawings = 0
        self.past: deque[float] = deque(maxlen=PAST)
        self.now = 0.0

    def add(self, record: LoopRecord) -> None:
        self._seen.append((record.watched, record.busy))
        (since, before), (until, after) = self._seen[0], self._seen[-1]
        self.now = min(1.0, max(0.0, (after - before) / (until - since))) if until > since else 0.0
        self._drawings += 1
        if self._drawings % WINDOW == 0:
            self.past.append(self.now)


class _Offence:
    """All stalls of one fingerprint so far: the last of them, and how many."""

    last: Stall
    count = 0


def _offence_table(offences: list[_Offence], columns: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(justify="right", no_wrap=True, min_width=9)
    table.add_column(justify="right", no_wrap=True, min_width=4, style="dim")
    table.add_column(no_wrap=True, min_width=max((min(len(o.last.loop), 20) for o in offences), default=0))
    table.add_column(no_wrap=True, overflow="ellipsis", ratio=3)
    if columns >= 100:
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=2, style="green")
    for offence in offences:
        stall = offence.last
        style = {"fail": "bold red", "unmeasured": "yellow", "pass": "dim"}[stall.verdict]
        cells: list[RenderableType] = [
            Text(f"{'▶ ' if stall.ongoing else ''}{seconds(stall.duration)}", style=style),
            f"×{offence.count}" if offence.count > 1 else "",
            Text(stall.loop),
            Text(f"{culprit(stall)}: {why(stall)}"),
            Text(stall.advice),
        ]
        table.add_row(*cells[: len(table.columns)])
    return table


def _bar(share: float, cells: int = 12) -> Text:
    full = round(share * cells)
    colour = "green" if share < 0.5 else "yellow" if share < 0.9 else "red"
    return Text.assemble(("█" * full, colour), ("░" * (cells - full), "dim"))


def _block(share: float) -> str:
    return BLOCKS[min(len(BLOCKS) - 1, round(share * (len(BLOCKS) - 1)))]


def _clock(duration: float) -> str:
    minutes, rest = divmod(int(duration), 60)
    return f"{minutes}:{rest:02}"
