"""One watched loop, as the watchdog sees it: looks at its thread while it is blocked, and the stalls made of them.

    tick          tick           looks, 5 ms apart, then rarer          the watchdog's next tick
    ──┬─────────────┬────────────┬─┬─┬─┬─┬─┬─┬──┬───┬──────┬────────────────┬─────
      idle │ busy …  half of the threshold │ 1x: first report   │ closed:    │ the stall, with its exact end,
           since                           │ 4x, 16x: again     │ by the loop│ cause and verdict

Rules: looks belong to the busy stretch in which they were taken, told by its beginning; a stretch that ended meanwhile
keeps them. Everything here runs on the watchdog's thread.
"""

from __future__ import annotations

import contextvars
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType
from typing import Any

from .advice import advise
from .allow import Allowed, is_inside
from .announce import Announced
from .cause import Sample, Window, classify
from .clocks import Moment, Probe, Reading, traced
from .edge import Closed, Edge
from .record import Cause, Frame, Kind, Stall, Verdict
from .session import Session
from .stack import Look, Who, below_loop, blamed, contributors, lines, look, named, program, running_task, stretches

FAST = 0.005  # seconds between two looks
DENSE = 64  # looks, after which each interval is twice the one before
RARE = 1.0  # the longest interval
LEVELS = (1, 4, 16)  # times the threshold: a stall that lasts is reported
MANY = 1_000_000  # turns of a loop that does not tell
READINGS = 256
SPARE = 4  # readings kept while the loop is idle: that it woke late is known a tick after that happened


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for; seconds."""

    threshold: float
    queue_threshold: float
    allowed: Allowed
    variables: Sequence[contextvars.ContextVar[Any]]


class Watched:
    """One loop.

    Attributes:
        over: it is not to be watched any longer; what has ended is still to be told.
        buried: it was told.
        next_look: when the thread is to be looked at again, by the detector's clock; 0.0: no stretch is long enough.
    """

    def __init__(self, edge: Edge, settings: Settings, session: Session, emit: Callable[[Stall], None]) -> None:
        self.edge = edge
        self.resource: Announced | None = None
        self.over = False
        self.next_look = 0.0
        self.buried = False
        self._settings = settings
        self._session = session
        self._emit = emit
        self._turns = -1
        self._since = 0.0  # of the stretch that the looks belong to
        self._looks: list[Look] = []
        self._ended: list[tuple[Closed, list[Look], int]] = []
        self._level = 0  # how many times it was reported
        self._number = 0
        self._interval = FAST
        self._fast = min(FAST, settings.threshold / 4)
        self._arm = settings.threshold / 2
        self._probe: Probe | None = None
        self._readings: list[Reading] = []
        self._queue: _Queue | None = None
        self._queue_check = 0.0
        self._strangers: list[Look] = []
        self._dump: Look | None = None

    @property
    def jobs(self) -> frozenset[CodeType] | None:
        """What runs calls that may block; None: this is not a resource's loop."""
        if self.resource is not None:
            return self.resource.jobs
        return frozenset() if self.edge.resource else None

    # --- at each tick, in this order ------------------------------------------------------------------------------

    def look(self, frames: Mapping[int, FrameType], now: float, ours: Container[int]) -> None:
        """Look at the thread, if the present stretch is long enough to become a stall."""
        edge = self.edge
        since = edge.peek()
        self._part(before=since)
        if since != self._since:
            self._begin(since)
        self.next_look = 0.0
        if not since or now - since < self._arm:
            return
        if self._looks and now < self._looks[-1].at + self._interval * 0.9:
            self.next_look = self._looks[-1].at + self._interval
            return
        frame = frames.get(edge.thread_id or 0)
        if frame is not None:
            self._looks.append(self._look(frame, frames, now, ours))
            if len(self._looks) > DENSE or self._looks[-1].job:
                self._interval = min(2 * self._interval, RARE)
        self.next_look = now + self._interval

    def asleep(self, now: float) -> bool:
        """Whether the loop has slept since the last tick, and nothing else is due: what follows need not be done."""
        return (
            not self._since
            and self.edge.precision == "exact"
            and self.edge.totals()[0] == self._turns
            and not self.edge.peek()
            and not self.edge.closed
            and not self._ended
            and (self.resource is None or now < self._queue_check)
        )

    def read(self, moment: Moment, before: Moment | None, patience: float) -> int:
        """Read the thread's clocks. Returns how often the loop turned since the last tick.

        Args:
            before: the last tick's moment. If the loop slept then, its clocks stood still until then.

        Raises:
            Overtaken: it, or another thread, kept the GIL for longer than the patience; nothing was read.
        """
        edge = self.edge
        turns, _ = edge.totals()
        turned = turns - self._turns if edge.precision == "exact" else MANY
        if edge.thread_id is None or edge.native_id is None:
            self._turns = turns
            return turned
        if self._probe is None or self._probe.ident != edge.thread_id:
            self.forget()
            self._probe = Probe(edge.native_id, edge.thread_id)
        reading = self._probe.read(moment, patience)
        last = self._readings[-1] if self._readings else None
        if last is not None and before is not None and before.at > last.moment.at:
            self._readings.append(last._replace(moment=before))
        self._readings.append(reading)
        self._turns = turns
        if self._looks and self._looks[-1].at == moment.at and self._probe is not None:
            syscall = self._probe.syscall(patience)
            if edge.peek() == self._since:
                self._looks[-1].syscall = syscall
        return turned

    def tell(self, now: float, frames: Mapping[int, FrameType], ours: Container[int]) -> None:
        """Report what had ended when the tick began, so that the clocks were read after its end, and what lasts."""
        self._tell_ended()
        since = self._since
        if since and self._level < len(LEVELS) and now - since >= LEVELS[self._level] * self._settings.threshold:
            while self._level < len(LEVELS) and now - since >= LEVELS[self._level] * self._settings.threshold:
                self._level += 1
            self._report_ongoing(since, now)
        if self.resource is not None and now >= self._queue_check:
            self._queue_check = now + self._settings.queue_threshold / 4
            self._check_queue(self.resource, now, frames, ours)
        self._trim()
        self._dump = None
        self.edge.timeline.add(now, self.edge.totals()[1] + (now - since if since else 0.0))

    def end(self, now: float) -> None:
        """The last words: of a stretch that has not ended too, if it is a stall already."""
        self._part()
        self._tell_ended()
        since = self._since
        if since and now - since >= self._settings.threshold:
            self._report_ongoing(since, now)
        if self._queue is not None:
            self._end_queue(now)
        self.forget()
        if not self.buried:
            self.buried = True
            self._session.bury(self.edge.record())

    def woke_late(self, others: Mapping[int, Frame], now: float, dump: tuple[Frame, ...]) -> None:
        """The watchdog was kept from ticking until now.

        Args:
            others: where other threads stood when it woke: one may have held the GIL.
            dump: where this loop's thread stood meanwhile, from the deadman's timer; (): not known.
        """
        if others:
            self._strangers = [Look(now, (), Who(), others=others)]
        if not dump:
            return
        dump = below_loop(dump)
        if self._looks and self._looks[-1].at == now:
            # This look came too late: what held the GIL is over, and the next line runs.
            late = self._looks[-1]
            late.stack, late.places = named(dump, late.stack), ()
        elif dump:
            self._dump = Look(now, dump, Who(label=dump[-1].function))

    # --- looking --------------------------------------------------------------------------------------------------

    def _begin(self, since: float) -> None:
        self._since = since
        self._looks = []
        self._level = self._number = 0
        self._interval = self._fast

    def _look(self, frame: FrameType, frames: Mapping[int, FrameType], now: float, ours: Container[int]) -> Look:
        edge = self.edge
        variables = self._settings.variables
        theirs = program(frame)
        seen = look(theirs, now, edge.loop, base=edge.base, jobs=self.jobs, variables=variables)
        seen.collecting = theirs is not frame
        seen.traced = traced(frame, len(seen.stack))
        ident = edge.thread_id or 0
        seen.allowed = self._settings.allowed(seen.stack) or is_inside(ident, running_task(edge.loop))
        seen.others = lines(frames, {ident}, ours)
        return seen

    def forget(self) -> None:
        """Close what was opened for its thread."""
        if self._probe is not None:
            self._probe.close()
        self._probe = None
        self._readings.clear()

    def _trim(self) -> None:
        """Keep the readings from before the present stretch on, some for one that will be known later, but not all."""
        readings = self._readings
        del readings[: min(self._before(self._since or float("inf")), max(0, len(readings) - SPARE))]
        if len(readings) > READINGS:
            del readings[1 : -READINGS // 2 : 2]

    def _before(self, since: float) -> int:
        """Index of the last reading from before that time, or of the first."""
        index = len(self._readings) - 1
        while index > 0 and self._readings[index].moment.at > since:
            index -= 1
        return max(0, index)

    # --- telling --------------------------------------------------------------------------------------------------

    def _part(self, before: float | None = None) -> None:
        """Take the stretches that have ended, each with its looks; `before`: but for the one that began then.

        They are told of later in the tick, when the clocks have been read: the cause shows in what they did meanwhile.
        """
        closed = self.edge.closed
        while closed and closed[0].since != before:
            one = closed.popleft()
            if one.since == self._since and not one.overslept:
                self._ended.append((one, self._looks, self._number))
                self._begin(0.0)
            else:
                self._ended.append((one, [], 0))

    def _report_ongoing(self, since: float, now: float) -> None:
        self._number = self._number or self._session.number()
        self._report(since, now, self._looks, self._number, ongoing=True)

    def _tell_ended(self) -> None:
        for one, looks, number in self._ended:
            if not looks and self.edge.resource and not one.overslept:
                continue  # what a resource's loop did that nobody saw was its job, for all we know
            if not looks and self._dump is not None and not one.overslept:
                looks, self._dump = [self._dump], None
            number = number or self._session.number()
            self._report(one.since, one.until, looks, number, ongoing=False, overslept=one.overslept)
        self._ended.clear()

    def _report(
        self,
        since: float,
        until: float,
        looks: list[Look],
        number: int,
        *,
        ongoing: bool,
        overslept: bool = False,
    ) -> None:
        duration = until - since
        mine = [one for one in looks if not one.job]
        if len(mine) < len(looks):
            # The calls of the resource are its job; what else ran in the same turn is judged by what it took itself.
            duration = sum(s.middle for s in stretches(looks, since, until) if not s.looks[0].job)
        if duration < self._settings.threshold:
            return
        groups = list(stretches(mine, since, until))
        longest = max(groups, key=lambda one: one.middle, default=None)
        saturated = longest is not None and len(groups) > 1 and longest.middle < duration / 2
        seen = mine if longest is None or saturated else list(longest.looks)
        frame = _offending(seen)
        first = _typical(seen, frame)
        stall = Stall(
            number=number,
            loop=self.edge.name,
            began=self._session.at(since),
            duration=duration,
            threshold=self._settings.threshold,
            kind=Kind.SATURATED if saturated else Kind.SLOW,
            stacks=tuple(Counter(one.stack for one in mine).items()),
            samples=len(mine),
            callbacks=max((one.turns for one in mine), default=1),
            waited=max((one.ready for one in mine), default=0),
            precision=self.edge.precision,
            resource=self.edge.resource,
            ongoing=ongoing,
            **self._diagnosed(since, until, looks, seen, duration, overslept=overslept),
        )
        self._emit(_described(stall, first, frame, saturated=saturated, looks=mine))

    def _diagnosed(
        self,
        since: float,
        until: float,
        looks: Sequence[Look],
        seen: Sequence[Look],
        duration: float,
        *,
        overslept: bool = False,
    ) -> dict[str, Any]:
        """Cause and verdict, as fields of a Stall."""
        samples = [
            Sample(
                one.at,
                one.stack,
                one.syscall,
                one.others,
                one.traced,
                one.call_at(one.stack[-1]) if one.stack else None,
                one.collecting,
            )
            for one in looks or [one for one in self._strangers if one.at >= since]
        ]
        found = classify(
            Window(
                since,
                until,
                self._settings.threshold,
                self._readings[self._before(since) :],
                samples,
                self.edge.thread_id or 0,
            )
        )
        if not looks and found.cause not in ((Cause.GIL, Cause.GC) if overslept else (Cause.GIL, Cause.GC, Cause.C)):
            # Nobody saw it, though the watchdog ticked; or the loop slept, and was not woken in time for a reason that
            # does not show: a virtual machine's host takes processors away without a word.
            found = found._replace(verdict=Verdict.UNMEASURED)
        allowed = sum(one.allowed for one in seen) / len(seen) if seen else 0.0
        may = allowed and duration * (1 - allowed) < self._settings.threshold
        verdict = Verdict.PASS if may else found.verdict
        return {**found._asdict(), "verdict": verdict}

    # --- a resource's queue ---------------------------------------------------------------------------------------

    def _check_queue(
        self, resource: Announced, now: float, frames: Mapping[int, FrameType], ours: Container[int]
    ) -> None:
        stats = resource.stats()
        limit = self._settings.queue_threshold
        if stats.oldest_wait < limit:
            if self._queue is not None:
                self._end_queue(now)
            return
        queue = self._queue
        if queue is None:
            queue = self._queue = _Queue(self._session.number(), now - stats.oldest_wait)
        if stats.oldest_wait > queue.longest:
            queue.longest, queue.waited = stats.oldest_wait, stats.queued
            queue.running = stats.running or queue.running
        frame = frames.get(self.edge.thread_id or 0)
        if frame is not None and len(queue.looks) < DENSE:
            seen = self._look(frame, frames, now, ours)
            seen.syscall = self._probe.syscall() if self._probe is not None else None
            queue.looks.append(seen)
        level = sum(stats.oldest_wait >= times * limit for times in LEVELS)
        if level > queue.level:
            queue.level = level
            self._tell_queue(queue, now, ongoing=True)

    def _end_queue(self, now: float) -> None:
        queue, self._queue = self._queue, None
        if queue is not None:
            self._tell_queue(queue, now, ongoing=False)

    def _tell_queue(self, queue: _Queue, now: float, *, ongoing: bool) -> None:
        looks = queue.looks
        frame = _offending(looks)
        first = _typical(looks, frame)
        stall = Stall(
            number=queue.number,
            loop=self.edge.name,
            began=self._session.at(queue.began),
            duration=queue.longest,
            threshold=self._settings.queue_threshold,
            kind=Kind.QUEUE,
            stacks=tuple(Counter(one.stack for one in looks).items()),
            samples=len(looks),
            waited=queue.waited,
            precision=self.edge.precision,
            resource=True,
            ongoing=ongoing,
            **self._diagnosed(queue.began, now, looks, looks, queue.longest),
        )
        stall = _described(stall, first, frame, saturated=False, looks=looks)
        self._emit(replace(stall, callback=queue.running or stall.callback))


@dataclass(slots=True)
class _Queue:
    """A time in which calls waited too long in a resource's queue. Seconds, and the detector's clock."""

    number: int
    began: float
    longest: float = 0.0  # that a call has waited
    waited: int = 0  # calls in the queue then
    running: str | None = None
    level: int = 0
    looks: list[Look] = field(default_factory=list)


def _offending(looks: Sequence[Look]) -> Frame | None:
    """The line to blame: of the function that most looks blame, the line that most of them saw."""
    frames = [frame for one in looks if (frame := blamed(one.stack)) is not None]
    if not frames:
        return None
    (function, _), *_ = Counter((frame.file, frame.function) for frame in frames).most_common(1)
    (frame, _), *_ = Counter(f for f in frames if (f.file, f.function) == function).most_common(1)
    return frame


def _typical(looks: Sequence[Look], frame: Frame | None) -> Look | None:
    """The first look that saw the stack that most of those saw that blame this line."""
    theirs = [one for one in looks if blamed(one.stack) == frame]
    if not theirs:
        return None
    (stack, _), *_ = Counter(one.stack for one in theirs).most_common(1)
    return next(one for one in theirs if one.stack == stack)


def _described(
    stall: Stall, first: Look | None, frame: Frame | None, *, saturated: bool, looks: Sequence[Look]
) -> Stall:
    """The stall with what a look says of whose it is, and with advice."""
    if first is not None and first.stack:
        call = first.call_at(frame)
        stall = replace(stall, frame=frame, call=call, innermost=first.stack[-1], stack=first.stack)
    if saturated:
        stall = replace(stall, contributors=contributors(looks, stall.duration))
    elif first is not None or looks:
        who = (first or looks[0]).who
        stall = replace(
            stall,
            task=who.task,
            coroutine=who.coroutine,
            chain=who.chain,
            callback=who.callback,
            parent=who.parent,
            context=who.context,
        )
    return replace(stall, advice=advise(stall))
