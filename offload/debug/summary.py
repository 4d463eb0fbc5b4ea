"""What all forms of a report share: stalls grouped into offenders, words for people, paths and source lines.

Rules: nothing here runs while a loop is watched, only when a report or a log line is made; that is why a line of
source may be looked up here, and only here. Every function is pure but for `source`, which reads files.
"""

from __future__ import annotations

import linecache
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .record import Cause, Frame, Kind, LoopRecord, Report, Stall, Verdict


class Words(NamedTuple):
    """A cause in words: a title, and what it means."""

    title: str
    meaning: str


WORDS = {
    Cause.PYTHON: Words("Python code", "the loop's own thread computed, in Python"),
    Cause.C: Words("C code", "the loop's own thread computed, in C: one call that took long"),
    Cause.WAIT: Words("Waiting", "the loop's own thread waited in a system call"),
    Cause.LOCK: Words("Lock", "the loop's own thread waited for a lock that another thread held"),
    Cause.GIL: Words("GIL held", "another thread held the interpreter's lock, so that the loop could not run"),
    Cause.GC: Words("Garbage collection", "the garbage collector ran"),
    Cause.DESCHEDULED: Words("No processor", "the machine gave its processors to others; not the program's fault"),
    Cause.STOPPED: Words("Process stopped", "the process was stopped by a signal; not the program's fault"),
    Cause.SUSPENDED: Words("Machine asleep", "the machine slept; not the program's fault"),
    Cause.DEBUGGER: Words("Debugger", "somebody stepped through the code; not the program's fault"),
    Cause.UNKNOWN: Words("Unknown", "too little could be measured here to tell"),
}


@dataclass(frozen=True, slots=True)
class Offender:
    """All stalls of one fingerprint.

    Attributes:
        worst: the longest of them.
        stalls: all of them, in the order in which they began.
        total, p50, p99: seconds.
    """

    worst: Stall
    stalls: tuple[Stall, ...]
    total: float
    p50: float
    p99: float

    @property
    def count(self) -> int:
        return len(self.stalls)

    @property
    def verdict(self) -> Verdict:
        """The gravest of its stalls'."""
        return gravest(stall.verdict for stall in self.stalls)


def final(stalls: Iterable[Stall]) -> list[Stall]:
    """The stalls by their beginning, each once: what was said of one while it lasted gives way to its end."""
    latest: dict[int, Stall] = {}
    for stall in stalls:
        known = latest.get(stall.number)
        if known is None or known.ongoing or not stall.ongoing:
            latest[stall.number] = stall
    return sorted(latest.values(), key=lambda stall: (stall.began, stall.number))


def offenders(report: Report) -> list[Offender]:
    """The stalls grouped by fingerprint: failures before the others, each what cost most time first."""
    groups: dict[object, list[Stall]] = {}
    for stall in final(report.stalls):
        groups.setdefault(stall.fingerprint, []).append(stall)
    found = []
    for stalls in groups.values():
        durations = [stall.duration for stall in stalls]
        worst = max(stalls, key=lambda stall: stall.duration)
        p50, p99 = quantile(durations, 0.5), quantile(durations, 0.99)
        found.append(Offender(worst, tuple(stalls), math.fsum(durations), p50, p99))
    return sorted(found, key=lambda offender: (offender.verdict is not Verdict.FAIL, -offender.total))


def merged(loops: Iterable[LoopRecord]) -> list[LoopRecord]:
    """The loops with those of the same name added up, sorted by name."""
    by_name: dict[str, LoopRecord] = {}
    for loop in loops:
        other = by_name.get(loop.name)
        by_name[loop.name] = _added(other, loop) if other else loop
    return [by_name[name] for name in sorted(by_name)]


