"""Where a loop's busy stretches begin and end.

    asyncio's loops                                      other loops (uvloop)
    ───────────────                                      ────────────────────
    … select() ─┐            ┌─ select() …               no selector to hold on to, so the watchdog looks:
                └ callbacks ─┘                           a frame above the runner's? then it sends a beat, and the
                ◄── busy ───►                            loop answers when it turns again
    `Exact`: both edges on the clock, every turn         `Heartbeat`: plus or minus a quarter of the threshold

`Exact` puts a function in front of the `select` of the loop's own selector, and of its `run_forever`: attributes of
these two objects, no class is touched. What it does in each turn is all that a watched program pays, so it is this
short: one reading of the clock for a turn that has more to do (`select(0)`), two for one that waits. Turns shorter than
2**SHORT ns are counted together; the histogram's finer steps are for those that matter.

A turn that ends in `select(0)` ends at its beginning: the loop is not idle there, it has callbacks ready. If the GIL is
hard to get back, that shows as busy time, which is right: the loop cannot turn.

Promises: nothing here waits, logs or calls foreign code. On the loop's thread only `_account` is slower than a turn can
bear, and runs for turns longer than 2**SHORT ns. `unhook` leaves the loop as it was, also if others hooked it since.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, NamedTuple

from .clocks import Clock
from .record import LoopRecord

SHORT = 14  # 16 µs: a twentieth of a microsecond more there is nothing
BINS = 64
POINTS = 600  # of a timeline


class Closed(NamedTuple):
    """A busy stretch over the threshold, or a wake-up that came late."""

    since: float
    until: float
    overslept: bool = False  # the loop was to wake at `since` and got to run at `until`


class Timeline:
    """Busy shares of stretches of time, never more than POINTS: when full, pairs are joined."""

    def __init__(self, began: float) -> None:
        self._points: list[tuple[float, float]] = []
        self._began = began
        self._last = began
        self._busy = 0.0
        self._stride = 0.1

    def add(self, now: float, busy: float) -> None:
        """`busy` is the sum of busy seconds so far."""
        span = now - self._last
        if span < self._stride:
            return
        self._points.append((now - self._began, min(1.0, max(0.0, (busy - self._busy) / span))))
        self._last, self._busy = now, busy
        if len(self._points) > POINTS:
            self._halve()

    def _halve(self) -> None:
        joined = []
        before = 0.0
        for (t1, share1), (t2, share2) in zip(self._points[::2], self._points[1::2], strict=False):
            joined.append((t2, (share1 * (t1 - before) + share2 * (t2 - t1)) / (t2 - before)))
            before = t2
        if len(self._points) % 2:
            joined.append(self._points[-1])
        self._points = joined
        self._stride *= 2

    def points(self) -> tuple[tuple[float, float], ...]:
        return tuple(self._points)


class Edge(ABC):
    """One watched loop: what both kinds share.

    Attributes:
        closed: stretches over the threshold that have ended, put there by the loop's thread, for the watchdog to take.
        thread_id: of the thread that runs the loop; None: it has not run yet.
        base: id of the frame that runs the loop, where it is not known by its code; 0 else.
    """

    precision = "exact"
    base = 0

    def __init__(
        self, loop: asyncio.AbstractEventLoop, name: str, threshold: float, began: float, *, resource: bool = False
    ) -> None:
        self._loop = weakref.ref(loop)
        self._name = name
        self._thread = ""
        self.threshold = threshold
        self.resource = resource
        self.closed: deque[Closed] = deque()
        self.thread_id: int | None = None
        self.native_id: int | None = None
        self.longest = 0.0
        self.timeline = Timeline(began)
        self.watched_since = Clock.now()

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """None: it is gone."""
        return self._loop()

    @property
    def name(self) -> str:
        return self._name or self._thread or "loop"

    def is_over(self) -> bool:
        """Whether the loop is closed or gone."""
        loop = self._loop()
        return loop is None or loop.is_closed()

    def seen_on(self, ident: int) -> None:
        """The loop runs on this thread; any thread may say so."""
        if ident == self.thread_id:
            return
        thread = next((t for t in threading.enumerate() if t.ident == ident), None)
        self.native_id = thread.native_id if thread is not None else None
        self._thread = "" if thread is None else thread.name
        if not self._name and thread is threading.main_thread():
            self._name = "main"
        self.thread_id = ident

    def record(self) -> LoopRecord:
        """How it fared so far; any thread."""
        turns, busy = self.totals()
        return LoopRecord(
            self.name,
            self._thread,
            self.resource,
            self.precision,
            turns,
            busy,
            Clock.now() - self.watched_since,
            max(self.longest, self.open_for()),
            self.histogram(),
            self.timeline.points(),
        )

    def open_for(self) -> float:
        """How long the present stretch has lasted, in seconds; 0.0: idle."""
        since = self.peek()
        return Clock.now() - since if since else 0.0

    @abstractmethod
    def peek(self) -> float:
        """When the present busy stretch began, by the detector's clock; 0.0: the loop is idle."""

    @abstractmethod
    def totals(self) -> tuple[int, float]:
        """Turns and busy seconds so far."""

    def histogram(self) -> tuple[int, ...]:
        return ()

    def look(self, frames: Mapping[int, FrameType], now: float) -> None:
        """The watchdog is awake, and this is where all threads stand."""

    def set_drowsy(self) -> None:
        """The watchdog goes to sleep: wake it when the loop does."""

    def close_here(self) -> None:
        """End the present stretch now; on the loop's own thread."""

    def unhook(self) -> None:
        """Leave the loop alone; any thread, any number of times."""


