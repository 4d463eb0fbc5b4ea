"""SIGHUP means "open your logs again": one handler for all who want to hear it.

Promises: the handler that was there before is called too, and is there again when nobody listens any more; if somebody
else has set one meanwhile, theirs stays. Functions run in the main thread, between two of its bytecodes, and must
neither block nor raise.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

_listeners: dict[object, Callable[[], object]] = {}
_before: Any = None  # as signal.signal gave it


def listen(owner: object, function: Callable[[], object]) -> None:
    """Call `function` at each SIGHUP until `owner` ignores it.

    Raises:
        ValueError: this system has no SIGHUP, or this is not the main thread, where Python handles signals.
    """
    global _before
    number = getattr(signal, "SIGHUP", None)
    if number is None:
        raise ValueError("this system has no SIGHUP; call reopen() instead")
    if signal.getsignal(number) is not _hang_up:
        _before = signal.signal(number, _hang_up)
    _listeners[owner] = function


def ignore(owner: object) -> None:
    """Call its function no more; from any thread."""
    if _listeners.pop(owner, None) is not None and not _listeners:
        with contextlib.suppress(ValueError):  # not the main thread: the handler does it when it is called
            _restore()


def _restore() -> None:
    if signal.getsignal(signal.SIGHUP) is _hang_up:
        signal.signal(signal.SIGHUP, _before if _before is not None else signal.SIG_DFL)


def _hang_up(number: int, frame: FrameType | None) -> None:
    listeners = list(_listeners.values())
    for function in listeners:
        function()
    if callable(_before):
        _before(number, frame)
    elif not listeners:
        _restore()
        signal.raise_signal(number)
