"""The command line: `offload merge | cat | verify | split | stat | demo | run | serve | send`.

The only place that prints, with `cli_run` and `cli_live` for `offload run`, and `cli_net` for `serve` and `send`.
Results go to stdout, everything else to stderr; a status line only if that is a terminal.
What a command needs is imported when it runs, so that `offload --version` starts as fast as Python lets it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__, cli_net, cli_run
from .errors import BrokenResourceError, BusyResourceError, OffloadError, PacketError

if TYPE_CHECKING:
    import asyncio

    from .merge.engine import Merge, Progress

OK, NOT_ALL, USAGE, BAD_FILE, NO_OUTPUT, BUSY, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

EXIT_CODES = (
    "Exit codes: 0 all done; 1 not all (a source that could not be read, a fault that verify found, a merge that was "
    "stopped half-way); 2 wrong usage; 3 not a packet file, or a damaged one; 4 the output could not be written; "
    "5 somebody else writes the packet file; 130 interrupted."
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge growing logs into one packet file, exactly once, and take them out again.",
    epilog=EXIT_CODES,
)


class FsyncChoice(StrEnum):
    none = "none"
    interval = "interval"
    always = "always"


PacketFileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A packet file.", show_default=False)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No status line and no summary.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]


class Failure(Exception):
    """A message for the user, and the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def main() -> NoReturn:
    """The `offload` command; ends the process with one of EXIT_CODES, or as the program of `offload run` does."""
    stdout, stderr = sys.stdout, sys.stderr
    errors = getattr(stdout, "errors", None)
    if sys.stdout is None:  # started with it closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path may be any bytes
    try:
        code = app(standalone_mode=False)
    except Failure as exc:
        _say(str(exc))
        code = exc.code
    except typer.Exit as exc:
        code = exc.exit_code
    except (typer.Abort, KeyboardInterrupt):
        _say("interrupted")
        code = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = NOT_ALL
    except Exception as exc:
        code = _explain(exc)
    if isinstance(code, cli_run.Program):
        with contextlib.suppress(AttributeError):
            stdout.reconfigure(errors=errors)  # type: ignore[union-attr]
        sys.stdout, sys.stderr = stdout, stderr
        code()  # outside of the `try`: what the program raises is its own
        code = OK
    sys.exit(code or OK)


def _explain(exc: Exception) -> int:
    """One line for an error that a command did not expect; a bug of ours is still told in full."""
    if isinstance(exc, OffloadError | OSError):
        _say(_sentence(exc, "stdout"))
        return _code(exc)
    wording = getattr(exc, "format_message", None)  # wrong usage
    if wording is None:
        raise exc
    context = getattr(exc, "ctx", None)
    command = "offload" if context is None or context.parent is None else f"offload {context.info_name}"
    if message := wording():  # none, if the help was shown instead
        _say(f"{message.rstrip('.')}; see {command} --help")
    return USAGE


def _code(exc: BaseException) -> int:
    if isinstance(exc, BusyResourceError):
        return BUSY
    if isinstance(exc, PacketError):
        return BAD_FILE
    return NO_OUTPUT if isinstance(exc, BrokenResourceError | OSError) else NOT_ALL


def _sentence(exc: BaseException, otherwise: str | os.PathLike[str] = "") -> str:
    """An error as one line: what happened and to what, `otherwise` if the error does not say."""
    if isinstance(exc, BrokenResourceError) and exc.__cause__ is not None:
        return _sentence(exc.__cause__) if str(exc.__cause__) else str(exc)
    if isinstance(exc, OSError) and exc.strerror:
        where = otherwise if exc.filename is None or isinstance(exc.filename, int) else os.fsdecode(exc.filename)
        return f"{where}: {exc.strerror}" if where else exc.strerror
    return str(exc) or repr(exc)


