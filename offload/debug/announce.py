"""Where a resource's thread says which loop is its own, so that a detector that runs can judge it by its queue.

This stands apart from the detector so that a thread pays next to nothing for being watchable: nothing is imported, and
a set is asked whether anybody listens.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Protocol


class QueueStats(Protocol):
    """How the calls of one resource fare: what is asked of `offload.Stats`."""

    @property
    def queued(self) -> int: ...
    @property
    def running(self) -> str | None: ...
    @property
    def oldest_wait(self) -> float: ...


@dataclass(frozen=True, eq=False)
class Announced:
    """A resource's loop.

    Attributes:
        stats: asks how the queue of calls fares; from any thread, and it does not block.
        jobs: what runs a queued call: whatever stands on the stack above it is the resource's job, and may block.
    """

    loop: asyncio.AbstractEventLoop
    name: str
    stats: Callable[[], QueueStats]
    jobs: frozenset[CodeType]


class Listener(Protocol):
    def loop_opens(self, resource: Announced) -> None:
        """On the resource's thread, or on the listener's for those that are open already."""

    def loop_closes(self, resource: Announced) -> None:
        """On the resource's thread, before its loop closes."""


_open: dict[Announced, None] = {}
_listeners: dict[Listener, None] = {}


@contextmanager
def announced(resource: Announced, *, debug: bool = False) -> Iterator[None]:
    """The resource's loop runs inside this block, and can be watched.

    Args:
        debug: watch it also if no detector runs; what is found is logged.
    """
    _open[resource] = None
    own: Listener | None = None
    if debug and not _listeners:
        from .slow import lone_detector

        own = lone_detector()
        own.loop_opens(resource)
    for listener in list(_listeners):
        listener.loop_opens(resource)
    try:
        yield
    finally:
        _open.pop(resource, None)  # in a child of this process it is gone already
        for listener in [*_listeners, *([own] if own else [])]:
            listener.loop_closes(resource)


def listen(listener: Listener) -> None:
    """Hear of every resource's loop, of those that are open at once; any thread."""
    _listeners[listener] = None
    for resource in list(_open):
        listener.loop_opens(resource)


def unlisten(listener: Listener) -> None:
    """Hear of no more; any thread, any number of times."""
    _listeners.pop(listener, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)  # their threads are not here
