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
ordinary threads have ended and before daemons are stopped, which is the moment to drain.

Assumes that nobody else stops the loop. Threads and loops are made here only, crossings in `call.py` only.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future as ThreadFuture
from threading import get_ident
from types import TracebackType
from typing import Any, NamedTuple, ParamSpec, Self, TypeVar

from ..errors import BrokenResourceError, ClosedResourceError, DeadlockError, ForkedError, OffloadError
from .call import Call, CoroutineCall, Mailbox, Post, Submission, arrival, holdable, outlast, signal

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger("offload")

EXIT_TIMEOUT = 5.0


class Stats(NamedTuple):
    """Counts of calls since the start, and how many are queued now; `running` names the plain call that runs."""

    queued: int
    running: str | None
    submitted: int
    failed: int
    dropped: int
    abandoned: int


class LoopThread:
    """A thread that runs its own event loop, and the calls that cross to it.

    Args:
        name: shows in thread lists, errors and warnings.
        loop_factory: makes the event loop, on the thread (for example `uvloop.new_event_loop`).
        on_close: called on the thread when the last call has ended, before its loop closes. What it raises reaches
            whoever closes.
        debug: asyncio's debug mode for this loop; None: as the environment says.

    Use it as `async with`, as `with`, or by `start()` and `aclose()`. It cannot be started again.
    """

    def __init__(
        self,
        name: str = "offload",
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
        on_close: Callable[[], object] | None = None,
        debug: bool | None = None,
    ) -> None:
        self.name = name
        self._loop_factory = loop_factory
        self._on_close = on_close
        self._debug = debug
        self._mailbox = Mailbox(self._not_started)
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._ident: int | None = None
        self._launched = False
        self._ready = signal()
        self._ended: ThreadFuture[None] = signal()

    def __repr__(self) -> str:
        state = "new"
        if self._launched:
            refusal = self._mailbox.refusal
            state = "open" if refusal is None else "ended" if self._ended.done() else "closing"
        return f"<{type(self).__name__} {self.name!r} {state}, {len(self._mailbox)} queued>"

    # --- calls ----------------------------------------------------------------------------------------------------

    def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Run a plain function on the thread; the place in its queue is taken now, awaiting is optional.

        Returns:
            A future of the running loop, with the function's result or exception. Cancelling it drops the call if it
            is queued; if it runs, the future stays pending until the function has returned, then it is cancelled.

        Raises:
            ClosedResourceError, BrokenResourceError, ForkedError: nothing was queued.
            RuntimeError: no event loop runs here; plain threads use `submit`.
        """
        mailbox = self._mailbox
        call: Call[R] = Call(mailbox, function, args, kwargs)
        if get_ident() == self._ident:
            call.port.made()
            mailbox.run_inline(call)
            call.settle()
        else:
            mailbox.put(call)
            call.port.made()
        return call

    def run(self, function: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Run a coroutine function on the thread's loop; it starts in its place among all calls.

        Cancelling the returned future drops the call if it is queued; if it runs, the coroutine gets CancelledError on
        its own loop, and the future stays pending until its cleanup has ended. Errors as for `call`.
        """
        call: Call[R] = CoroutineCall(self._mailbox, function, args, kwargs)
        self._mailbox.put(call)
        call.port.made()
        return call

    def submit(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> ThreadFuture[R]:
        """Run a plain function on the thread, from any thread, with or without a loop, as an Executor would.

        Returns:
            A concurrent future. Made on the thread itself, the call has run when this returns.

        Raises:
            ClosedResourceError, BrokenResourceError, ForkedError: nothing was queued.
        """
        entry = Submission(function, args, kwargs)
        if get_ident() == self._ident:
            self._mailbox.run_inline(entry)
        else:
            self._mailbox.put(entry)
        return entry.future

    def post(self, function: Callable[[], object]) -> None:
        """Queue a function whose outcome nobody waits for; it must not raise. Errors as for `submit`."""
        self._mailbox.put(Post(function))

    def is_here(self) -> bool:
        """Whether the calling code runs on this thread."""
        return get_ident() == self._ident

    def stats(self) -> Stats:
        """How the calls fare; from any thread."""
        box = self._mailbox
        running = box.running
        return Stats(
            len(box), running.label() if running else None, box.submitted, box.failed, box.dropped, box.abandoned
        )

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
        same end. What `on_close` raised is raised here.

        Raises:
            DeadlockError: called from the thread itself.
        """
        if not self._begin_close():
            return
        ended = arrival(self._ended)
        try:
            await outlast(ended)
        finally:
            if ended.done():
                self._thread.join()  # its last act was to tell us: microseconds

    def close(self) -> None:
        """As `aclose`, for plain threads: blocks until the thread has ended."""
        if not self._begin_close():
            return
        self._thread.join()
        self._ended.result()

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
            if self._launched or self._mailbox.closing:
                past = "started" if self._launched else "closed"
                raise ClosedResourceError(f"{self.name!r} was {past} before; make a new one")
            self._launched = True
        _live.add(self)
        try:
            self._thread.start()
        except BaseException:
            _live.discard(self)
            self._launched = False
            self._mailbox.fail(self._closed)
            raise

    def _begin_close(self) -> bool:
        """Close the mailbox; False: there is no thread to wait for."""
        if get_ident() == self._ident:
            raise DeadlockError(f"{self.name!r} cannot be closed from its own thread; close it where it was opened")
        with self._mailbox.gate:
            self._mailbox.close(self._closed)
            return self._launched and not self._forked()

    def _main(self) -> None:
        """The thread."""
        self._ident = get_ident()
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
        self._ident = None
        # Last: whoever waits goes on from here, and joins us.
        if failure is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(failure)

    async def _serve(self) -> BaseException | None:
        loop = asyncio.get_running_loop()
        drained = asyncio.Event()
        self._mailbox.open(loop, drained.set)
        self._ready.set_result(None)
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
        self._ident = None  # if it was this thread that forked, it lives on, its loop does not
        self._mailbox.renew()
        self._mailbox.fail(lambda: ForkedError(message))
        for future in (self._ready, self._ended):
            if not future.done():
                future.set_result(None)


# --- every open thread, for exit and fork ------------------------------------------------------------

_live: weakref.WeakSet[LoopThread] = weakref.WeakSet()
_process = os.getpid()


def _drain_at_exit(timeout: float = EXIT_TIMEOUT) -> None:
    threads = list(_live)
    for thread in threads:
        thread._mailbox.close(thread._closed)
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread._thread.join(max(0.0, deadline - time.monotonic()))
        if thread._thread.is_alive():
            busy = thread._mailbox.busy
            frame = sys._current_frames().get(thread._thread.ident or 0)
            stack = traceback.format_stack(frame) if frame is not None else []
            if isinstance(busy, CoroutineCall):
                stack += ["the coroutine stands at\n", *busy.stack()]
            log.critical(
                "%r still works %.1f s after the program's end; it is left, and what is queued behind is lost: "
                "%d calls behind %s\n%s",
                thread.name,
                timeout,
                len(thread._mailbox),
                busy.label() if busy else "on_close",
                "".join(stack),
            )
        elif thread._ended.done() and (error := thread._ended.exception()) is not None:
            log.critical("%r could not be closed at the program's end", thread.name, exc_info=error)


def _mark_forked() -> None:
    global _process
    parent, _process = _process, os.getpid()
    for thread in list(_live):
        thread._after_fork(parent)
    _live.clear()


atexit.register(_drain_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)