def _say(message: str) -> None:
    """One line on stderr, whatever is in it."""
    print(f"offload: {_printable(message)}", file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    """JSON on stdout in UTF-8, whatever the locale; a byte of a name that is not UTF-8 as the escape `\\udcXX`."""
    sys.stdout.buffer.write(json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    sys.stdout.flush()


def _version(wanted: bool) -> None:
    if wanted:
        print(f"offload {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge growing logs into one packet file, exactly once, and take them out again."""


# --- merge --------------------------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def merge(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="Files, folders (with all below, hidden files left out) and globs.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The packet file; one that is there is continued.")
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines and new files until Ctrl-C or SIGTERM.")
    ] = False,
    fsync: Annotated[
        FsyncChoice, typer.Option(help="When to wait for the disk: never, each 0.1 s, or after each write.")
    ] = FsyncChoice.interval,
    poll: Annotated[
        bool, typer.Option("--poll", help="Look by time; for network mounts, which do not report changes.")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge the lines of many files into one packet file, each exactly once, in order for each file.

    Started again on the same output it goes on where it was, whatever ended it: the state is in the packet file.
    """
    import asyncio

    progress, stopped = asyncio.run(_merge(paths, output, follow=follow, fsync=fsync, poll=poll, quiet=quiet))
    problems = {path: _reason(exc) for path, exc in sorted(progress.problems.items())}
    for path, reason in problems.items():
        _say(f"{path}: {reason}")
    # Followed, a name or glob without a file yet is no failure: it may come tomorrow.
    failed = [e for e in progress.problems.values() if not (follow and isinstance(e, FileNotFoundError))]
    stopped = stopped and not progress.caught_up
    complete = not failed and (follow or not stopped)
    if as_json:
        summary = {
            "output": os.fspath(output),
            "sources": progress.sources,
            "lines": progress.lines,
            "bytes": progress.bytes,
            "gaps": progress.gaps,
            "seconds": round(progress.seconds, 6),
            "problems": problems,
            "complete": complete,
        }
        _print_json(summary)
    elif not quiet:
        print(_summary(progress, output), file=sys.stderr)
    if stopped and not follow:
        _say("stopped before the end; start it again to go on")
    if not complete:
        raise typer.Exit(NOT_ALL)


async def _merge(
    paths: list[str], output: Path, *, follow: bool, fsync: FsyncChoice, poll: bool, quiet: bool
) -> tuple[Progress, bool]:
    import asyncio

    from .merge.engine import Merge
    from .merge.sources import Sources

    _allow_descriptors()
    if not all(paths):
        raise Failure("a path is empty, expected a file, folder or glob; is a variable unset?", USAGE)
    sources = Sources(paths)
    if not follow:
        files, missing = sources.scan()
        if not files:
            missing = missing or {path: FileNotFoundError(errno.ENOENT, "no files in there") for path in paths}
            raise Failure("; ".join(f"{path}: {_reason(exc)}" for path, exc in missing.items()), NOT_ALL)
    engine = Merge(sources, output, follow=follow, fsync=fsync.value, poll=poll)
    stopped = 0.0

    def stop() -> None:
        nonlocal stopped
        now = time.monotonic()
        if stopped and now - stopped > 1:  # sooner it is the same signal, once to us and once to our group
            _leave_at_once()
        stopped = stopped or now
        engine.stop()

    try:
        with _on_signals(stop):
            await _start(engine, output)
            running = asyncio.ensure_future(engine.run())
            if not quiet and sys.stderr.isatty():
                with contextlib.suppress(OffloadError):  # `await running` raises it
                    await _show(engine, running, follow=follow)
            progress = await running
            await engine.aclose()
    except OffloadError as exc:
        with contextlib.suppress(OffloadError):
            await engine.aclose()
        raise Failure(f"{output}: {_sentence(exc)}; what is in it stays, start again to go on", _code(exc)) from exc
    return progress, bool(stopped)


async def _start(engine: Merge, output: Path) -> None:
    try:
        await engine.start()
    except PacketError as exc:
        raise Failure(f"{_bad_file(output, exc)}; it was not touched", BAD_FILE) from exc
    except OSError as exc:
        raise Failure(_sentence(exc, output), NO_OUTPUT) from exc


def _leave_at_once() -> NoReturn:
    """Asked again: now. What is in the packet file stays right, for it always is."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # the status line had hidden the cursor
    _say("left at once; start it again to go on")
    os._exit(INTERRUPTED)


def _allow_descriptors() -> None:
    """As many open files as the system grants without asking: one for each source that is followed."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` for Ctrl-C and SIGTERM instead of what they do otherwise."""
    import asyncio

    loop = asyncio.get_running_loop()
    numbers = [signal.SIGINT, signal.SIGTERM]
    try:
        for number in numbers:
            loop.add_signal_handler(number, stop)
    except NotImplementedError:  # Windows
        before = [signal.signal(n, lambda *_: stop()) for n in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
        return
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _show(engine: Merge, running: asyncio.Future[Progress], *, follow: bool) -> None:
    """The status line, until the merge has ended."""
    import asyncio

    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    progress = engine.progress
    await asyncio.wait([running], timeout=0.2)  # a merge of some files is over before one could read it
    before, then, rate = progress.bytes, time.monotonic(), 0.0
    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        while not running.done():
            now = time.monotonic()
            if now > then:
                latest = (progress.bytes - before) / (now - then)
                rate = latest if not rate else 0.7 * rate + 0.3 * latest
                before, then = progress.bytes, now
            lag = progress.lag_bytes
            parts = [
                f"{progress.sources} sources",
                f"{progress.lines:,} lines",
                _bytes(progress.bytes),
                f"{_bytes(rate)}/s",
                f"lag {_bytes(lag)}",
            ]
            if lag and rate > 1 and not (follow and progress.caught_up):
                parts.append(f"{_duration(lag / rate)} left")
            if progress.problems:
                parts.append(f"{len(progress.problems)} not read")
            live.update(Text("  ·  ".join(parts), overflow="ellipsis", no_wrap=True), refresh=True)
            await asyncio.wait([running], timeout=0.2)


def _summary(progress: Progress, output: Path) -> str:
    seconds = progress.seconds
    gaps = f", {progress.gaps} gaps" if progress.gaps else ""
    return (
        f"{output}: {_plural(progress.lines, 'line')} ({_bytes(progress.bytes)}) from "
        f"{_plural(progress.sources, 'source')} in {seconds:.2f} s{gaps}"
    )


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc)


# --- out of the packet file -----------------------------------------------------------------------------------------


@app.command(epilog=EXIT_CODES)
def cat(
    file: PacketFileArgument,
    source: Annotated[
        str | None, typer.Option("--source", "-s", metavar="NAME", help="This source only: its path, name or a glob.")
    ] = None,
    prefix: Annotated[bool, typer.Option("--prefix", "-p", help="Each line behind its source's name.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more at the end, until Ctrl-C.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print the lines in the order in which they came, whole and as they were."""
    from .files.packet_file import FrameSource
    from .merge.lines import LineReader, LineWriter, json_lines

    with contextlib.suppress(AttributeError, ValueError):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `offload cat … | head` ends as `cat … | head` does
    out = sys.stdout.buffer
    writer = LineWriter(out, prefix=prefix)
    with _reading(file), FrameSource(file, follow=follow) as frames:
        reader = LineReader(frames, source)
        if source is not None and not follow and not any(reader.names.matches(i, source) for i in reader.names):
            known = ", ".join(sorted(reader.names.all())[:8])
            raise Failure(f"no source {source!r} in {file}; there are {len(reader.names)}: {known}", USAGE)

        def put(lines: Any) -> None:
            if as_json:
                out.writelines(f"{line}\n".encode(errors="backslashreplace") for line in json_lines(lines))
            else:
                writer.write(lines)

        try:
            while (batch := frames.read()) is not None or follow:
                for frame in batch or ():
                    for lines in reader.feed(frame):
                        put(lines)
                if batch is None:
                    out.flush()
                    time.sleep(0.05)
        except KeyboardInterrupt:
            if not follow:
                raise
        for lines in reader.close():
            put(lines)
        out.flush()
        if not follow and not frames.is_being_written():
            frames.end()


@app.command(epilog=EXIT_CODES)
def verify(file: PacketFileArgument, quiet: QuietOption = False, as_json: JsonOption = False) -> None:
    """Check every checksum, and that every sequence goes on without a hole; say where not."""
    from .merge.audit import verify as check

    with _reading(file), _bar("verifying", quiet=quiet) as watcher:
        found = check(file, watcher)
    if as_json:
        report = {
            "file": os.fspath(file),
            "ok": found.ok,
            "size": found.size,
            "frames": found.frames,
            "sources": found.sources,
            "lines": found.lines,
            "torn_bytes": found.torn,
            "being_written": found.live,
            "chain": found.chain,
            "faults": [{"offset": offset, "fault": fault} for offset, fault in found.faults],
            "gaps": [{"source": s, "from": a, "to": b, "reason": r} for s, a, b, r in found.gaps],
        }
        _print_json(report)
    else:
        for offset, fault in found.faults:
            print(f"{file}: byte {offset}: {fault}")
        for name, start, end, reason in found.gaps:
            to = "its end" if end is None else f"byte {end}"
            print(f"{file}: stated as lost: {name} from byte {start} to {to}: {reason}")
        if not quiet:
            frames = (
                f"{_plural(found.frames, 'frame')}, {_plural(found.lines, 'line')}, {_plural(found.sources, 'source')}"
            )
            verdict = "every checksum and every sequence holds" if found.ok else _plural(len(found.faults), "fault")
            print(f"{file}: {verdict} ({frames})")
            if found.live and found.torn:
                print(f"{file}: it is being written; {found.torn} bytes at the end are a frame under way")
    if not found.ok:
        raise typer.Exit(NOT_ALL)


@app.command(epilog=EXIT_CODES)
def split(
    file: PacketFileArgument,
    directory: Annotated[Path, typer.Option("--directory", "-d", metavar="DIR", help="Where the files go.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write every source back as a file, byte for byte."""
    from .merge.split import split as take_apart

    with _reading(file):
        _check_packet_file(file)
        try:
            with _bar("splitting", quiet=quiet) as watcher:
                done = take_apart(file, directory, force=force, watcher=watcher)
        except FileExistsError as exc:
            raise Failure(f"{exc.filename} is there already; give an empty folder, or --force", NO_OUTPUT) from exc
        except PacketError as exc:
            raise Failure(f"{file}: {exc}; what stands before it was written to {directory}", BAD_FILE) from exc
        except OSError as exc:
            raise Failure(_sentence(exc), NO_OUTPUT) from exc
    if as_json:
        report = {
            "files": {os.fspath(path): size for path, size in done.written.items()},
            "incomplete": {os.fspath(path): why for path, why in done.incomplete.items()},
        }
        _print_json(report)
    else:
        for path, why in done.incomplete.items():
            _say(f"{path} is not all of its source: {why}")
        if not quiet:
            total = _bytes(sum(done.written.values()))
            print(f"{directory}: {_plural(len(done.written), 'file')}, {total}", file=sys.stderr)
    if done.incomplete:
        raise typer.Exit(NOT_ALL)


@app.command(epilog=EXIT_CODES)
def stat(file: PacketFileArgument, as_json: JsonOption = False) -> None:
    """What each source has in the file: lines, bytes, generation, first and last time of arrival."""
    from .merge.split import stat as count

    with _reading(file):
        _check_packet_file(file)
        report = count(file)
    if as_json:
        sources = [
            {
                "name": s.name,
                "path": s.path,
                "lines": s.lines,
                "bytes": s.bytes,
                "generation": s.generation,
                "gaps": s.gaps,
                "first_time": _iso(s.first_ns),
                "last_time": _iso(s.last_ns),
            }
            for s in report.sources
        ]
        _print_json({"file": os.fspath(file), "size": report.size, "sources": sources})
        return
    head = ("source", "lines", "bytes", "generation", "first", "last")
    rows = [
        (_printable(s.name), f"{s.lines:,}", f"{s.bytes:,}", str(s.generation), _when(s.first_ns), _when(s.last_ns))
        for s in report.sources
    ]
    total = (f"{len(rows)} sources", f"{report.lines:,}", f"{report.bytes:,}", "", "", "")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_footer=True)
        for title, foot in zip(head, total, strict=True):
            right = title in ("lines", "bytes", "generation")
            table.add_column(title, foot, justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        for row in (head, *rows):
            print("\t".join(row))


@app.command(epilog=EXIT_CODES)
def demo(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Where it leaves its files.", show_default="a new folder"),
    ] = None,
) -> None:
    """Five programs write logs, one packet file takes them in, and a proof that nothing is lost: some ten seconds."""
    import asyncio
    import tempfile

    from .merge.demo import clear
    from .merge.demo import demo as run

    folder = Path(tempfile.mkdtemp(prefix="offload-demo-")) if directory is None else directory

    async def show() -> None:
        async for line in run(folder):
            print(line, flush=True)

    try:
        clear(folder)
        asyncio.run(show())
    except OSError as exc:
        raise Failure(_sentence(exc), NO_OUTPUT) from exc


app.command(epilog=cli_run.EXIT_CODES, context_settings=cli_run.SETTINGS)(cli_run.run)
cli_net.register(app, EXIT_CODES)


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Errors of a file that is read, as the user meets them."""
    try:
        yield
    except PacketError as exc:
        raise Failure(_bad_file(file, exc), BAD_FILE) from exc
    except OSError as exc:
        if isinstance(exc, BrokenPipeError) or exc.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise  # not about the file: stdout
        raise Failure(_sentence(exc, file), BAD_FILE) from exc


def _bad_file(file: Path, exc: PacketError) -> str:
    what = "no packet file" if exc.offset == 0 else f"byte {exc.offset}"
    return f"{file}: {what}: {exc.message}"


def _check_packet_file(file: Path) -> None:
    from .files.packet_file import FrameSource
    from .packets.codec import unpack_header
    from .packets.format import HEADER_BYTES

    with FrameSource(file) as source:
        start = source.read_at(0, HEADER_BYTES)
        if start:
            unpack_header(start)


@contextlib.contextmanager
def _bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
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


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.0f} h"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _iso(time_ns: int | None) -> str:
    if time_ns is None:
        return ""
    return datetime.fromtimestamp(time_ns / 1e9).astimezone().isoformat(timespec="milliseconds")


def _when(time_ns: int | None) -> str:
    return _iso(time_ns)[:19].replace("T", " ")


def _printable(name: str) -> str:
    """A source's name for a terminal: no control characters, no surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)
