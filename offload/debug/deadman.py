"""A timer that writes where all threads stand, without the GIL: what deep mode adds.

An operator that is written in C (`x in huge_list`, `huge * huge`) holds the GIL to its end, and hands it to nobody
before the next line runs. The watchdog cannot see it. `faulthandler` has a timer that needs no GIL; the watchdog sets
it anew at every tick, so that it goes off only if the watchdog was kept from ticking.

There is one such timer in a process. pytest uses it, and so do others; setting it again would cancel theirs. So it is
left alone if it is in use (one of the process's threads, that Python knows nothing of, blocks every signal, as that
timer's does), and given back as soon as somebody else sets it.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from .record import Frame

log = logging.getLogger("offload.debug")

_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_LINE = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


class DeadMan:
    """For one thread, the watchdog's.

    Attributes:
        usable: False: somebody else uses the timer.
    """

    def __init__(self) -> None:
        self._armed = False
        self._setter: Callable[..., Any] = faulthandler.dump_traceback_later
        self._canceller: Callable[..., Any] = faulthandler.cancel_dump_traceback_later
        self.usable = not _in_use()
        self._file: Any = None
        if not self.usable:
            log.warning("deep mode is off: faulthandler's timer seems to be in use")
            return
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        faulthandler.dump_traceback_later = self._taken
        faulthandler.cancel_dump_traceback_later = self._given_up

    def set(self, timeout: float) -> None:
        """Write in so many seconds, unless this is called again before; 25 µs."""
        if self.usable:
            self._armed = True
            self._setter(timeout, file=self._file)

    def read(self) -> dict[int, tuple[Frame, ...]]:
        """What was written since the last time: stacks by thread, outermost first."""
        if self._file is None:
            return {}
        self._file.seek(0)
        text = self._file.read()
        if not text:
            return {}
        self._file.seek(0)
        self._file.truncate()
        return parse(text.decode("utf-8", "replace"))

    def close(self) -> None:
        """Give the timer back. Idempotent."""
        if self._armed and self.usable:
            self._canceller()
        self.usable = False
        for name, ours, theirs in (
            ("dump_traceback_later", self._taken, self._setter),
            ("cancel_dump_traceback_later", self._given_up, self._canceller),
        ):
            if getattr(faulthandler, name) == ours:
                setattr(faulthandler, name, theirs)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _taken(self, *args: Any, **kwargs: Any) -> Any:
        """Somebody else sets the timer: it is theirs from now on."""
        if self.usable:
            self.usable = False
            log.warning("deep mode is off from now on: somebody else uses faulthandler's timer")
        return self._setter(*args, **kwargs)

    def _given_up(self) -> None:
        """Somebody cancels a timer that is not set, or theirs; not ours."""
        if not self.usable:
            self._canceller()


def parse(text: str) -> dict[int, tuple[Frame, ...]]:
    """faulthandler's text: stacks by thread, outermost first; the last one written of each."""
    stacks: dict[int, list[Frame]] = {}
    stack: list[Frame] = []
    for line in text.splitlines():
        if found := _THREAD.match(line):
            stack = stacks[int(found[1], 16)] = []
        elif found := _LINE.match(line):
            stack.append(Frame(found[1], int(found[2]), found[3]))
    return {ident: tuple(reversed(stack)) for ident, stack in stacks.items()}


def _in_use() -> bool:
    """Whether a thread that Python does not know blocks all signals, as the timer's thread does; Linux only.

    Threads of libraries may do so too (those of jemalloc and ZeroMQ do), but name themselves; the timer's thread has
    the name of the one that set it.
    """
    known = {str(thread.native_id) for thread in threading.enumerate()}
    try:
        tasks = set(os.listdir("/proc/self/task"))
    except OSError:
        return False
    names = {_of_task(task, "comm") for task in tasks & known}
    return any(_blocks_all(task) and _of_task(task, "comm") in names for task in tasks - known)


def _blocks_all(task: str) -> bool:
    blocked = next(
        (line.split()[1] for line in _of_task(task, "status").splitlines() if line.startswith("SigBlk:")), "0"
    )
    # All but SIGKILL, SIGSTOP and the two that the C library keeps for itself.
    return int(blocked, 16) & 0x7FFFFFFF == 0x7FFFFFFF & ~(1 << 8 | 1 << 18)


def _of_task(task: str, file: str) -> str:
    """What the system tells of a thread; nothing, if it has just ended."""
    try:
        with open(f"/proc/self/task/{task}/{file}", encoding="utf-8", errors="replace") as opened:
            return opened.read()
    except OSError:
        return ""
