"""Why a loop did not turn: clocks of its thread, read from another, and what they say.

    the watchdog's thread, at every tick                                          when a stall has ended
    sys._current_frames() ─► Machine.read() ─► Probe.read(moment) ─► Probe.syscall()    classify(Window) ─► Diagnosis
    (first of all)           once for all      once a loop           once half over
                                                                     the threshold
`classify` is a function of what `Machine` and `Probe` read (see clocks.py). All times are seconds of `perf_counter`.

How the causes are told apart. The stretch between two readings is accounted on its own, as far as it overlaps the
stall:
    - The kernel tells how long the thread ran, and how long it was ready but had no processor (schedstat).
    - A thread that waits for the GIL wakes every switch interval to ask for it; one that sleeps in a system call does
      not. So the number of times a thread was put on a processor tells the two apart, though both wait in a futex.
    - Likewise for the watchdog: if it was late, without a processor to wait for, it either asked for the GIL all the
      time (somebody held it) or did not run at all (the process was stopped).
    - The watchdog gets the GIL at once from a thread that released it, after a switch interval from one that computes
      in Python, and when a call in C ends that holds it. So its lateness tells what the loop's thread computed in.

What is not the program's fault (the machine was starved, slept, or stopped the process) is named if without it there
would have been no stall, or if it was most of it.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .clocks import GC_SECONDS_A_BLOCK, Moment, Reading, is_debugger
from .record import Cause, Frame, Numbers, Verdict

# A thread that shares its processor with one other waits half of the time; that is no excuse for code that takes
# several thresholds alone. With more of them it is: then its own CPU time grows too (shared caches, hyper-threads),
# though not without end. The two numbers are guesses.
STARVED = 0.55
STARVED_THRESHOLDS = 2
SHORTEST = 0.01  # seconds of something else than the program, below which they are no excuse: clocks are not that exact


class Sample(NamedTuple):
    """What one look at a thread's stack in the middle of a stall gave."""

    at: float  # perf_counter, of the moment its frames were taken
    stack: Sequence[Frame] = ()  # outermost first
    syscall: str | None = None  # as `Probe.syscall` gave it; None if the stall had ended by then
    others: Mapping[int, Frame] = {}  # innermost line of every other thread, by ident
    traced: bool = False  # as `traced` gave it
    call: str | None = None  # as `callee.called` gave it for the innermost frame, below which is a function in C
    collecting: bool = False  # whether `stack.program` took a frame away


@dataclass(frozen=True, slots=True)
class Window:
    """All that is known of one stall.

    Attributes:
        began, ended: perf_counter.
        threshold: seconds.
        readings: in order; the last one from before `began`, those in between, and the first from after `ended`. Fewer
            are fine, they only tell less.
        samples: in order.
        ident: of the loop's thread, so that it is not taken for another.
    """

    began: float
    ended: float
    threshold: float
    readings: Sequence[Reading] = ()
    samples: Sequence[Sample] = ()
    ident: int = 0


class Diagnosis(NamedTuple):
    """What `classify` found. `verdict` is FAIL or UNMEASURED; that a stall is allowed, the caller knows."""

    cause: Cause
    numbers: Numbers
    syscall: str | None = None
    holder: Frame | None = None
    verdict: Verdict = Verdict.FAIL