class Exact(Edge):
    """A loop of asyncio.

    Args:
        wake: called on the loop's thread when it wakes after `set_drowsy`; must not block.
        counted: whether there is a histogram.
        begins: when the stretch began that runs now, for a loop that runs on the calling thread; 0.0: not known.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        threshold: float,
        began: float,
        *,
        wake: Callable[[], None],
        resource: bool = False,
        counted: bool = True,
        begins: float = 0.0,
    ) -> None:
        super().__init__(loop, name, threshold, began, resource=resource)
        self._bins = [0] * BINS if counted else None
        self._selector: Any = loop._selector  # type: ignore[attr-defined]
        self._hook(loop, wake, begins)
        ident = getattr(loop, "_thread_id", None)
        if ident is not None:
            self.seen_on(ident)
        if not begins and loop.is_running():
            # It runs on another thread, and may sleep in the method itself until its first stall: so it is woken.
            with suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(self._begin)

    def _hook(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None], begins: float) -> None:
        # In closures, because a cell costs a third of what an attribute does.
        clock = Clock.now
        selector = self._selector
        select: Callable[[float | None], Any] = selector.select
        short = 2.0**SHORT / 1e9
        threshold = self.threshold
        account = self._account
        drowsy = False
        turns = 0
        total = 0.0  # busy seconds up to when the loop slept last
        busy = begins  # when the present turn began; 0.0: the loop sleeps
        awake = begins  # when the loop woke last

        def select_watched(timeout: float | None = None) -> Any:
            nonlocal awake, busy, turns, total, drowsy
            now = clock()
            if now - busy > short:
                account(now - busy, busy)
            turns += 1
            if timeout == 0:
                busy = now
                return select(timeout)
            if awake:
                total += now - awake
            busy = awake = 0.0
            events = select(timeout)
            busy = awake = clock()
            if timeout and busy - now - timeout > threshold:
                self.closed.append(Closed(now + timeout, busy, overslept=True))
            if drowsy:
                drowsy = False
                wake()
            return events

        run: Callable[[], None] = loop.run_forever

        def begin() -> None:
            nonlocal awake, busy
            self.seen_on(threading.get_ident())
            if not busy:
                busy = awake = clock()
            if drowsy:
                wake()

        def run_forever() -> None:
            lose()
            begin()
            try:
                run()
            finally:
                close()

        def close() -> None:
            nonlocal awake, busy, total
            now = clock()
            if busy:
                account(now - busy, busy)
            if awake:
                total += now - awake
            busy = awake = 0.0

        def doze() -> None:
            nonlocal drowsy
            drowsy = True

        def lose() -> None:
            nonlocal awake, busy
            busy = awake = 0.0

        def set_select(inner: Callable[[float | None], Any]) -> None:
            nonlocal select
            select = inner

        def set_run(inner: Callable[[], None]) -> None:
            nonlocal run
            run = inner

        select_watched.offload_hook = (lambda: select, set_select)  # type: ignore[attr-defined]
        run_forever.offload_hook = (lambda: run, set_run)  # type: ignore[attr-defined]
        self._peek: Callable[[], float] = lambda: busy
        # The loop's thread may move on between two of these; then the sum is off by a turn, until the next look.
        self._totals: Callable[[], tuple[int, float]] = lambda: (
            turns,
            total + (max(0.0, busy - awake) if awake else 0.0),
        )
        self._begin, self._doze, self._close, self._lose = begin, doze, close, lose
        self._select_hook, self._run_hook = select_watched, run_forever
        selector.select = select_watched
        loop.run_forever = run_forever  # type: ignore[method-assign]

    def _account(self, ran: float, since: float) -> None:
        """Book a turn that was not short, or the first; on the loop's thread."""
        if not since:
            return  # its beginning was not seen
        if self._bins is not None:
            self._bins[int(ran * 1e9).bit_length()] += 1
        if ran > self.longest:
            self.longest = ran
        if ran >= self.threshold:
            self.closed.append(Closed(since, since + ran))

    def peek(self) -> float:
        since = self._peek()
        if since:
            loop = self._loop()
            if loop is None or not loop.is_running():  # it was stopped, in a run that had begun before we came
                self._lose()
                return 0.0
        return since

    def totals(self) -> tuple[int, float]:
        return self._totals()

    def histogram(self) -> tuple[int, ...]:
        if self._bins is None:
            return ()
        bins = list(self._bins)
        bins[SHORT] += max(0, self._totals()[0] - sum(bins))
        return tuple(bins)

    def set_drowsy(self) -> None:
        self._doze()

    def close_here(self) -> None:
        self._close()

    def unhook(self) -> None:
        _unhook(self._selector, "select", self._select_hook)
        loop = self._loop()
        if loop is not None:
            _unhook(loop, "run_forever", self._run_hook)


