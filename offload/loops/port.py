"""The way back into a caller's loop: outcomes and callbacks, in order, one wake a burst.

    Bell      wakes a loop from any thread
    Port      one for each caller's loop: what is sent to it is settled there
    Notice    a callback on its way there

Promises:
    - What is sent through a port arrives on its loop, in the order sent, and once.
    - An outcome is never held back by a call behind it that blocks.
    - What is sent to a loop that is closed is told so (`abandon`), and nobody else notices.
    - A port lives as long as its loop is in use, and its descriptor as long as somebody may ring it.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol


class Bell:
    """Wakes a loop from any thread, for a third of what `call_soon_threadsafe` costs where there is an eventfd: one
    write there, one read here, no handle, no context, no self-pipe read until it is empty.

    Args:
        loop: whose `add_reader` takes the descriptor; a loop without it (Windows' proactor) is woken the usual way.
        answer: called on that loop after one or more rings.

    Whoever may ring holds the bell, and the descriptor is closed when nobody does: so its number cannot belong to
    another file when somebody writes to it.
    """

    __slots__ = ("__weakref__", "_answer", "_fd", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, answer: Callable[[], None]) -> None:
        self._loop = loop
        self._answer = answer
        self._fd: int | None = None
        if hasattr(os, "eventfd"):
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            try:
                # In a context of its own: the loop keeps it, and would keep the variables of whoever came first.
                contextvars.Context().run(loop.add_reader, fd, _answered, fd, answer)
                self._fd = fd
            except NotImplementedError:  # a loop without readers, as Windows' own: it is woken by call_soon_threadsafe
                os.close(fd)
            except BaseException:
                os.close(fd)
                raise

    def ring(self) -> None:
        """Raises RuntimeError if the loop is closed."""
        if self._fd is None or self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._answer)
        else:
            os.eventfd_write(self._fd, 1)

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def _answered(fd: int, answer: Callable[[], None]) -> None:
    # Given the number, not the bell: an error that a call raised may keep this frame, and would keep the descriptor.
    with suppress(BlockingIOError):  # a loop that was stopped and runs again finds one ring twice
        os.eventfd_read(fd)
    answer()


def wake(loop: asyncio.AbstractEventLoop | None, callback: Callable[..., object], *args: object) -> None:
    """Run a callback on a loop; from any thread. Nothing happens if that loop is gone."""
    if loop is not None:
        with suppress(RuntimeError):  # closed since
            loop.call_soon_threadsafe(callback, *args)


class Parcel(Protocol):
    """What a port takes to its loop."""

    def settle(self) -> None:
        """It has arrived; on the port's loop."""

    def abandon(self) -> None:
        """The port's loop is closed; from any thread."""


class Port:
    """The way back into one caller's loop: outcomes, in order, one wake a burst.

    A wake for each of a hundred quick calls costs more than the calls: the two threads take the GIL from each other
    each time (measured: 14 µs a call against 7). So while a burst is under way an outcome may be held until the burst's
    end. A held outcome is never at the mercy of a call behind it that blocks: as soon as two calls are under way the
    caller's loop looks by itself, after `_FIRST_LOOK` seconds, then half as often each time, at least every
    `_LAST_LOOK`.
    """

    __slots__ = ("__weakref__", "_bell", "_interval", "_looking", "_outbox", "_under_way", "_woken", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._outbox: deque[Parcel] = deque()
        self._woken = False
        self._under_way = 0  # calls made here and not settled
        self._looking = False
        self._interval = 0.0
        self._bell = Bell(loop, self._arrive)  # by which the loop keeps us until it is closed

    def made(self) -> None:
        """A call was queued; on the caller's loop."""
        self._under_way += 1
        if self._under_way > 1 and not self._looking:
            self._looking = True
            self._interval = _FIRST_LOOK
            self.loop.call_later(_FIRST_LOOK, self._look)

    def ended(self) -> None:
        """A call was settled or dropped; on the caller's loop."""
        self._under_way -= 1

    def send(self, parcel: Parcel, *, hold: bool = False) -> None:
        """Let the loop settle this, behind what was sent before; from any thread. Abandoned if that loop is closed.

        Args:
            hold: `flush` will be called soon, unless a call blocks first.
        """
        self._outbox.append(parcel)
        if not (hold and self._looking):
            self.flush()

    def flush(self) -> None:
        """Wake the caller's loop if outcomes wait for it; from any thread."""
        # `send` appends, then looks at the flag; `_arrive` clears the flag, then takes. So whoever misses the other's
        # step is seen by the other's next one: at worst one wake too many, never one too few.
        # A loop that closed after it was woken never clears the flag, so the flag alone would hide that it is gone.
        if self._outbox and (not self._woken or self.loop.is_closed()):
            self._woken = True
            try:
                self._bell.ring()
            except RuntimeError:
                with suppress(IndexError):  # two resources may find the loop closed at the same time
                    while True:
                        self._outbox.popleft().abandon()

    def _arrive(self) -> None:
        self._woken = False
        outbox = self._outbox
        for _ in range(len(outbox)):  # what comes meanwhile has a wake of its own, and the loop its turn
            outbox.popleft().settle()

    def _look(self) -> None:
        # Cleared before the outcomes are taken: who still sees it set has appended before we take, and who appends
        # later wakes us. Cleared after, an outcome held in between could wait for a call that blocks.
        self._looking = False
        self._arrive()
        if self._under_way > 1:
            self._looking = True
            self._interval = min(2 * self._interval, _LAST_LOOK)
            self.loop.call_later(self._interval, self._look)


class Notice:
    """A callback on its way to the loop that wants it; what it raises goes to that loop's exception handler."""

    __slots__ = ("_arguments", "_context", "_function", "_loop")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: contextvars.Context,
        function: Callable[..., object],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self._loop, self._context, self._function, self._arguments = loop, context, function, arguments

    def settle(self) -> None:
        # Not called from here: an error that is kept would keep our frames, and the port's descriptor with them.
        args, kwargs = self._arguments
        self._loop.call_soon(partial(self._function, *args, **kwargs), context=self._context)

    def abandon(self) -> None:
        """The loop that wanted it is closed."""


_FIRST_LOOK = 0.001
_LAST_LOOK = 0.05


class _Local(threading.local):
    port: Callable[[], Port | None] = staticmethod(lambda: None)  # of the loop that this thread ran last


_local = _Local()
_ports: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, Port] = weakref.WeakValueDictionary()


def port_here() -> Port:
    """The port of the running loop; a loop that has gone takes its port along."""
    loop = asyncio.get_running_loop()
    port = _local.port()
    if port is None or port.loop is not loop:
        port = _ports.get(loop)
        if port is None:
            port = _ports[loop] = Port(loop)
        _local.port = weakref.ref(port)
    return port