def classify(window: Window) -> Diagnosis:
    """The cause of a stall, where its time went, and whether it can be held against the program.

    Any thread. In this order: suspended, stopped, debugger, descheduled, garbage collection, and then the largest of
    waiting for the GIL, waiting, computing.
    """
    duration = max(window.ended - window.began, 0.0)
    switch = sys.getswitchinterval()
    stretches = _stretches(window)
    moments = [reading.moment for reading in window.readings]
    samples = window.samples
    share = _Share(stretches, switch)
    numbers = share.numbers(moments, duration)

    def diagnosis(cause: Cause, syscall: str | None = None, holder: Frame | None = None) -> Diagnosis:
        known = bool(stretches) and sum(one.seconds for one in stretches) >= duration / 2
        fair = cause.by_code and known and not any(m.attached or m.patched for m in moments)
        return Diagnosis(cause, numbers, syscall, holder, Verdict.FAIL if fair else Verdict.UNMEASURED)

    def excuses(part: float) -> bool:
        return part > SHORTEST and (part >= duration / 2 or duration - part < window.threshold)

    if len(moments) > 1 and excuses(_difference(moments[0].asleep, moments[-1].asleep)):
        return diagnosis(Cause.SUSPENDED)
    if excuses(share.stopped):
        return diagnosis(Cause.STOPPED)
    if any(s.traced or _steps(s.stack) for s in samples):
        return diagnosis(Cause.DEBUGGER)
    if _starved(share.runqueue, duration, window.threshold):
        return diagnosis(Cause.DESCHEDULED)
    both = share.stopped + share.runqueue
    if both > SHORTEST and duration - both < window.threshold:  # neither alone, but without both it were no stall
        return diagnosis(Cause.STOPPED if share.stopped > share.runqueue else Cause.DESCHEDULED)
    if _collected(share, moments, duration - share.runqueue, switch):
        return diagnosis(Cause.GC)
    syscall = _mode(s.syscall for s in samples if s.at <= window.ended)
    largest = max(share.gil, share.wait, share.cpu)
    if largest <= 0.0:
        return diagnosis(*_guess(share, syscall, duration, known=bool(stretches)))
    if largest == share.gil:
        return diagnosis(Cause.GIL, holder=_holder(_cpu_of_others(window), samples))
    if largest == share.wait:
        if syscall is None and _was_ready(window, share):
            return diagnosis(Cause.DESCHEDULED)
        return diagnosis(*_waiting(syscall))
    in_c = share.held + share.free >= share.cpu / 2 or _in_one_call(samples, window.ended)
    return diagnosis(Cause.C if in_c else Cause.PYTHON)


# --- where the time went ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Stretch:
    """From one reading to the next, as far as it lies in the stall."""

    seconds: float
    late: float  # the watchdog, at its end
    kept: float  # of that, not for want of a processor
    polled: int | None  # how often the watchdog was put on a processor
    process: float  # CPU of all threads
    gc: float
    whole: bool  # it ended before the stall did
    cpu: float | None = None
    runqueue: float = 0.0
    slices: int | None = None  # how often the thread was put on a processor

    @property
    def blocked(self) -> float:
        return max(0.0, self.seconds - (self.cpu or 0.0) - self.runqueue)


def _stretches(window: Window) -> list[_Stretch]:
    found: list[_Stretch] = []
    for a, b in itertools.pairwise(window.readings):
        then, now = a.moment, b.moment
        seconds = min(now.at, window.ended) - max(then.at, window.began)
        if seconds <= 0.0:
            continue
        one = _Stretch(
            seconds,
            now.late,
            max(0.0, now.late - _difference(then.runqueue, now.runqueue)),
            _count(then.slices, now.slices),
            _difference(then.process, now.process) * seconds / (now.at - then.at),
            _difference(then.gc, now.gc),
            now.at <= window.ended,
        )
        if a.cpu is not None and b.cpu is not None:
            # What it did just before the stall, and just after, cannot be told from it here: that is less than a tick.
            one.cpu = min(b.cpu - a.cpu, seconds) if b.cpu > a.cpu else 0.0
            one.runqueue = _difference(a.runqueue, b.runqueue)
            one.slices = _count(a.slices, b.slices)
        found.append(one)
    # The kernel counts a wait for a processor when it is over: what is too much for a stretch belongs to those before.
    late = 0.0
    for one in reversed(found):
        late += one.runqueue
        one.runqueue = max(0.0, min(late, one.seconds - (one.cpu or 0.0))) if one.cpu is not None else 0.0
        late -= one.runqueue
    return found


