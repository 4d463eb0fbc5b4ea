"""The standard library's logging, into a FileSink.

    logging.getLogger().addHandler(offload.LogHandler("app.log", rotate=offload.Rotation(every=86_400)))

Promises:
    - `emit` formats in the caller and costs a list append; it never waits for the disk where an event loop runs. There
      a record over `max_bytes` is dropped and counted, and a line in the log says how many were, as soon as there is
      room; a plain thread waits for room instead.
    - Records of one thread stand in the order made, each whole.
    - Nothing is lost at exit: the interpreter's end writes what was accepted, `logging.shutdown` and `close` wait for
      it, and what is logged after that (by `atexit` functions, by finalizers) is appended at once by whoever logs it.
    - In a forked child the handler opens the file again, on a thread of the child.
    - What fails goes to `handleError`, as for every handler of the library, never to whoever logs.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from ..errors import ClosedResourceError, ForkedError
from .append import AppendFile
from .intake import Overflow
from .sink import FileSink, SinkStats

MAX_BYTES = 16 << 20
_PATIENCE = 1.0  # seconds for an end that somebody else has begun: the interpreter's exit has waited for it already


class LogHandler(logging.Handler):
    """Log records into a file that a thread of its own writes; see the head of this module for what it promises.

    Args:
        path, max_bytes, encoding, options: as for FileSink.
        level: as for logging.Handler.
        overflow: for a record over the bound. "wait": a plain thread waits for room, a loop drops it; "drop" drops it
            anywhere; "raise" gives QueueFullError to `handleError`.

    Raises:
        OSError: the file cannot be opened. That is the one thing for which the caller waits.
    """

    terminator = "\n"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        level: int | str = logging.NOTSET,
        max_bytes: int = MAX_BYTES,
        overflow: Overflow = "wait",
        encoding: str = "utf-8",
        **options: Any,
    ) -> None:
        self._path = os.path.abspath(path)  # a late record comes when the folder may be another
        self._encoding = encoding
        self._overflow: Overflow = overflow
        self._options = {"max_bytes": max_bytes, "overflow": overflow, **options}
        self._sink = FileSink(self._path, **self._options)
        self._ended = False
        super().__init__(level)
        self._sink.__enter__()

    def stats(self) -> SinkStats:
        """How the file fares; `dropped` counts records."""
        return self._sink.stats()

    def handle(self, record: logging.LogRecord) -> Any:
        """As logging.Handler, without its lock: a thread that waits for room must not hold up a loop."""
        passed = self.filter(record)
        if passed:
            self.emit(passed if isinstance(passed, logging.LogRecord) else record)
        return passed

    def emit(self, record: logging.LogRecord) -> None:
        """Format the record and pass it on; from any thread."""
        try:
            self._put(self._line(record))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Return once all records are in the file; where an event loop runs, return at once (see `aflush`)."""
        try:
            done = self._sink.submit_flush()
            if not self._may_not_wait():
                done.result()
        except (ClosedResourceError, ForkedError):
            pass  # what was accepted is written by whoever closes, in the process that accepted it
        except Exception:
            self._report("the log could not be flushed")

    async def aflush(self, *, fsync: bool = False) -> None:
        """Return once all records are in the file, with `fsync` on the disk. Raises as FileSink.flush."""
        await self._sink.flush(fsync=fsync)

    def close(self) -> None:
        """Write what was accepted and close the file; where an event loop runs, only begin to (see `aclose`)."""
        self._ended = True
        try:
            self._sink.close(0 if self._may_not_wait() else _PATIENCE if self._sink._thread.closed else None)
        except ForkedError:
            pass  # the parent's
        except TimeoutError:
            if not self._may_not_wait():
                self._report("the log is not written yet; its thread goes on")
        except Exception:
            self._report("the log could not be written to its end")
        super().close()

    async def aclose(self) -> None:
        """Write what was accepted, close the file, end the thread. Raises as FileSink.aclose."""
        self._ended = True
        super().close()
        await self._sink.aclose()

    def _put(self, line: bytes) -> None:
        sink = self._sink
        overflow: Overflow = "drop" if self._overflow == "wait" and _on_a_loop() else self._overflow
        try:
            untold = sink._intake.take_untold()
            if untold:
                note = self._record(logging.WARNING, "%d records dropped: more bytes waited than max_bytes", untold)
                sink._put(said := self._line(note), len(said), "drop")
            sink._put(line, len(line), overflow)
        except ForkedError:
            self.acquire()
            try:
                if self._sink is sink:  # and no other thread was faster
                    self._sink = FileSink(self._path, **self._options).__enter__()
            finally:
                self.release()
            self._put(line)
        except ClosedResourceError:
            if self._ended and _on_a_loop():
                raise
            self._append_late(line)

    def _append_late(self, line: bytes) -> None:
        """The sink is closed, or closing: behind what it still writes."""
        if not self._sink._thread.is_here():
            self._sink.close(_PATIENCE)
        file = AppendFile(self._path)
        try:
            file.append([line], lambda taken: 0)
        finally:
            file.close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + self.terminator).encode(self._encoding, "backslashreplace")

    def _may_not_wait(self) -> bool:
        return _on_a_loop() or self._sink._thread.is_here()

    def _record(self, level: int, message: str, *args: object) -> logging.LogRecord:
        return logging.LogRecord("offload", level, __file__, 0, message, args, None)

    def _report(self, message: str) -> None:
        self.handleError(self._record(logging.ERROR, message))


def _on_a_loop() -> bool:
    return asyncio._get_running_loop() is not None
