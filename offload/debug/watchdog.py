"""The two threads of a detector: the watchdog, which looks after all loops, and the reporter, which tells of them.

    all loops asleep, and few turns before     ── until a loop rings; half a threshold later the next tick ──►
    some loop turns                            ── tick every half threshold ──►
    a loop is half over                        ── look at it every 5 ms, later less often ──►

Order within a tick: the frames first. Whatever gives up the GIL before that lets the loop's thread go on, and a call in
C that held the GIL is then over, and somebody else blamed. The clocks come second, the making of reports last. If the
GIL was lost on the way, and kept by somebody, the tick begins again with the frames.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import FrameType

from .clocks import Clock, Machine, Moment, Overtaken
from .deadman import DeadMan
from .record import Stall
from .session import Logbook, Session
from .stack import lines
from .watched import Settings, Watched

FEW = 4  # turns of all loops in a tick, up to which the watchdog sleeps while they do: being rung costs two ticks
SLEEP = 1.0  # seconds: it looks after closed loops and queues even then
AGAIN = 8  # times a tick begins again, if it loses the GIL for long: after that, the reports are due
PATIENCE = 1.0  # seconds for which somebody waits for one of these threads to end
FLUSH = 5.0  # seconds between looks for lines whose minute is over

log = logging.getLogger("offload.debug")

if not getattr(sys, "_is_gil_enabled", lambda: True)():

    def current_frames() -> dict[int, FrameType]:
        """Where all threads stand: cannot be read here while they run."""
        return {}

elif sys.version_info < (3, 11, 12):

    def current_frames() -> dict[int, FrameType]:
        """Where all threads stand, without the deadlock of gh-106883."""
        if not gc.isenabled():
            return sys._current_frames()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            gc.enable()

else:
    current_frames = sys._current_frames


class Watchdog:
    """One thread for all loops of a detector."""

    def __init__(
        self,
        watched: dict[int, Watched],
        settings: Settings,
        session: Session,
        reporter: Reporter | None,
        *,
        deep: bool = False,
    ) -> None:
        self._watched = watched
        self._settings = settings
        self._session = session
        self._reporter = reporter
        self._deep = deep
        self._tick = settings.threshold / 2
        self._bell = threading.Lock()
        self._bell.acquire()
        self._rang = 0.0  # when
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._final = False
        self._left: deque[Watched] = deque()  # to be buried
        self._urgent = False  # it rang for a tick
        self._resting = False  # until a loop rings
        self._before: Moment | None = None  # of the last tick
        self._first = threading.Lock()

    def begin(self) -> None:
        """Start the thread."""
        self._stopping = False
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="offload watchdog", daemon=True)
        self._thread.start()
        ready.wait(PATIENCE)  # else a stall that begins at once and holds the GIL is over before the first tick
        if self._reporter is not None:
            self._reporter.begin()

    def wake(self) -> None:
        """Tick now; any thread. Never blocks."""
        if self._thread is None:
            self._begin_in_child()
            return
        self._rang = Clock.now()
        self._urgent = True
        self._ring()

    def rouse(self) -> None:
        """A loop has woken: tick in time to see whether it is blocked. On its thread; never blocks."""
        if self._thread is None:
            self._begin_in_child()
        self._rang = Clock.now()
        self._ring()

    def _begin_in_child(self) -> None:
        """After a fork, on the thread of the first loop; never twice, though two may start at once."""
        if self._first.acquire(blocking=False):
            self.begin()

    def _ring(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has been rung
            self._bell.release()

    def leave(self, watched: Watched) -> None:
        """Watch this one no longer; any thread."""
        watched.over = True
        self._left.append(watched)

    def emit(self, stall: Stall) -> None:
        """Keep a stall, and tell of it."""
        self._session.add(stall)
        if self._reporter is not None:
            self._reporter.put(stall)

    def rest(self) -> None:
        """End the threads, for a fork; `begin` goes on."""
        self._end()
        if self._reporter is not None:
            self._reporter.end()

    def stop(self) -> None:
        """End the threads; what is known is told before."""
        self._final = True
        thread = self._thread
        self._end()
        if thread is None:
            self._bury_all(Clock.now())
        if self._reporter is not None:
            self._reporter.end(last=True)

    def _end(self) -> None:
        thread, self._stopping = self._thread, True
        if thread is not None:
            self.wake()
            join(thread)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self, ready: threading.Event) -> None:
        deadman = DeadMan() if self._deep else None
        machine = Machine()  # which reads files, so may lose the GIL: as if a tick had begun
        failed = False
        planned = Clock.now()  # the first readings are what the next ones are compared with
        try:
            stopping, again = False, 1
            while again or not stopping:
                rang = not again and self._bell.acquire(True, max(0.001, planned - Clock.now()))
                stopping = self._stopping  # asked to while it ticked, it ticks once more: what just ended is told
                frames: dict[int, FrameType] = current_frames()
                now = Clock.now()
                late = max(0.0, now - (self._rang if rang else planned))
                # Code in Python gives the GIL back within the interval.
                patience = 2 * sys.getswitchinterval() if again < AGAIN else math.inf
                try:
                    if rang and not (self._urgent or stopping) and late < patience:
                        if self._resting:
                            planned = self._begin_to_tick(now, machine, patience)
                    else:
                        self._urgent = self._resting = False
                        planned = self._look_at_all(frames, now, late, machine, deadman, patience)
                    again = 0
                    ready.set()
                except Overtaken as exc:
                    planned, again = exc.since, again + 1
                except Exception:
                    if not failed:  # one line for a mistake of ours, not forty a second
                        log.exception("the watchdog failed, and goes on")
                    failed, planned, again = True, Clock.now() + self._tick, 0
                frames = {}  # a frame that is kept keeps all that its function has in hand
        finally:
            if deadman is not None:
                deadman.close()
            if self._final:
                self._bury_all(Clock.now())
            machine.close()

    def _begin_to_tick(self, now: float, machine: Machine, patience: float) -> float:
        """A loop has woken; all slept until now. Returns when the next tick is due."""
        self._before = machine.read(now, 0.0, patience)
        self._resting = False
        return now + self._tick

    def _look_at_all(
        self,
        frames: dict[int, FrameType],
        now: float,
        late: float,
        machine: Machine,
        deadman: DeadMan | None,
        patience: float,
    ) -> float:
        """One tick; returns when the next one is due."""
        all_watched = list(self._watched.values())
        awake = [watched for watched in all_watched if not watched.asleep(now)]
        ours = {threading.get_ident(), self._reporter.ident if self._reporter is not None else 0}
        for watched in awake:
            watched.edge.look(frames, now)
            watched.look(frames, now, ours)
        others = lines(frames, (), ours) if late > self._tick else {}
        dumps = deadman.read() if deadman is not None and late > 0.0 else {}
        if others or dumps:
            for watched in awake:
                watched.woke_late(others, now, dumps.get(watched.edge.thread_id or 0, ()))
        moment = machine.read(now, late, patience)
        pause, turned = self._tick, 0
        told = 0.0  # seconds that the reports took, which is no lateness
        if any(watched.edge.precision != "exact" for watched in all_watched):
            pause *= 0.8  # when a stretch began there is told by these ticks: half of one either way
        for watched in awake:
            turned += watched.read(moment, self._before, patience)
            began = Clock.now()
            watched.tell(now, frames, ours)
            took = Clock.now() - began
            if took > patience:
                raise Overtaken(began)
            told += took
            if watched.next_look:
                pause = min(pause, watched.next_look - now)
        self._before = moment
        for watched in all_watched:
            if watched.over or watched.edge.is_over():
                self._bury(watched, now)
        while self._left:
            self._bury(self._left.popleft(), now)
        if deadman is not None:
            deadman.set(pause + self._tick)  # so it must tick: a loop that wakes may keep the GIL at once
        elif turned <= FEW:
            for watched in all_watched:
                watched.edge.set_drowsy()
            # A loop that woke before it was asked to tell does not tell.
            if not any(watched.edge.peek() for watched in all_watched):
                self._resting = True
                return now + SLEEP
        return now + pause + told

    def _bury(self, watched: Watched, now: float) -> None:
        for key, known in list(self._watched.items()):
            if known is watched:
                del self._watched[key]
        watched.end(now)
        watched.edge.unhook()

    def _bury_all(self, now: float) -> None:
        for watched in [*self._watched.values(), *self._left]:
            self._bury(watched, now)


class Reporter:
    """One thread that runs the program's own functions."""

    def __init__(self, on_stall: Callable[[Stall], None] | None, *, log_lines: bool) -> None:
        self._on_stall = on_stall
        self._logbook = Logbook() if log_lines else None
        self._queue: SimpleQueue[Stall | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def ident(self) -> int:
        """Of the thread; 0: there is none."""
        thread = self._thread
        return (thread.ident or 0) if thread is not None else 0

    def begin(self) -> None:
        """Start the thread. Not when there is something to tell: that would keep the watchdog from its next look."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="offload reporter", daemon=True)
            self._thread.start()

    def put(self, stall: Stall) -> None:
        """Tell of this; on the watchdog's thread, or the one that ends it."""
        self._queue.put(stall)

    def end(self, *, last: bool = False) -> None:
        """End the thread once all is told, or leave it behind if that takes long. `last`: nothing will follow."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            join(thread)
        if last and self._logbook is not None and (thread is None or not thread.is_alive()):
            self._logbook.flush(Clock.now(), all_of_it=True)

    def _run(self) -> None:
        while True:
            try:
                stall = self._queue.get(timeout=FLUSH if self._logbook is not None and self._logbook.pending else None)
            except Empty:
                stall = None
                if self._logbook is not None:
                    self._logbook.flush(Clock.now())
                continue
            if stall is None:
                return
            try:
                if self._logbook is not None:
                    self._logbook.add(stall, Clock.now())
                if self._on_stall is not None:
                    self._on_stall(stall)
            except Exception:
                log.exception("on_stall, or a log handler, raised")


def join(thread: threading.Thread) -> None:
    """Wait for one of our threads to end, but not for ever, and not for itself."""
    if thread is threading.current_thread():
        return
    thread.join(PATIENCE)
    # Before 3.13 a thread is joined a moment before the system has seen its end, and a fork in that moment warns of it.
    task = f"/proc/self/task/{thread.native_id}"
    for _ in range(20):
        if thread.is_alive() or not os.path.exists(task):
            return
        time.sleep(0.0001)