class _Share:
    """Seconds of a stall by what they went to."""

    def __init__(self, stretches: Sequence[_Stretch], switch: float) -> None:
        self.measured = any(one.cpu is not None for one in stretches)
        self.cpu = sum(one.cpu or 0.0 for one in stretches)
        self.runqueue = sum(one.runqueue for one in stretches)
        self.process = sum(one.process for one in stretches)
        self.late = max((one.late for one in stretches), default=0.0)
        self.starved = sum(one.late - one.kept for one in stretches)  # the watchdog
        self.stopped = self.gil = self.wait = self.gc = 0.0
        self.held = self.free = 0.0  # of the thread's CPU: in C, the GIL held or released
        futex: list[_Stretch] = []  # in these it waited for the GIL, or slept while others fought for it
        for one in stretches:
            contended = one.kept >= 0.4 * switch
            self.gc += min(one.gc, (one.cpu or 0.0) + (one.blocked if contended else 0.0))
            if one.cpu is None:
                self.held += one.kept if one.kept > 2 * switch else 0.0
                continue
            if one.cpu >= (one.seconds - one.runqueue) / 2:
                # What computes in Python gives up the GIL when asked; not while it has no processor, but then nor does
                # it compute.
                kept = one.late if _refused(one, switch) else one.kept
                if min(kept, one.cpu - max(0.0, one.seconds - one.late)) > 1.5 * switch:
                    self.held += one.cpu
                elif not contended and one.whole:
                    self.free += one.cpu
            if _wants_the_gil_of_one_without_a_processor(one, switch):
                if one.process - one.cpu >= 0.5 * one.blocked:
                    self.gil += one.blocked
                else:  # it is the watchdog's
                    self.runqueue += one.blocked
            elif one.kept > 2 * switch and _nobody_ran(one, switch):
                self.stopped += min(one.blocked, one.kept)
                self.wait += max(0.0, one.blocked - one.kept)
            elif contended:
                futex.append(one)
                if sum(f.blocked for f in futex) >= 4 * switch:  # enough to tell
                    self._settle(futex, switch)
            else:
                self.wait += one.blocked
        self._settle(futex, switch)

    def _settle(self, futex: list[_Stretch], switch: float) -> None:
        blocked = sum(one.blocked for one in futex)
        slices = [one.slices for one in futex]
        if _asked(None if None in slices else sum(s or 0 for s in slices), blocked, switch):
            self.gil += blocked
        else:
            self.wait += blocked
        futex.clear()

    def numbers(self, moments: Sequence[Moment], duration: float) -> Numbers:
        known = self.measured
        timed = len(moments) > 1 and moments[-1].gc is not None
        return Numbers(
            cpu=min(self.cpu, duration) if known else None,
            runqueue=min(self.runqueue, duration) if known and moments[-1].runqueue is not None else None,
            others_cpu=max(0.0, self.process - self.cpu) if known else None,
            gc=min(self.gc, duration) if timed else None,
            late=self.late,
            gil=min(self.gil, duration) if known else None,
            wait=min(self.wait, duration) if known else None,
            stopped=min(self.stopped, duration) if known else None,
        )


def _nobody_ran(one: _Stretch, switch: float) -> bool:
    """Whether the watchdog was late without running in between, so without asking for the GIL, and nor did others.

    Others did if it was the watchdog that ran into a collection of the garbage collector.
    """
    if one.process - (one.cpu or 0.0) >= 0.5 * one.kept:
        return False
    return one.polled is None or not _asked(one.polled, one.kept, switch)


def _wants_the_gil_of_one_without_a_processor(one: _Stretch, switch: float) -> bool:
    """Whether it asked for the GIL all the time while the watchdog was ready to run, and did not: so long it may keep
    the GIL itself. What sleeps in a system call meanwhile does not ask."""
    starved = one.late - one.kept
    return starved >= one.blocked / 2 > switch and one.slices is not None and _asked(one.slices, one.blocked, switch)


def _refused(one: _Stretch, switch: float) -> bool:
    """Whether the watchdog asked for the GIL again and again, though it had to wait for a processor each time."""
    return one.polled is not None and one.polled >= max(5.0, 0.5 * one.late / switch)


def _asked(slices: int | None, waited: float, switch: float) -> bool:
    """Whether a thread that waited so long asked for the GIL all the time; if it is not known, yes."""
    return slices is None or slices >= max(1.0, 0.4 * waited / switch)


def _cpu_of_others(window: Window) -> dict[int, float]:
    """CPU seconds of each other thread, by ident."""
    readings = window.readings
    if len(readings) < 2:
        return {}
    then, now = readings[0].moment.others, readings[-1].moment.others
    return {i: _difference(then.get(i, 0.0), cpu) for i, cpu in now.items() if i != window.ident}


