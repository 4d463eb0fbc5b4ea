"""The command `offload merge`: its options and its TOML file, what it tells, signals, and what watches it.

What can be set stands in `merge/settings.py`; the options of the command are made of that table. Signals: SIGINT and
SIGTERM end it, the second at once; SIGHUP reads the file again, or without one looks for new files at once. It tells
systemd (`Type=notify`) when it is ready, reads its file again, and ends.

The only place that prints for it. What it needs is imported when it runs.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .cli_text import (
    BAD_FILE,
    INTERRUPTED,
    NO_OUTPUT,
    NOT_ALL,
    USAGE,
    Failure,
    JsonOption,
    QuietOption,
    bad_file,
    code_of,
    in_bytes,
    in_time,
    plural,
    print_json,
    printable,
    say,
    sentence,
)
from .errors import OffloadError, PacketError
from .merge.settings import OPTIONS, Option, Settings, SettingsError, read_config, taken

if TYPE_CHECKING:
    import asyncio

    from .merge.engine import Merge, Progress


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command of this module."""
    app.command(epilog=epilog)(_command())


def _command() -> Callable[..., None]:
    """The command with an option for each setting: typer reads them from its signature."""

    def merge(**given: Any) -> None:
        config, check = given.pop("config"), given.pop("check")
        quiet, as_json = given.pop("quiet"), given.pop("as_json")
        if not all(given["sources"] or ()):
            raise Failure("a path is empty, expected a file, folder or glob; is a variable unset?", USAGE)
        asked, settings = _settings(config, {name: value for name, value in given.items() if value not in (None, [])})
        if check:
            _check(settings, as_json=as_json)
        else:
            _run(asked, settings, quiet=quiet, as_json=as_json)

    merge.__doc__ = """Merge the lines of many files into one packet file, each exactly once, in order for each file.

    Started again on the same output it goes on where it was, whatever ended it: the state is in the packet file.
    SIGHUP reads the --config file again, or without one looks for new files at once.
    """
    config = typer.Option(
        metavar="FILE", help="Options from a TOML file; those given here win.", rich_help_panel="How it is run"
    )
    check = typer.Option(
        "--check", help="Say whether the options are right, and what they mean now.", rich_help_panel="How it is run"
    )
    parameters = {name: (_annotation(option), None) for name, option in OPTIONS.items()}
    parameters["config"] = Annotated[Path | None, config], None
    parameters["check"] = Annotated[bool, check], False  # type: ignore[assignment]
    parameters["quiet"] = QuietOption, False  # type: ignore[assignment]
    parameters["as_json"] = JsonOption, False  # type: ignore[assignment]
    merge.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in parameters.items()
        ]
    )
    merge.__annotations__ = {name: annotation for name, (annotation, _) in parameters.items()}
    return merge


def _annotation(option: Option) -> Any:
    if not option.flags:
        argument = typer.Argument(metavar=option.kind.metavar, help=option.help, show_default=False)
        return Annotated[list[str] | None, argument]
    kind: Any = {"switch": bool, "one": str, "many": list[str]}[option.kind.shape]
    shown: Any = option.shown or False
    told = typer.Option(
        *option.flags,
        metavar=option.kind.metavar or None,
        help=option.help,
        rich_help_panel=option.panel,
        show_default=shown,
    )
    return Annotated[kind | None, told]


class _Asked:
    """What was asked for: on the command line, and in a file that may change."""

    def __init__(self, config: Path | None, given: dict[str, Any]) -> None:
        self.config = config
        self._given = {name: taken(name, value) for name, value in given.items()}

    def settings(self) -> Settings:
        """As they are now.

        Raises:
            SettingsError: something is wrong with them.
            OSError: the file cannot be read.
        """
        values = {} if self.config is None else read_config(self.config)
        try:
            return Settings(**values | self._given)
        except SettingsError as exc:
            raise SettingsError(exc.name, exc.reason, self.config) from None


def _settings(config: Path | None, given: dict[str, Any]) -> tuple[_Asked, Settings]:
    """What was asked for, checked; errors as the user meets them."""
    hint = "" if config else "; see offload merge --help"
    if not all(given.get("sources", ())):
        raise Failure("a path is empty, expected a file, folder or glob; is a variable unset?", USAGE)
    try:
        asked = _Asked(config, given)
        settings = asked.settings()
    except SettingsError as exc:
        raise Failure(f"{_told(exc)}{hint}", USAGE) from exc
    except OSError as exc:
        raise Failure(sentence(exc, config or ""), USAGE) from exc
    if not settings.sources:
        raise Failure(f"Missing argument 'PATH...', or sources in a --config file{hint}", USAGE)
    if not settings.output:
        raise Failure(f"Missing option '--output' / '-o', or output in a --config file{hint}", USAGE)
    try:
        files = settings.files()
        _check_packer(settings)
    except (ValueError, ImportError) as exc:
        raise Failure(str(exc), USAGE) from exc
    status = settings.status_path
    if status is not None and files.covers(os.path.abspath(status)):
        raise Failure(f"{status}: the status would be one of the sources; give another --status, or off", USAGE)
    return asked, settings