def _unhook(owner: Any, name: str, hook: Any) -> None:
    """Take our function from in front of the method, wherever in a row of such functions it stands."""
    # By getattr, never by `__dict__`: before 3.13 whoever asks an object for that makes all its attributes slower from
    # then on, and a turn of the loop by a fifth (measured: half a microsecond).
    outer = getattr(owner, name)
    inner = hook.offload_hook[0]()
    if outer is hook:
        if getattr(inner, "__func__", None) is getattr(type(owner), name, None):
            delattr(owner, name)  # the method itself is next
        else:
            setattr(owner, name, inner)
    while hasattr(outer, "offload_hook"):
        get, put = outer.offload_hook
        outer = get()
        if outer is hook:
            put(inner)
            return
    # Else somebody else's function holds on to ours, which goes on measuring for nobody.


class Heartbeat(Edge):
    """A loop without a selector that Python can hold on to: uvloop's, or a foreign one.

    Idle is a thread whose innermost frame is the one that runs the loop; no beat is sent then, so an idle loop sleeps.
    """

    precision = "heartbeat"

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        name: str,
        threshold: float,
        began: float,
        *,
        resource: bool = False,
        begins: float = 0.0,
    ) -> None:
        super().__init__(loop, name, threshold, began, resource=resource)
        self._sent = False
        self._since = 0.0  # estimated beginning of the present stretch; 0.0: idle, or not known
        self._quiet = Clock.now()  # when it was last known to turn
        self._looked = self._quiet
        if begins:
            self._since = begins
            self.seen_on(threading.get_ident())
        self._busy = 0.0
        self._beats = 0
        self._send()

    def _send(self) -> None:
        loop = self._loop()
        if loop is not None and not self._sent:
            self._sent = True
            try:
                loop.call_soon_threadsafe(self._beat)
            except RuntimeError:  # closed
                self._sent = False

    def _beat(self) -> None:
        """On the loop's thread: it turns."""
        now = Clock.now()
        self.base = id(sys._getframe(1))
        self.seen_on(threading.get_ident())
        self._end(now)
        self._sent = False
        self._beats += 1

    def _end(self, now: float) -> None:
        since, self._since, self._quiet = self._since, 0.0, now
        if since:
            self.longest = max(self.longest, now - since)
            if now - since >= self.threshold:
                self.closed.append(Closed(since, now))

    def look(self, frames: Mapping[int, FrameType], now: float) -> None:
        loop = self._loop()
        if loop is None or self.thread_id is None:
            return
        if not loop.is_running():
            self._since, self._quiet = 0.0, now
            return
        frame = frames.get(self.thread_id)
        if frame is None or id(frame) == self.base:
            if not self._sent:
                self._since, self._quiet = 0.0, now
        else:
            self._busy += now - self._looked
            if not self._since:
                # It began after it was last seen to turn, and before now.
                self._since = (self._quiet + now) / 2
            self._send()
        self._looked = now

    def peek(self) -> float:
        return self._since

    def totals(self) -> tuple[int, float]:
        return 0, self._busy

    def close_here(self) -> None:
        self._end(Clock.now())


def make_edge(
    loop: asyncio.AbstractEventLoop,
    name: str,
    threshold: float,
    began: float,
    *,
    wake: Callable[[], None],
    resource: bool = False,
    counted: bool = True,
    begins: float = 0.0,
) -> Edge:
    """The exact kind where there is a selector to hold on to, else the other."""
    selector = getattr(loop, "_selector", None)
    if isinstance(loop, asyncio.BaseEventLoop) and hasattr(selector, "select"):
        return Exact(loop, name, threshold, began, wake=wake, resource=resource, counted=counted, begins=begins)
    return Heartbeat(loop, name, threshold, began, resource=resource, begins=begins)
