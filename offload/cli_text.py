"""What the commands share: exit codes, errors as the user meets them, and how numbers, times and names are shown."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import BrokenResourceError, BusyResourceError, PacketError

OK, NOT_ALL, USAGE, BAD_FILE, NO_OUTPUT, BUSY, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

EXIT_CODES = (
    "Exit codes: 0 all done; 1 not all (a source that could not be read, a fault or gap that verify found, a merge "
    "that was stopped half-way); 2 wrong usage; 3 not a packet file, or a damaged one; 4 the output could not be "
    "written; 5 somebody else writes the packet file; 130 interrupted."
)

PacketFileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A packet file.", show_default=False)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No status line and no summary.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]


class Failure(Exception):
    """A message for the user, and the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def code_of(exc: BaseException) -> int:
    if isinstance(exc, BusyResourceError):
        return BUSY
    if isinstance(exc, PacketError):
        return BAD_FILE
    return NO_OUTPUT if isinstance(exc, BrokenResourceError | OSError) else NOT_ALL


def sentence(exc: BaseException, otherwise: str | os.PathLike[str] = "") -> str:
    """An error as one line: what happened and to what, `otherwise` if the error does not say."""
    if isinstance(exc, BrokenResourceError) and exc.__cause__ is not None:
        return sentence(exc.__cause__) if str(exc.__cause__) else str(exc)
    if isinstance(exc, OSError) and exc.strerror:
        where = otherwise if exc.filename is None or isinstance(exc.filename, int) else os.fsdecode(exc.filename)
        return f"{where}: {exc.strerror}" if where else exc.strerror
    return str(exc) or repr(exc)


def say(message: str) -> None:
    """One line on stderr, whatever is in it."""
    print(f"offload: {printable(message)}", file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """JSON on stdout in UTF-8, whatever the locale; a byte of a name that is not UTF-8 as the escape `\\udcXX`."""
    sys.stdout.buffer.write(json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    sys.stdout.flush()


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Errors of a file that is read, as the user meets them."""
    try:
        yield
    except PacketError as exc:
        raise Failure(bad_file(file, exc), BAD_FILE) from exc
    except OSError as exc:
        if isinstance(exc, BrokenPipeError) or exc.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise  # not about the file: stdout
        raise Failure(sentence(exc, file), BAD_FILE) from exc


def bad_file(file: Path, exc: PacketError) -> str:
    what = "no packet file" if exc.offset == 0 else f"byte {exc.offset}"
    return f"{file}: {what}: {exc.message}"


def check_packet_file(file: Path) -> None:
    from .files.frame_source import FrameSource
    from .packets.codec import unpack_header
    from .packets.format import HEADER_BYTES

    with FrameSource(file) as source:
        start = source.read_at(0, HEADER_BYTES)
        if start:
            unpack_header(start)


@contextlib.contextmanager
def bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, for what takes longer than a blink."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, size: None
        return
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar: Any = None
        task: Any = None

        def watch(done: int, size: int) -> None:
            nonlocal bar, task
            if bar is None and time.monotonic() - started > 0.3:
                from rich.console import Console
                from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

                columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
                bar = stack.enter_context(Progress(title, *columns, console=Console(stderr=True), transient=True))
                task = bar.add_task(title, total=size)
            if bar is not None:
                bar.update(task, completed=done, total=size)

        yield watch


def in_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def in_time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def iso(time_ns: int | None) -> str:
    if time_ns is None:
        return ""
    return datetime.fromtimestamp(time_ns / 1e9).astimezone().isoformat(timespec="milliseconds")


def when(time_ns: int | None) -> str:
    return iso(time_ns)[:19].replace("T", " ")


def printable(name: str) -> str:
    """A source's name for a terminal: no control characters, no surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