# --- what that means -------------------------------------------------------------------------------------------------


def _collected(share: _Share, moments: Sequence[Moment], seconds: float, switch: float) -> bool:
    """Whether the garbage collector took most of so much time; guessed from the heap's size where it was not timed."""
    if len(moments) < 2:
        return False
    if moments[0].gc is not None:
        return share.gc > 0.0 and share.gc >= seconds / 2
    likely = moments[-1].blocks * GC_SECONDS_A_BLOCK
    return moments[-1].full > moments[0].full and share.held > 2 * switch and likely >= seconds / 2


def _starved(runqueue: float, duration: float, threshold: float) -> bool:
    rest = duration - runqueue
    return runqueue > SHORTEST and (
        rest < threshold or (runqueue > STARVED * duration and rest < STARVED_THRESHOLDS * threshold)
    )


def _in_one_call(samples: Sequence[Sample], ended: float) -> bool:
    """Whether it was in one function in C all the time, which gave up the GIL in our callback of the collector.

    So it does before Python 3.12, where objects that are made in C set off collections at once. Seen in a call all the
    time is not enough: in some loops in Python a call is the only place where the GIL changes hands.
    """
    inside = [s for s in samples if s.stack and s.at <= ended]
    seen = {(s.call, s.stack[-1]) for s in inside}
    collecting = sum(s.collecting for s in inside)
    return len(seen) == 1 and None not in {call for call, _ in seen} and collecting >= max(2, len(inside) / 2)


def _guess(share: _Share, syscall: str | None, duration: float, *, known: bool) -> tuple[Cause, str | None]:
    """Without clocks of single threads: whether the process computed, and whether the watchdog got the GIL."""
    if syscall is not None:
        return _waiting(syscall)
    if not known:
        return Cause.UNKNOWN, None
    if share.process < duration / 2:
        return Cause.WAIT, None
    return (Cause.C if share.held >= duration / 2 else Cause.PYTHON), None


def _was_ready(window: Window, share: _Share) -> bool:
    """Whether it had no processor, though the kernel did not count that, or has not yet, as it does when it is over.

    It was seen, and in no system call. A busy machine's doing only if there are other signs of one: what makes many
    short waits may be seen between two of them.
    """
    if not any(s.syscall == "" for s in window.samples if s.at <= window.ended):
        return False
    lasts = window.readings[-1].moment.at <= window.ended
    return lasts or share.runqueue > SHORTEST or share.starved > SHORTEST


def _waiting(syscall: str | None) -> tuple[Cause, str | None]:
    return (Cause.LOCK if syscall and syscall.startswith("futex") else Cause.WAIT), syscall


def _holder(others: Mapping[int, float], samples: Sequence[Sample]) -> Frame | None:
    """Line of the thread that used most CPU, as most samples saw it; else of the only one there is."""
    seen = {ident for s in samples for ident in s.others}
    busy = [ident for ident in seen if others.get(ident, 0.0) > 0.0]
    if busy:
        ident = max(busy, key=lambda i: others[i])
    elif len(seen) == 1:
        (ident,) = seen
    else:
        return None
    return Counter(s.others[ident] for s in samples if ident in s.others).most_common(1)[0][0]


def _steps(stack: Sequence[Frame]) -> bool:
    """Whether a debugger's line is on the stack inside the loop; `python -m pdb` has some outside of it."""
    inside = 0
    for n, frame in enumerate(stack):
        if frame.function.endswith("_run_once") or frame.file.endswith(("asyncio/runners.py", "asyncio\\runners.py")):
            inside = n
    return any(is_debugger(frame.file) for frame in stack[inside:])


def _mode(names: Iterator[str | None]) -> str | None:
    found = Counter(name for name in names if name)
    return found.most_common(1)[0][0] if found else None


def _difference(a: float | None, b: float | None) -> float:
    return max(0.0, b - a) if a is not None and b is not None else 0.0


def _count(a: int | None, b: int | None) -> int | None:
    return max(0, b - a) if a is not None and b is not None else None