def _added(one: LoopRecord, other: LoopRecord) -> LoopRecord:
    size = max(len(one.histogram), len(other.histogram))
    counts = [histogram + (0,) * (size - len(histogram)) for histogram in (one.histogram, other.histogram)]
    return LoopRecord(
        name=one.name,
        thread=one.thread,
        resource=one.resource,
        precision=one.precision if one.precision == other.precision else "mixed",
        iterations=one.iterations + other.iterations,
        busy=one.busy + other.busy,
        watched=one.watched + other.watched,
        longest=max(one.longest, other.longest),
        histogram=tuple(map(sum, zip(*counts, strict=True))),
        timeline=tuple(sorted(one.timeline + other.timeline)),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that is not exceeded by that share of them (nearest rank)."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def gravest(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL before UNMEASURED before PASS; PASS for none."""
    found = set(verdicts)
    return next((v for v in (Verdict.FAIL, Verdict.UNMEASURED) if v in found), Verdict.PASS)


def seconds(value: float) -> str:
    """A duration for people, in three digits: "152 ms", "1.23 s", "2 min 5 s"."""
    if value < 0.9995:
        thousandths = value * 1000
        return f"{thousandths:.0f} ms" if thousandths >= 9.95 else f"{thousandths:.1f} ms"
    if value < 9.995:
        return f"{value:.2f} s"
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def times(count: int, noun: str) -> str:
    """ "1 stall", "1,234 stalls"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def headline(report: Report) -> str:
    """The session in one sentence, without a full stop."""
    stalls = final(report.stalls)
    if not stalls:
        return f"no stall over {seconds(report.threshold)} in {seconds(report.duration)}"
    lost = f", and {report.lost:,} more that were not kept" if report.lost else ""
    total = math.fsum(stall.duration for stall in stalls)
    return f"{times(len(stalls), 'stall')}, {seconds(total)} in all{lost}"


def why(stall: Stall) -> str:
    """The cause as part of a sentence: "waiting in os.fsync, fsync(7)"."""
    if stall.kind is Kind.SATURATED:
        return f"saturated by {times(stall.callbacks, 'callback')} in one turn"
    called = f" in {stall.call}" if stall.call else ""
    system = f" in {stall.syscall or 'a system call'}"
    match stall.cause:
        case Cause.PYTHON:
            return f"computing in Python{called}"
        case Cause.C:
            return f"computing in C{called}"
        case Cause.WAIT:
            return f"waiting{called}, {stall.syscall}" if called and stall.syscall else f"waiting{called or system}"
        case Cause.LOCK:
            return f"waiting for a lock{called}"
        case Cause.GIL:
            return f"the GIL was held by {where(stall.holder)}" if stall.holder else "another thread held the GIL"
        case Cause.GC:
            return "collecting garbage"
        case Cause.DESCHEDULED:
            return "without a processor"
        case Cause.STOPPED:
            return "the process was stopped"
        case Cause.SUSPENDED:
            return "the machine slept"
        case Cause.DEBUGGER:
            return "in a debugger"
        case Cause.UNKNOWN:
            return "cause unknown"


def culprit(stall: Stall) -> str:
    """What to call the stall's place: the blamed line, else its callback, else its coroutine or task."""
    if stall.frame:
        return where(stall.frame)
    return stall.callback or stall.coroutine or stall.task or "no line was seen"


def where(frame: Frame) -> str:
    """ "app/db.py:88 in Store.save"."""
    return f"{short(frame.file)}:{frame.line} in {frame.function}"


def short(file: str) -> str:
    """The path as people know it: from the working directory, or from where Python imports; else as it is."""
    imported_from = (path.rstrip(os.sep) + os.sep for path in sorted(sys.path, key=len, reverse=True) if path)
    for prefix in (working_folder(), *imported_from):
        if prefix and file.startswith(prefix):
            return file[len(prefix) :]
    return file


def working_folder() -> str:
    """With a separator at its end; "": it was removed under us."""
    try:
        return os.path.join(os.getcwd(), "")
    except OSError:
        return ""


def source(frame: Frame, around: int = 0) -> list[tuple[int, str]]:
    """The frame's line of source with so many lines on either side, as pairs of number and text; [] if not found."""
    first, last = max(1, frame.line - around), frame.line + around
    lines = [(number, _line(frame.file, number).rstrip()) for number in range(first, last + 1)]
    if not any(number == frame.line and text for number, text in lines):
        return []
    while lines and not lines[0][1]:
        del lines[0]
    while lines and not lines[-1][1]:
        del lines[-1]
    return lines


def source_line(frame: Frame | None) -> str:
    """The frame's line of source, stripped; "" if it is not found."""
    return _line(frame.file, frame.line).strip() if frame else ""


def _line(file: str, number: int) -> str:
    try:
        return linecache.getline(file, number)
    except ValueError:  # a name that no file can have, such as one with a null byte
        return ""


def below_loop(stack: Sequence[Frame]) -> Sequence[Frame]:
    """The part of a stack that the loop called: without what started the loop, and without its own frames."""
    for index in range(len(stack) - 1, -1, -1):
        file, _, function = stack[index]
        if function.endswith(("Handle._run", "_run_once")) and "asyncio" in file:
            return stack[index + 1 :] or stack
    return stack


def weighted(stall: Stall) -> list[tuple[Sequence[Frame], float]]:
    """The sampled stacks, below the loop, each with its share of the stall in seconds; [] if there was no sample."""
    samples = sum(count for _, count in stall.stacks)
    if samples:
        return [(below_loop(stack), stall.duration * count / samples) for stack, count in stall.stacks]
    stack = stall.stack or ((stall.frame,) if stall.frame else ())
    return [(below_loop(stack), stall.duration)] if stack else []
