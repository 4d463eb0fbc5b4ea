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
    - If the loop ends in another way (somebody stopped it), every call gets BrokenResourceError, and `on_close` runs.
    - In a forked child every thread of the parent raises ForkedError: threads do not survive a fork.
    - At interpreter exit every thread that is still open is drained and closed as above, for at most its
      `exit_timeout`, all at the same time; then a warning names the resource, the call that blocks and where it stands.
      Ctrl-C meanwhile leaves them one second more.

Threads are daemons, so that one which never returns cannot keep the interpreter from ending; `atexit` runs after all
ordinary threads have ended and before daemons are stopped, which is the moment to drain. Children that multiprocessing
forks end without `atexit`, and are drained by its finalizers.

Assumes that nobody else stops the loop. Threads and loops are made here only, crossings in `mailbox.py` and `port.py`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor
from concurrent.futures import Future as ThreadFuture
from threading import get_ident
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from ..debug.announce import Announced, announced
from ..errors import BrokenResourceError, ClosedResourceError, DeadlockError, ForkedError, OffloadError
from .call import CallState, arrival, holdable, outlast, signal, unlock
from .calls import Calls
from .mailbox import Mailbox

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("offload")


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
        self._closes = on_close is not None
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
            if not await outlast(arrival(self._ready), patience=self._mailbox.patience):
                raise TimeoutError(f"the loop of {self.name!r} was not made in time")
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
        finally:
            if ended.done():
                self._thread.join()  # its last act was to tell us: microseconds
            else:
                self._left = True

    def close(self, timeout: float | None = None) -> None:
        """As `aclose`, for plain threads: blocks until the thread has ended; after Ctrl-C as long as `aclose`.

        Raises:
            TimeoutError: it has not ended after `timeout` seconds; it goes on closing.
        """
        if not self._begin_close():
            return
        if self._wait(self._mailbox.patience() if timeout is None else timeout):
            self._ended.result()
        elif timeout is None:
            self._left = True
        else:
            if (busy := self._mailbox.busy) is not None:
                why = f"{busy.label()} still runs"
            else:
                queued = len(self._mailbox)
                why = f"calls that have not begun: {queued}" if queued else "on_close still runs"
            raise TimeoutError(f"{self.name!r} has not ended after {timeout} s; {why}")

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

    @property
    def refusal(self) -> OffloadError | None:
        """The error that a call would raise now; None: it would be taken."""
        refusal = self._mailbox.refusal
        return None if refusal is None else refusal()

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
        # The new thread's event loop asks whether asyncio's debug messages are wanted. Who holds logging's lock now
        # (`dictConfig`, while it makes a handler that starts us) would make it wait, and wait for it; unless the answer
        # is in the cache.
        logging.getLogger("asyncio").isEnabledFor(logging.DEBUG)
        try:
            self._thread.start()
        except BaseException:
            _live.discard(self)
            self._launched = False
            self._mailbox.fail(self._closed)
            raise

    def _wait(self, timeout: float | None) -> bool:
        """Block until the thread has ended; False: it has not in time."""
        # Not by `Thread.join`: interrupted by Ctrl-C, that takes the thread for ended (before Python 3.13).
        with contextlib.suppress(TimeoutError):
            self._ended.exception(timeout)
        if not self._ended.done():
            return False
        self._thread.join()  # its last act was to tell us: microseconds
        return True

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
                    if self._ready.done():
                        failure = runner.run(self._finish())  # what is open is closed all the same
        except BaseException as exc:
            cause = cause or exc
        self._mailbox.fail(self._closed if cause is None else lambda: self._broken(cause))
        self._mailbox.hang_up()
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
        return await self._finish()

    async def _finish(self) -> BaseException | None:
        on_close, self._on_close = self._on_close, None  # once
        if on_close is not None:
            try:
                on_close()
            except BaseException as exc:
                return holdable(exc)
        return None

    def _forked(self) -> bool:
        return isinstance(self.refusal, ForkedError)

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
        self._mailbox.hang_up()
        for future in (self._ready, self._ended):
            unlock(future)
            if not future.done():
                future.set_result(None)


# --- every open thread, for exit and fork ------------------------------------------------------------

_live: weakref.WeakSet[LoopThread] = weakref.WeakSet()
_process = os.getpid()


_TO_END = 1.0  # seconds for a thread that does not block to come to its end: some 100 µs if it is idle, and may run


def _drain_at_exit() -> None:
    pending, begun = list(_live), time.monotonic()
    try:
        _drain(pending, begun, math.inf)
    except KeyboardInterrupt:
        # Who asks again waits for nobody that blocks; but what others have accepted is not lost for a millisecond.
        _drain(pending, begun, time.monotonic() + _TO_END)
        raise


def _drain(pending: list[LoopThread], begun: float, hurry: float) -> None:
    for thread in pending:
        thread._mailbox.close(thread._closed)
    while pending:
        _see_it_end(pending[0], begun, hurry)
        del pending[0]


def _see_it_end(thread: LoopThread, begun: float, hurry: float) -> None:
    """Wait for its end as long as it may take, and no longer than until `hurry`; tell what it was kept by."""
    timeout = 0.0 if thread._left else thread._mailbox.exit_timeout
    left = thread._mailbox.left_of_patience()  # of the patience with the call that runs since Ctrl-C
    interrupted = thread._left or left is not None or hurry < math.inf
    timeout = max(0.0, begun + timeout - time.monotonic())
    if left is not None:
        timeout = min(timeout, left)
    busy = thread._mailbox.busy
    ended = busy is None or busy.state in (CallState.FINISHED, CallState.INTERRUPTED)  # its outcome is ahead of it
    if ended and not len(thread._mailbox) and not thread._closes:
        timeout = max(timeout, _TO_END)
    if not thread._wait(max(0.0, min(timeout, hurry - time.monotonic()))):
        busy = thread._mailbox.busy
        log.critical(
            "%r still works %.1f s after %s; it is left, and what is queued behind is lost: %d calls behind %s\n%s",
            thread.name,
            thread._mailbox.exit_timeout if hurry == math.inf else min(thread._mailbox.exit_timeout, _TO_END),
            "Ctrl-C" if interrupted else "the program's end",
            len(thread._mailbox),
            busy.label() if busy else "on_close",
            "".join(thread._mailbox.stack()),
        )
    elif (error := thread._ended.exception()) is not None:
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