def _check_packer(settings: Settings) -> None:
    """Raises ImportError: nothing here packs segments, which the writer's thread would find out."""
    if settings.segments is not None and settings.segments.compress:
        from .files.seekable import zstandard

        zstandard()


def _told(exc: SettingsError) -> str:
    """The error, with the option's name as it was typed."""
    option = OPTIONS.get(exc.name)
    if exc.path is not None or option is None or not option.flags:
        return str(exc)
    return f"{option.flags[0].partition('/')[0]}: {exc.reason}"


def _check(settings: Settings, *, as_json: bool) -> None:
    """What the settings mean now."""
    files, missing = settings.files().scan()
    status = settings.status_path
    values = {option.key: getattr(settings, name) for name, option in OPTIONS.items()}
    values["status"] = "off" if status is None else os.fspath(status)
    values["by-time"] = settings.ordered is not None
    if as_json:
        found: dict[str, Any] = {"found": sorted(files), "missing": {p: _reason(e) for p, e in missing.items()}}
        print_json(values | found)
    else:
        for key, value in values.items():
            if value not in (None, ()):
                print(f"{key} = {_as_toml(value)}")
        for path in sorted(files):
            print(f"# source: {printable(path)}")
    for path, exc in missing.items():
        say(f"{path}: {_reason(exc)}")
    if missing and not settings.follow:
        raise typer.Exit(NOT_ALL)


def _as_toml(value: object) -> str:
    import json

    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_toml, value))}]"
    return json.dumps(value) if isinstance(value, bool | int | float) else printable(json.dumps(value))


def _run(asked: _Asked, settings: Settings, *, quiet: bool, as_json: bool) -> None:
    import asyncio

    follow, output = settings.follow, settings.output
    progress, stopped = asyncio.run(_Run(asked, settings, quiet=quiet).run())
    problems = {path: _reason(exc) for path, exc in sorted(progress.problems.items())}
    for path, reason in problems.items():
        say(f"{path}: {reason}")
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
            "regressions": progress.regressions,
            "seconds": round(progress.seconds, 6),
            "problems": problems,
            "complete": complete,
        }
        print_json(summary)
    elif not quiet:
        print(_summary(progress, output), file=sys.stderr)
    if stopped and not follow:
        say("stopped before the end; start it again to go on")
    if not complete:
        raise typer.Exit(NOT_ALL)


class _Run:
    """One merge from the command line, and all that goes on beside it; on the loop of the main thread."""

    def __init__(self, asked: _Asked, settings: Settings, *, quiet: bool) -> None:
        self._asked = asked
        self._settings = settings
        self._quiet = quiet
        self._status = settings.status_path
        self._engine = settings.engine(self._on_full)
        self._asked_to_stop = 0.0

    async def run(self) -> tuple[Progress, bool]:
        """Returns how far it came, and whether it was asked to stop."""
        import asyncio

        _allow_descriptors()
        engine, output, follow = self._engine, self._settings.output, self._settings.follow
        if not follow:
            files, missing = self._settings.files().scan()
            if not files:
                sources = self._settings.sources
                missing = missing or {p: FileNotFoundError(errno.ENOENT, "no files in there") for p in sources}
                raise Failure("; ".join(f"{path}: {_reason(exc)}" for path, exc in missing.items()), NOT_ALL)
        try:
            handlers = {"SIGINT": self._stop, "SIGTERM": self._stop}
            if follow:
                handlers["SIGHUP"] = self._reload
            with _on_signals(handlers):
                await _start(engine, output)
                running = asyncio.ensure_future(engine.run())
                notify("READY=1")
                telling = asyncio.ensure_future(self._tell(running))
                if not self._quiet and sys.stderr.isatty():
                    with contextlib.suppress(OffloadError):  # `await running` raises it
                        await _show(engine, running, follow=follow)
                await asyncio.wait([running, telling])
                progress = await running
                await engine.aclose()
        except OffloadError as exc:
            with contextlib.suppress(OffloadError):
                await engine.aclose()
            raise Failure(
                f"{output}: {sentence(exc)}; what is in it stays, start again to go on", code_of(exc)
            ) from exc
        return progress, bool(self._asked_to_stop)

    def _on_full(self, error: OSError | None) -> None:
        told = "goes on" if error is None else f"{_reason(error)}; waits for room, nothing is lost; Ctrl-C ends it"
        say(f"{self._settings.output}: {told}")

    def _stop(self) -> None:
        now = time.monotonic()
        # Sooner it is the same signal, once to us and once to our group.
        if self._asked_to_stop and now - self._asked_to_stop > 1:
            _leave_at_once()
        self._asked_to_stop = self._asked_to_stop or now
        notify("STOPPING=1")
        self._engine.stop()

    def _reload(self) -> None:
        """SIGHUP: read the file again; what is wrong with it changes nothing."""
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            self._take_up(self._asked.settings())
        except (ValueError, ImportError) as exc:
            say(f"{exc}; goes on as before")
        except OSError as exc:
            say(f"{sentence(exc, self._asked.config or '')}; goes on as before")
        notify("READY=1")

    def _take_up(self, wanted: Settings) -> None:
        status = wanted.status_path
        files = wanted.files()
        if status is not None and files.covers(os.path.abspath(status)):
            raise SettingsError("status", f"found {str(status)!r}, which would be one of the sources")
        _check_packer(wanted)
        for key in self._settings.fixed(wanted):
            say(f"{key}: cannot change while it runs, and stays as it is; restart to change it")
        self._engine.reconfigure(
            sources=files,
            linger=wanted.linger,
            segments=wanted.segments if self._settings.segments is not None else None,
            by_time=wanted.ordered,
            max_held="any" if wanted.max_held is None else wanted.max_held,
        )
        if self._status is not None and self._status != status:
            with contextlib.suppress(OSError):
                self._status.unlink()
        self._status = status

    async def _tell(self, running: asyncio.Future[Progress]) -> None:
        """The status, while it runs and at its end; on a thread of its own, for its disk may be slow."""
        import asyncio

        from .loops import LoopThread
        from .merge.status import Teller

        teller = Teller(self._settings.output, self._engine.progress)
        told: str | None = None  # what was wrong
        written: Path | None = None
        async with LoopThread("status") as thread:
            while True:
                over = running.done()
                if self._status is not None and (over or self._status != written or teller.due()):
                    try:
                        written = self._status
                        await thread.call(teller.write, written, running=not over)
                        told = None
                    except OSError as exc:
                        if told != (told := f"{sentence(exc, self._status)}; goes on without a status"):
                            say(told)
                if over:
                    return
                await asyncio.wait([running], timeout=teller.every)


