"""Signals reach a program that `offload run` has put threads beside.

Python runs a signal's handler on the main thread, between two instructions. One that comes between the last look for
signals and a wait (a select, a lock, a sleep) is therefore handled when that wait is over, which may be never. That gap
is a microsecond wide, unless another thread asks for the GIL just then: the main thread waits in the gap until the
other has taken it, on a busy machine for milliseconds. The threads of `offload run` are such others. Measured, without
this module: 5 of 300 programs that got SIGTERM while they fell asleep slept on.

So the C handler of every signal that has one in Python writes to a pipe (`signal.set_wakeup_fd`). A thread reads there
and interrupts the main thread, again and again until that has come to its handlers, by a signal that means nothing:
SIGURG, which is ignored by default and which Go's runtime uses alike.

Promises:
    - A signal's handler runs as soon as the main thread can run Python, whatever it waits for.
    - A program that uses the pipe or SIGURG itself has them: then this ends. asyncio does when it is given handlers of
      its own (`loop.add_signal_handler`), and is woken by its own pipe.
    - A forked child has none of this, and SIGURG as it was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType

LONGEST = 1.0  # seconds between two interruptions


class Waker:
    """See above. Main thread."""

    def __init__(self) -> None:
        self._woken = False
        self._reads = self._writes = -1

    def start(self) -> None:
        """Begin; for the life of the process. Nothing happens where signals cannot be sent to a thread (Windows)."""
        if not hasattr(signal, "pthread_kill") or signal.getsignal(signal.SIGURG) is not signal.SIG_DFL:
            return
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._writes, False)
        signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        signal.signal(signal.SIGURG, self._on_woken)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._run, name="offload signals", daemon=True).start()

    def _on_woken(self, number: int, frame: FrameType | None) -> None:
        self._woken = True

    def _run(self) -> None:
        main = threading.main_thread().ident
        assert main is not None, "it has begun, for it started this one"
        while True:
            try:
                numbers = os.read(self._reads, 512)
            except OSError:  # the program has closed all descriptors
                return
            if set(numbers) <= {signal.SIGURG}:  # our own
                continue
            self._woken, pause = False, 0.001
            while not self._woken and signal.getsignal(signal.SIGURG) == self._on_woken:
                signal.pthread_kill(main, signal.SIGURG)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST)

    def _forget(self) -> None:
        if signal.getsignal(signal.SIGURG) == self._on_woken:
            signal.signal(signal.SIGURG, signal.SIG_DFL)
        fd = signal.set_wakeup_fd(-1)
        if fd != self._writes:  # the program's own
            signal.set_wakeup_fd(fd)
        for fd in (self._reads, self._writes):
            with contextlib.suppress(OSError):
                os.close(fd)
