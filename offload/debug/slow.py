"""Finds what keeps an event loop from turning, while it does: the line, the task, the cause. Cheap enough to leave on.

    with offload.watch():             the loop's thread         the watchdog's thread, one for all loops
        await main()                  ─────────────────         ─────────────────────────────────────────────────
                                      select │ callbacks │ …    looks at when `select` was left and entered;
    offload.run(main(), debug=True)          ▲           ▲      over half the threshold, at the thread's stack
    LoopThread("db", debug=True)             edge.py: exact     (watched.py, stack.py) and its clocks (cause.py)
                                      nothing else is paid      ── stalls ─► reporter: log line, on_stall
Promises:
    - Every stretch over the threshold is found and timed exactly on asyncio's loops, also if it is made of many short
      callbacks; on others (uvloop) within a quarter of the threshold, and the report says so.
    - A stall is reported while it lasts, at 1, 4 and 16 times the threshold, and once more when it has ended.
    - A resource's loop is there to block: its calls are judged by how long others wait for them in its queue. A
      coroutine that blocks it is a stall like any other.
    - Nothing waits for a loop: not `stop`, not the reports. The program's own functions (`on_stall`, log handlers) run
      on the reporter's thread only, so that one that blocks keeps nobody from being watched.
    - When all loops sleep, the watchdog does; the first that wakes wakes it.
    - After a fork, parent and child are each watched by a thread of their own; none of ours runs while it is made.
    - Memory is bounded: 1,000 stalls, 4,096 fingerprints, loops of one name kept as one.

CPython 3.11.0 to 3.11.11 can deadlock if the garbage collector runs in `sys._current_frames` (gh-106883), so it is held
off for that call. On an interpreter without the GIL the stacks of running threads cannot be read: no lines are named.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from . import announce, discover
from .allow import Allowed
from .allow import may_block as may_block
from .announce import Announced
from .clocks import Clock
from .edge import make_edge
from .record import LoopRecord, Report, Stall
from .session import Session
from .watchdog import Reporter, Watchdog, current_frames
from .watched import Settings, Watched

T = TypeVar("T")

THRESHOLD = 0.05
QUEUE_THRESHOLD = 1.0


class SlowCallbackDetector:
    """Watches event loops for what blocks them.

    Args:
        threshold: seconds for which a loop may be busy without turning.
        queue_threshold: seconds that a call may wait in the queue of a resource's thread.
        every_loop: watch also loops that start later, on any thread, and all that run already.
        on_stall: called with each stall, first while it lasts (`ongoing`), then with its end; on a thread of ours,
            never in the loop. What it raises is logged.
        log: one line a fingerprint a minute, by the logger "offload.debug": a warning for what failed, info for what
            could not be measured.
        allow: functions that may block with all they call, as "glob-of-file:function"; both may have wildcards.
        context: variables to report with each stall, as text.
        deep: catch also operators that hold the GIL to their end (`x in huge_list`), by `faulthandler`'s timer; left
            alone if somebody else uses that. Costs 25 µs a tick.
        histogram: count how long the loop's turns take.

    `start` watches the loop that runs on the calling thread; where none runs, the loops that start there later. And in
    any case the loop of every LoopThread, so of every resource. Use it as `with`, as `async with`, or by `start` and
    `stop`; after that `report()` is the whole session. It can be started again, for a new session.
    """

    def __init__(
        self,
        *,
        threshold: float = THRESHOLD,
        queue_threshold: float = QUEUE_THRESHOLD,
        every_loop: bool = False,
        on_stall: Callable[[Stall], None] | None = None,
        log: bool = True,
        allow: Sequence[str] = (),
        context: Sequence[contextvars.ContextVar[Any]] = (),
        deep: bool = False,
        histogram: bool = True,
    ) -> None:
        if threshold < 0.001 or queue_threshold < 0.001:
            raise ValueError(
                f"threshold is {threshold} s, queue_threshold is {queue_threshold} s; expected at least 0.001 s"
            )
        self.threshold = threshold
        self._settings = Settings(threshold, queue_threshold, Allowed(allow), tuple(context))
        self._every_loop = every_loop
        self._on_stall = on_stall
        self._log = log
        self._deep = deep
        self._histogram = histogram
        self._running = False
        self._home: int | None = None  # thread whose later loops are watched
        self._session = Session(threshold)
        self._watched: dict[int, Watched] = {}
        self._past: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()  # of resources that are closed
        self._watchdog: Watchdog | None = None

    def __repr__(self) -> str:
        state = f"watching {len(self._watched)} loops" if self._running else "stopped"
        return f"<{type(self).__name__} {self.threshold} s, {state}>"

    # --- life -----------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to watch; any thread. If it runs already, only the loop that runs here is added."""
        return self._start(resources=True)

    def _start(self, *, resources: bool) -> Self:
        here = asyncio._get_running_loop()
        with _gate:
            if not self._running:
                self._running = True
                self._session = Session(self.threshold)
                self._watched = {}
                self._home = None
                _running[self] = None
                self._watchdog = self._new_watchdog()
                self._watchdog.begin()
                if resources and (self._every_loop or here is None):
                    self._hear()
        if here is not None:
            self.watch_loop(here)
        if self._every_loop:
            for loop in list(discover.running(current_frames())):
                self.watch_loop(loop)
        if resources:
            announce.listen(self)
        return self

    def stop(self) -> Report:
        """Watch no longer; any thread, any number of times. Returns the session's report.

        A stall that lasts is reported as far as it has come. No loop is waited for; our own threads are, for at most
        PATIENCE seconds each: they run the program's `on_stall` and log handlers.
        """
        with _gate:
            if not self._running:
                return self.report()
            self._running = False
            _running.pop(self, None)
            announce.unlisten(self)
            discover.unhear(self._loop_starts)
            ident = threading.get_ident()
            for watched in list(self._watched.values()):
                if watched.edge.thread_id == ident:
                    watched.edge.close_here()
            watchdog, self._watchdog = self._watchdog, None
            if watchdog is not None:
                watchdog.stop()
            for watched in list(self._watched.values()):
                watched.edge.unhook()
            self._session.ended = Clock.now()
        return self.report()

    def report(self) -> Report:
        """The session so far; after `stop` the whole of it. Any thread."""
        live: list[LoopRecord] = []
        if self._running:
            live = [watched.edge.record() for watched in list(self._watched.values()) if not watched.buried]
        return self._session.report(live)

    def watch_loop(self, loop: asyncio.AbstractEventLoop, *, name: str = "", resource: bool = False) -> None:
        """Watch this loop too, until it is closed; any thread. Nothing happens if it is closed, or is watched.

        Args:
            name: what to call it in reports; "": "main" on the main thread, else its thread's name.
            resource: blocking is what its callbacks are for; only steps of tasks that block it are stalls.

        Raises:
            RuntimeError: the detector does not run.
        """
        if not self._running:
            raise RuntimeError("the detector does not run; start it before")
        self._add(loop, name=name, resource=resource)

    def _add(self, loop: asyncio.AbstractEventLoop, *, name: str = "", resource: bool = False) -> Watched | None:
        watchdog = self._watchdog
        known = self._watched.get(id(loop))
        if known is not None and known.edge.loop is loop and not known.over:
            return known
        if loop.is_closed() or watchdog is None:
            return None
        here = asyncio._get_running_loop() is loop
        edge = make_edge(
            loop,
            name,
            self.threshold,
            self._session.began,
            wake=watchdog.rouse,
            resource=resource,
            counted=self._histogram,
            begins=Clock.now() if here else 0.0,
        )
        watched = Watched(edge, self._settings, self._session, watchdog.emit)
        if known is not None:
            watchdog.leave(known)
        self._watched[id(loop)] = watched
        watchdog.wake()
        return watched

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    # --- what others tell us --------------------------------------------------------------------------------------

    def loop_opens(self, resource: Announced) -> None:
        """A resource's thread has begun to run its loop; see `announce`."""
        watched = self._add(resource.loop, name=resource.name) if self._running else None
        if watched is not None:
            watched.resource = resource
            watched.edge.resource = True

    def loop_closes(self, resource: Announced) -> None:
        """A resource's thread runs no more calls."""
        watched = self._watched.get(id(resource.loop))
        if watched is not None and watched.resource is resource:
            watched.edge.unhook()
            watched.over = True
            self._past.add(resource.loop)  # asyncio runs it once more, to close it

    def _loop_starts(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._running and loop not in self._past and (self._every_loop or threading.get_ident() == self._home):
            self._add(loop)

    # --- ours -----------------------------------------------------------------------------------------------------

    def _new_watchdog(self) -> Watchdog:
        reporter = Reporter(self._on_stall, log_lines=self._log) if self._on_stall is not None or self._log else None
        return Watchdog(self._watched, self._settings, self._session, reporter, deep=self._deep)

    def _hear(self) -> None:
        self._home = threading.get_ident()
        discover.hear(self._loop_starts)

    def _before_fork(self) -> None:
        if self._watchdog is not None:
            self._watchdog.rest()

    def _after_fork_in_parent(self) -> None:
        if self._watchdog is not None:
            self._watchdog.begin()

    def _let_go(self) -> None:
        """Of the parent's loops, in a child."""
        for watched in self._watched.values():
            watched.edge.unhook()
            watched.forget()
        self._watched = {}

    def _after_fork_in_child(self) -> None:
        """Begin a session of the child's own. asyncio lets no child go on with a loop of its parent's, so only loops
        that start from now on are watched; our threads come when there is one."""
        self._let_go()
        self._session = Session(self.threshold)
        self._watchdog = self._new_watchdog()
        self._hear()


_gate = threading.RLock()  # for who starts and stops, and held while the process forks; our threads never take it
_running: dict[SlowCallbackDetector, None] = {}


def _before_fork() -> None:
    _gate.acquire()
    for detector in _running:
        detector._before_fork()


def _after_fork_in_parent() -> None:
    for detector in _running:
        detector._after_fork_in_parent()
    _gate.release()


def _after_fork_in_child() -> None:
    global _lone
    if _lone is not None:  # the resources that asked for it are not here
        _lone.forget()
        _lone = None
    for detector in _running:
        detector._after_fork_in_child()
    _gate.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


class _Lone:
    """A detector for resources that ask for one (`debug=True`) while none runs; it runs as long as one of them does."""

    def __init__(self) -> None:
        self._detector = SlowCallbackDetector()
        self._open: set[Announced] = set()

    def loop_opens(self, resource: Announced) -> None:
        with _gate:
            self._open.add(resource)
            self._detector._start(resources=False)
        self._detector.loop_opens(resource)

    def loop_closes(self, resource: Announced) -> None:
        self._detector.loop_closes(resource)
        with _gate:
            self._open.discard(resource)
            if not self._open:
                self._detector.stop()

    def forget(self) -> None:
        """In a forked child: end without a word."""
        _running.pop(self._detector, None)
        self._detector._let_go()


_lone: _Lone | None = None


def lone_detector() -> announce.Listener:
    """The one for resources with `debug=True`."""
    global _lone
    if _lone is None:
        _lone = _Lone()
    return _lone


def watch(
    *,
    threshold: float = THRESHOLD,
    queue_threshold: float = QUEUE_THRESHOLD,
    every_loop: bool = False,
    on_stall: Callable[[Stall], None] | None = None,
    log: bool = True,
    allow: Sequence[str] = (),
    context: Sequence[contextvars.ContextVar[Any]] = (),
    deep: bool = False,
    histogram: bool = True,
) -> SlowCallbackDetector:
    """Watch the running loop, and every resource's, for what blocks it: `with offload.watch(): …`, or `async with`.

    Takes what SlowCallbackDetector takes, and returns one that is not started: `with` does that, or `start()`.
    """
    return SlowCallbackDetector(
        threshold=threshold,
        queue_threshold=queue_threshold,
        every_loop=every_loop,
        on_stall=on_stall,
        log=log,
        allow=allow,
        context=context,
        deep=deep,
        histogram=histogram,
    )


def run(
    main: Coroutine[Any, Any, T],
    *,
    debug: bool | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """Run a coroutine as `asyncio.run` does, under a detector if asked to.

    Args:
        debug: whether a detector watches the loop and all resources, and logs what blocks them; None: if the
            environment says OFFLOAD_DEBUG=1, or PYTHONASYNCIODEBUG=1. asyncio's own debug mode, which makes a loop some
            twenty times slower, stays as the environment says, for whoever wants its other checks.
        loop_factory: makes the loop, for example `uvloop.new_event_loop`.

    Raises:
        RuntimeError: a loop runs on this thread already.
    """
    if asyncio._get_running_loop() is not None:
        raise RuntimeError("offload.run() was called from a running event loop; await the coroutine instead")
    wanted = _asked_for() if debug is None else debug
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        if not wanted:
            return runner.run(main)
        with SlowCallbackDetector() as detector:
            detector.watch_loop(runner.get_loop())
            return runner.run(main)


def _asked_for() -> bool:
    if sys.flags.dev_mode:
        return True
    if sys.flags.ignore_environment:
        return False
    return any(os.environ.get(name, "") not in ("", "0") for name in ("OFFLOAD_DEBUG", "PYTHONASYNCIODEBUG"))