def notify(message: str) -> None:
    """Tell systemd, where it started us with `Type=notify` (sd_notify(3)): a datagram to the socket that it named."""
    import socket

    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        sender.send(message.encode())


async def _start(engine: Merge, output: str) -> None:
    try:
        await engine.start()
    except PacketError as exc:
        raise Failure(f"{bad_file(Path(output), exc)}; it was not touched", BAD_FILE) from exc
    except OSError as exc:
        raise Failure(sentence(exc, output), NO_OUTPUT) from exc
    done, kept = engine.progress.repair, engine.progress.damaged
    if done is not None and kept is not None:
        for damage in done.damages:
            size = damage.end - damage.start
            say(f"{output}: byte {damage.start}: {size} bytes hold no valid frame: {damage.reason}")
        found = f"{plural(done.filled, 'line')} read again, {plural(len(done.gaps), 'gap')} stated"
        say(f"{output}: written anew with all that is valid, {found}; the damaged one is beside it: {kept.name}")


def _leave_at_once() -> NoReturn:
    """Asked again: now. What is in the packet file stays right, for it always is."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h\n")  # the status line had hidden the cursor
    say("left at once; start it again to go on")
    os._exit(INTERRUPTED)


def _allow_descriptors() -> None:
    """As many open files as the system grants without asking: one for each source that is followed."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _on_signals(handlers: dict[str, Callable[[], None]]) -> Iterator[None]:
    """Call these for signals, as far as the system has them, instead of what they do otherwise."""
    import asyncio

    loop = asyncio.get_running_loop()
    numbers = {getattr(signal, name): function for name, function in handlers.items() if hasattr(signal, name)}
    try:
        for number, function in numbers.items():
            loop.add_signal_handler(number, function)
    except NotImplementedError:  # Windows
        before = {n: signal.signal(n, lambda *_, function=function: function()) for n, function in numbers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
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
                in_bytes(progress.bytes),
                f"{in_bytes(rate)}/s",
                f"lag {in_bytes(lag)}",
            ]
            if lag and rate > 1 and not (follow and progress.caught_up):
                parts.append(f"{in_time(lag / rate)} left")
            if progress.problems:
                parts.append(f"{len(progress.problems)} not read")
            if progress.full is not None:
                parts.insert(0, f"waits for room: {_reason(progress.full)}")
            live.update(Text("  ·  ".join(parts), overflow="ellipsis", no_wrap=True), refresh=True)
            await asyncio.wait([running], timeout=0.2)


def _summary(progress: Progress, output: str) -> str:
    seconds = progress.seconds
    gaps = f", {plural(progress.gaps, 'gap')}" if progress.gaps else ""
    if progress.regressions:
        gaps += f"; {plural(progress.regressions, 'source')} had lost an end that is kept here"
    return (
        f"{output}: {plural(progress.lines, 'line')} ({in_bytes(progress.bytes)}) from "
        f"{plural(progress.sources, 'source')} in {seconds:.2f} s{gaps}"
    )


def _reason(exc: OSError) -> str:
    return exc.strerror or str(exc)
