"""One thread, one event loop, for one blocking resource.

    async with LoopThread("db") as thread:         main loop        │  thread "db"
        rows = await thread.call(query, "…")       ─────────────────┼─► query("…") blocks here,
        page = await thread.run(fetch, url)                         │   and only here
                                                                    │
    start ─► [ loop runs: calls in the order made ] ─► drain ─► on_close ─► loop closed ─► thread ended

Promises:
    - `start()` returns once the loop runs; `aclose()` and `close()` return once the thread has ended.
    - Closing takes no more calls, runs those that are queued, waits for those that run, then runs `on_close` on the
      thread. A cancelled `aclose()` still waits to the end, so `async with` never leaves a thread behind.
    - A call from the thread itself runs at once; a blocking wait there raises DeadlockError.
    - If the loop ends in another way (somebody stopped it), every call gets BrokenResourceError.
    - In a forked child every thread of the parent raises ForkedError: threads do not survive a fork.
    - At interpreter exit every thread that is still open is drained and closed as above, for at most EXIT_TIMEOUT
      seconds altogether; then a warning names the resource, the call that blocks and where it stands.

Threads are daemons, so that one which never returns cannot keep the interpreter from ending; `atexit` runs after all
ordinary threads have ended and before daemons are stopped, which is the moment to drain. Children that multiprocessing
forks end without `atexit`, and are drained by its finalizers.

Assumes that nobody else stops the loop. Threads and loops are made here only, crossings in `call.py` only.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Executor
from concurrent.futures import Future as ThreadFuture
from threading import get_ident
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar

from ..debug.announce import Announced, announced
from ..errors import BrokenResourceError, ClosedResourceError, DeadlockError, ForkedError, OffloadError
from .call import (
    DEFAULT,
    Call,
    CoroutineCall,
    Mailbox,
    Notice,
    OnCancel,
    Options,
    Post,
    Span,
    Submission,
    arrival,
    holdable,
    outlast,
    port_here,
    signal,
)

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("offload")


class Stats(NamedTuple):
    """How the calls of one resource fare.

    Attributes:
        queued: calls that wait now.
        running: the plain call that runs now, by name; None: none does.
        running_for: seconds since it began; 0.0 if none runs.
        oldest_wait: seconds that the call at the head of the queue has waited; 0.0 if none waits.
        submitted, failed, dropped, abandoned: counts since the start; a failed call raised, a dropped one never ran, of
            an abandoned one nobody took the outcome.
        busy: share of the time since the start in which a plain call ran, 0.0 to 1.0.
    """

    queued: int
    running: str | None
    running_for: float
    oldest_wait: float
    submitted: int
    failed: int
    dropped: int
    abandoned: int
    busy: float


class Calls:
    """The calls that cross to one thread, all with the same options. LoopThread is one; `options` makes others."""

    def __init__(self, mailbox: Mailbox, options: Options = DEFAULT, span: Span | None = None) -> None:
        self._mailbox = mailbox
        self._options = options
        self._span = span

    def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Run a plain function on the thread; the place in its queue is taken now, awaiting is optional.

        Returns:
            A future of the running loop, with the function's result or exception. Cancelling it drops the call if it
            is queued; if it runs, `on_cancel` says what happens: by default the future stays pending until the function
            has returned, then it is cancelled.

        Raises:
            ClosedResourceError, BrokenResourceError, ForkedError: nothing was queued.
            QueueFullError: the queue is at its bound, and the call asked not to wait.
            RuntimeError: no event loop runs here; plain threads use `submit`.
        """
        mailbox = self._mailbox
        call: Call[R] = Call(mailbox, function, args, kwargs, self._options, self._span)
        if get_ident() == mailbox.thread_id:
            call.made()
            mailbox.run_inline(call)
            call.settle()
        else:
            mailbox.put(call, nowait=self._options.nowait)
            call.made()
        return call

    def run(self, function: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Run a coroutine function on the thread's loop; it starts in its place among all calls.

        Cancelling the returned future drops the call if it is queued; if it runs, the coroutine gets CancelledError on
        its own loop, and the future stays pending until its cleanup has ended. Errors as for `call`.
        """
        call: Call[R] = CoroutineCall(self._mailbox, function, args, kwargs, self._options, self._span)
        self._mailbox.put(call, nowait=self._options.nowait)
        call.made()
        return call

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> ThreadFuture[R]:
        """Run a plain function on the thread, from any thread, with or without a loop, as an Executor would.

        Of the options `nowait` counts; to wait for so long and no longer, use `result(timeout)`.

        Returns:
            A concurrent future: `result(timeout)` waits for the outcome, `cancel()` drops the call if it is queued.
            Made on the thread itself, the call has run when this returns.

        Raises:
            ClosedResourceError, BrokenResourceError, ForkedError, QueueFullError: nothing was queued.
        """
        entry = Submission(fn, args, kwargs, self._span)
        if get_ident() == self._mailbox.thread_id:
            self._mailbox.run_inline(entry)
        else:
            self._mailbox.put(entry, nowait=self._options.nowait)
        return entry.future

    def post(self, function: Callable[[], object]) -> None:
        """Queue a function whose outcome nobody waits for; it must not raise. Errors as for `submit`."""
        self._mailbox.put(Post(function))

    def callback(self, function: Callable[P, object], /) -> Callable[P, None]:
        """A function for a vendor's SDK to call, from any thread; each call runs `function` on the loop that runs now.

        The calls come in the order made, in this caller's context variables, a wake-up a burst. What `function`
        raises goes to the loop's exception handler, never into the SDK. Once the loop is closed, calls are dropped.
        """
        port, context = port_here(), contextvars.copy_context()

        def deliver(*args: P.args, **kwargs: P.kwargs) -> None:
            port.post(Notice(port.loop, context, function, (args, kwargs)))

        return deliver

    def options(
        self, *, timeout: float | None = None, on_cancel: OnCancel | None = None, nowait: bool | None = None
    ) -> Calls:
        """The same thread, with other rules for the calls made through what this returns; what is None stays as it is.

        Args:
            timeout: seconds from making a call until it is given up with TimeoutError.
            on_cancel: what happens to a call that runs when it is cancelled or given up: "wait" until it ends (the
                default), "interrupt" it and wait (see Resource), or "abandon" it: its caller goes on at once, the
                function does too, and its outcome is nobody's. A call that is queued is always dropped.
            nowait: raise QueueFullError if the queue is at its bound.
        """
        old = self._options
        new = Options(
            old.timeout if timeout is None else timeout,
            old.on_cancel if on_cancel is None else on_cancel,
            old.nowait if nowait is None else nowait,
        )
        return Calls(self._mailbox, new, self._span)

    def plain(self) -> Calls:
        """The same thread, without options; inside a span, while it lasts."""
        return Calls(self._mailbox, span=self._span)

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Calls]:
        """A span of calls that nobody else gets into; see Handle.exclusive."""
        span = Span(self._mailbox)
        await span.begin(nowait=self._options.nowait)
        try:
            yield Calls(self._mailbox, self._options, span)
        finally:
            span.end()

    def is_here(self) -> bool:
        """Whether the calling code runs on this thread."""
        return get_ident() == self._mailbox.thread_id

    def stats(self) -> Stats:
        """How the calls fare; from any thread."""
        box, now = self._mailbox, perf_counter()
        running, oldest = box.running, box.oldest
        running_for = now - box.running_since if running else 0.0
        return Stats(
            len(box),
            running.label() if running else None,
            running_for,
            now - oldest if oldest is not None else 0.0,
            box.submitted,
            box.failed,
            box.dropped,
            box.abandoned,
            min(1.0, (box.busy_time + running_for) / (now - box.opened)) if box.opened else 0.0,
        )


class LoopThread(Calls, Executor):
    """A thread that runs its own event loop, and the calls that cross to it.

    Args:
        name: shows in thread lists, errors and warnings.
        loop_factory: makes the event loop, on the thread (for example `uvloop.new_event_loop`).
        on_close: called on the thread when the last call has ended, before its loop closes. What it raises reaches
            whoever closes.
        max_calls: calls that may be queued before one that asks not to wait is refused. Others keep their place.
        exit_timeout: seconds for which the interpreter's exit, and a caller after Ctrl-C, waits for a call that runs.
        debug: True: a detector watches this loop (see `offload.watch`; one that runs does so anyway), and asyncio's
            debug mode is on for it, without its own reports of slow callbacks: this loop is there to block. False:
            neither, but for a detector that runs. None: asyncio's debug mode as the environment says.

    It is a `concurrent.futures.Executor` with one worker too: `loop.run_in_executor(thread, f)`, `thread.map(f, xs)`.
    Use it as `async with`, as `with`, or by `start()` and `aclose()`. It cannot be started again.
    """

    def __init__(
        self,
        name: str = "offload",
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        on_close: Callable[[], object] | None = None,
        max_calls: int = 10_000,
        exit_timeout: float = 5.0,
        debug: bool | None = None,
    ) -> None:
        if max_calls < 1 or exit_timeout < 0:
            raise ValueError(f"max_calls is {max_calls}, exit_timeout is {exit_timeout} s; expected at least 1 and 0")
        super().__init__(Mailbox(self._not_started, max_calls=max_calls, exit_timeout=exit_timeout))
        self.name = name
        self._loop_factory = loop_factory
        self._on_close = on_close
        self._debug = debug
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._launched = False
        self._left = False  # somebody has waited for its end for long enough
        self._ready = signal()
        self._ended: ThreadFuture[None] = signal()

    def __repr__(self) -> str:
        state = "new"
        if self._launched:
            refusal = self._mailbox.refusal
            state = "open" if refusal is None else "ended" if self._ended.done() else "closing"
        return f"<{type(self).__name__} {self.name!r} {state}, {len(self._mailbox)} queued>"

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> Self:
        """Start the thread and return once its loop runs. Cancelled, it closes the thread again.

        Raises:
            BrokenResourceError: the loop could not be made; `__cause__` says why.
            ClosedResourceError: it was started or closed before.
        """
        self._launch()
        try:
            await outlast(arrival(self._ready))
        except BaseException:
            await self.aclose()  # an `async with` that is not entered is not left either
            raise
        return self

    async def aclose(self) -> None:
        """Take no more calls, end those that are here, run `on_close`, and return once the thread has ended.

        Cancelling does not shorten it: the cancellation goes on when the thread has ended. Closing again waits for the
        same end. What `on_close` raised is raised here. After Ctrl-C it waits for what is left of `exit_timeout`, and
        leaves a thread that has not ended to the interpreter's exit.

        Raises:
            DeadlockError: called from the thread itself, or by the task that is inside an exclusive span.
        """
        if not self._begin_close():
            return
        ended = arrival(self._ended)
        try:
            await outlast(ended, patience=self._mailbox.patience)
        except TimeoutError:
            if ended.done():  # by `on_close`
                raise
        finally:
            if ended.done():
                self._thread.join()  # its last act was to tell us: microseconds
            else:
                self._left = True

    def close(self, timeout: float | None = None) -> None:
        """As `aclose`, for plain threads: blocks until the thread has ended.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; it goes on closing.
        """
        if not self._begin_close():
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            running = self.stats().running
            raise TimeoutError(f"{self.name!r} has not ended after {timeout} s; {running or 'a coroutine'} still runs")
        self._ended.result()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As Executor.shutdown: take no more calls; `wait` for the end; `cancel_futures` drops what is queued."""
        if cancel_futures:
            self._mailbox.drop_all()
        if wait:
            self.close()
        else:
            self._mailbox.close(self._closed)

    @property
    def interrupter(self) -> Callable[[], object] | None:
        """Makes the call that runs return soon; called from any thread, for a call with `on_cancel="interrupt"`."""
        return self._mailbox.interrupter

    @interrupter.setter
    def interrupter(self, interrupter: Callable[[], object] | None) -> None:
        self._mailbox.interrupter = interrupter

    @property
    def closing(self) -> threading.Event:
        """Set as soon as somebody closes it, or it ends in another way: for a call that waits, to be waited for."""
        return self._mailbox.closing

    @property
    def closed(self) -> bool:
        """Whether calls are refused: it was closed, or has not been started, or its loop is gone."""
        return self._mailbox.refusal is not None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        self._launch()
        try:
            self._ready.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _launch(self) -> None:
        with self._mailbox.gate:
            if self._launched or self._mailbox.closing.is_set():
                past = "started" if self._launched else "closed"
                raise ClosedResourceError(f"{self.name!r} was {past} before; make a new one")
            self._launched = True
        _live.add(self)
        _drain_in_children()
        try:
            self._thread.start()
        except BaseException:
            _live.discard(self)
            self._launched = False
            self._mailbox.fail(self._closed)
            raise

    def _begin_close(self) -> bool:
        """Close the mailbox; False: there is no thread to wait for."""
        if get_ident() == self._mailbox.thread_id:
            raise DeadlockError(f"{self.name!r} cannot be closed from its own thread; close it where it was opened")
        if self._mailbox.is_mine():
            raise DeadlockError(f"{self.name!r} cannot be closed inside an exclusive span; leave the span before")
        with self._mailbox.gate:
            self._mailbox.close(self._closed)
            return self._launched and not self._forked()

    def _main(self) -> None:
        """The thread."""
        self._mailbox.thread_id = get_ident()
        cause: BaseException | None = None
        failure: BaseException | None = None
        try:
            with asyncio.Runner(loop_factory=self._loop_factory, debug=self._debug) as runner:
                try:
                    failure = runner.run(self._serve())
                except BaseException as exc:
                    cause = exc
                    # Before the runner cancels the tasks that are left: their callers hear why, not "cancelled".
                    self._mailbox.fail(lambda: self._broken(cause))
        except BaseException as exc:
            cause = cause or exc
        self._mailbox.fail(self._closed if cause is None else lambda: self._broken(cause))
        if not self._ready.done():
            self._ready.set_exception(self._broken(cause))
        _live.discard(self)
        # The next thread may get this number, and must not pass for this one.
        self._mailbox.thread_id = None
        # Last: whoever waits goes on from here, and joins us.
        if failure is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(failure)

    async def _serve(self) -> BaseException | None:
        loop = asyncio.get_running_loop()
        loop.slow_callback_duration = float("inf")  # blocking is what this loop is for; debug mode need not report it
        drained = asyncio.Event()
        self._mailbox.open(loop, drained.set)
        self._ready.set_result(None)
        mine = Announced(loop, self.name, self.stats, frozenset({Mailbox._run.__code__}))
        with announced(mine, debug=bool(self._debug)):
            await drained.wait()
        if self._on_close is not None:
            try:
                self._on_close()
            except BaseException as exc:
                return holdable(exc)
        return None

    def _forked(self) -> bool:
        return self._mailbox.refusal is not None and isinstance(self._mailbox.refusal(), ForkedError)

    # --- why no call is taken -------------------------------------------------------------------------------------

    def _not_started(self) -> OffloadError:
        return ClosedResourceError(f"{self.name!r} is not started; use it as `async with`, or await its start()")

    def _closed(self) -> OffloadError:
        return ClosedResourceError(f"{self.name!r} is closed")

    def _broken(self, cause: BaseException | None) -> OffloadError:
        error = BrokenResourceError(f"the thread of {self.name!r} has ended: {cause!r}")
        error.__cause__ = cause
        return error

    def _after_fork(self, parent: int) -> None:
        message = f"{self.name!r} belongs to the parent process {parent}; open one in this process"
        self._mailbox.thread_id = None  # if it was this thread that forked, it lives on, its loop does not
        self._mailbox.renew()
        self._mailbox.fail(lambda: ForkedError(message))
        for future in (self._ready, self._ended):
            if not future.done():
                future.set_result(None)


# --- every open thread, for exit and fork ------------------------------------------------------------

_live: weakref.WeakSet[LoopThread] = weakref.WeakSet()
_process = os.getpid()


def _drain_at_exit() -> None:
    threads = list(_live)
    for thread in threads:
        thread._mailbox.close(thread._closed)
    begun = time.monotonic()
    for thread in threads:
        timeout = 0.0 if thread._left else thread._mailbox.exit_timeout
        thread._thread.join(max(0.0, begun + timeout - time.monotonic()))
        if thread._thread.is_alive():
            busy = thread._mailbox.busy
            log.critical(
                "%r still works %.1f s after %s; it is left, and what is queued behind is lost: %d calls behind %s\n%s",
                thread.name,
                thread._mailbox.exit_timeout,
                "Ctrl-C" if thread._left else "the program's end",
                len(thread._mailbox),
                busy.label() if busy else "on_close",
                "".join(thread._mailbox.stack()),
            )
        elif thread._ended.done() and (error := thread._ended.exception()) is not None:
            log.critical("%r could not be closed at the program's end", thread.name, exc_info=error)


_registered = False


def _drain_in_children() -> None:
    """In a child of multiprocessing, which ends by `os._exit`: `atexit` functions do not run there, its own do."""
    global _registered
    process, util = (sys.modules.get(f"multiprocessing.{name}") for name in ("process", "util"))
    if not _registered and process is not None and util is not None and process.parent_process() is not None:
        _registered = True
        util.Finalize(None, _drain_at_exit, exitpriority=20)  # before its queues' threads are joined


def _mark_forked() -> None:
    global _process, _registered
    parent, _process = _process, os.getpid()
    _registered = False
    for thread in list(_live):
        thread._after_fork(parent)
    _live.clear()


atexit.register(_drain_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)
