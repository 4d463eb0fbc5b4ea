"""Loops that start, on any thread, and those that run already.

asyncio tells itself which loop runs on a thread by `asyncio._set_running_loop`, once when a loop starts and once when
it stops. A function in front of it hears of every loop, uvloop's too; nothing is paid while loops run. A uvloop that
was imported before keeps asyncio's own function, so there `Loop.run_forever` is asked as well.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
import asyncio.events
import asyncio.runners
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

_RUN_FOREVER = asyncio.base_events.BaseEventLoop.run_forever.__code__
_RUNNER = asyncio.runners.Runner.run.__code__

_listeners: list[Callable[[asyncio.AbstractEventLoop], None]] = []
_lock = threading.Lock()
_undo: list[Callable[[], None]] = []


def hear(listener: Callable[[asyncio.AbstractEventLoop], None]) -> None:
    """Call this on the thread of every loop that starts from now on; it must not raise."""
    with _lock:
        if listener not in _listeners:
            _listeners.append(listener)
        if not _undo:
            _install()


def unhear(listener: Callable[[asyncio.AbstractEventLoop], None]) -> None:
    with _lock, suppress(ValueError):
        _listeners.remove(listener)
        if not _listeners:
            while _undo:
                _undo.pop()()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread that is not here may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _install() -> None:
    original = asyncio.events._set_running_loop

    def _set_running_loop(loop: asyncio.AbstractEventLoop | None, /) -> None:
        original(loop)
        if loop is not None:
            for listener in list(_listeners):
                listener(loop)

    for module in (asyncio.events, asyncio):
        _replace(module, "_set_running_loop", _set_running_loop)
    uvloop: Any = sys.modules.get("uvloop")
    if uvloop is not None:
        before = uvloop.Loop.run_forever

        def run_forever(self: asyncio.AbstractEventLoop) -> None:
            for listener in list(_listeners):
                listener(self)
            before(self)

        _replace(uvloop.Loop, "run_forever", run_forever)


def _replace(owner: Any, name: str, value: object) -> None:
    own = name in vars(owner)
    before = getattr(owner, name)

    def undo() -> None:
        if vars(owner).get(name) is value:  # else somebody stands in front of us, and ours calls nobody any more
            if own:
                setattr(owner, name, before)
            else:
                delattr(owner, name)

    _undo.append(undo)
    setattr(owner, name, value)


def running(frames: dict[int, Any]) -> Iterator[asyncio.AbstractEventLoop]:
    """The loops that run now, from where all threads stand; those of other kinds as far as a Runner runs them."""
    for frame in frames.values():
        while frame is not None:
            loop: Any = None
            if frame.f_code is _RUN_FOREVER:
                loop = frame.f_locals.get("self")
            elif frame.f_code is _RUNNER:
                loop = getattr(frame.f_locals.get("self"), "_loop", None)
            if loop is not None and loop.is_running():
                yield loop
            frame = frame.f_back
