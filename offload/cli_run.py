"""`offload run`: a program as it is, with every event loop of it watched.

Promises:
    - The program runs as by `python script.py args…` or `python -m module args…`: in this process, on the main thread,
      as `__main__`, with its own `sys.argv`, `sys.path[0]`, standard streams, exit code and traceback. An exception, a
      Ctrl-C and `sys.exit(…)` pass through to the interpreter, which does with them what it always does.
    - What comes after the name of the script or module is the program's own, whatever it looks like.
    - The reports are written when the program has ended, after its threads and its own `atexit` functions, however it
      ended: by its last line, an exception, Ctrl-C or SIGTERM. Not after `os._exit`, `exec` or SIGKILL, which leave
      no moment for it. Processes that the program starts or forks are not watched, and write nothing.

What the program can see of it: modules that are imported already, our threads, frames below its own in
`traceback.print_stack()`, handlers of SIGTERM and SIGURG where there were the defaults, `signal.set_wakeup_fd` in use,
and on Python 3.12 and later a filter for the warning about forking with threads, since those threads are ours.

How: typer's frames would stand in every traceback, and it turns Ctrl-C into something else. So the command only reads
its options and hands a Program back to `cli.main`, which calls it when typer has left the stack.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_signals import Waker

if TYPE_CHECKING:
    from .cli_live import LiveView
    from .debug.record import Report
    from .debug.slow import SlowCallbackDetector

STALLED, UNWRITTEN = 3, 4

EXIT_CODES = (
    "Exit codes: the program's own; if that is 0: 3 with --fail when the program blocked an event loop, 4 when a "
    "report could not be written. 2 is wrong usage, too: then the program was not begun."
)

SETTINGS = {"allow_interspersed_args": False}  # for typer: what follows the script is the program's


def run(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT [ARGS]...", help="The program and its own arguments.", show_default=False),
    ],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as for python -m.")] = False,
    threshold: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.001, help="Report what holds a loop for longer than this.")
    ] = 0.05,
    report: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Write a report at the end, in the form of its ending: .json, .html, .xml, .sarif or .folded. "
            "May be given several times.",
            show_default=False,
        ),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Show the loops at the bottom of the terminal.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also see into operators that hold the GIL; takes faulthandler's timer.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Code that may block, as glob-of-file:function. May be given several times.",
            show_default=False,
        ),
    ] = None,
    fail: Annotated[
        bool, typer.Option("--fail", help="Exit with 3 instead of 0 if the program blocked an event loop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No log lines and no table at the end.")] = False,
) -> Program:
    """Run a Python program with all its event loops watched: what blocked them, where and why.

    The program need not be changed; its arguments, output, errors and exit code stay its own.
    """
    session = Session(threshold, report or [], live=live, deep=deep, allow=allow or [], fail=fail, quiet=quiet)
    return Program(arguments[0], arguments[1:], module=module, session=session)


class Program:
    """The user's program: call it once, on the main thread, from a stack that is ours alone.

    Args:
        name: a script, a folder or zip file with a `__main__.py`, or the name of a module if `module`.
        arguments: the program's own.

    Raises:
        typer.BadParameter: the script cannot be read.
    """

    def __init__(self, name: str, arguments: list[str], *, module: bool, session: Session) -> None:
        self._name, self._arguments, self._module, self._session = name, arguments, module, session
        self._is_package = False
        if not module:
            # Joined, not normalised: so it stands in the tracebacks of Python, too.
            self._path = os.path.join(os.getcwd(), name)
            try:
                self._is_package = _is_package(name)
            except OSError as exc:
                raise typer.BadParameter(f"{name}: {exc.strerror}", param_hint="SCRIPT") from exc

    def __call__(self) -> None:
        """Run it; returns when its main module has.

        Raises:
            BaseException: what the program raised. The interpreter will show its traceback without our frames.
        """
        sys.modules["__main__"] = main = ModuleType("__main__")
        main.__dict__.update(__builtins__=builtins, __annotations__={})
        sys.argv = ["-m" if self._module else self._name, *self._arguments]
        self._set_first_path()
        session = self._session
        session.start()
        session.code = 1
        body = self._compiled(main)
        try:
            body()
        except SystemExit as exc:
            session.code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
            raise
        except BaseException as exc:
            session.interrupted = type(exc) is KeyboardInterrupt
            # The first two frames are this one and that of `body`.
            _show_with(exc, exc.__traceback__ and exc.__traceback__.tb_next and exc.__traceback__.tb_next.tb_next)
            raise
        session.code = 0

    def _set_first_path(self) -> None:
        """Put what Python would have put there first into `sys.path`, in the place of the command's own folder."""
        if self._module:
            first = os.getcwd()
        elif self._is_package:
            first = self._path
        else:
            first = os.path.dirname(os.path.realpath(self._path))
        if not sys.flags.safe_path:
            sys.path[0] = first
        elif self._is_package:
            sys.path.insert(0, first)

    def _compiled(self, main: ModuleType) -> Callable[[], object]:
        """What runs the program as `main`."""
        if self._module or self._is_package:
            import runpy

            # What the interpreter itself calls for `-m`, a folder and a zip file.
            run_module = runpy._run_module_as_main  # type: ignore[attr-defined]
            return lambda: run_module(self._name if self._module else "__main__", self._module)
        path = self._path
        compiled = path.endswith(".pyc")
        loader = (SourcelessFileLoader if compiled else SourceFileLoader)("__main__", path)
        main.__dict__.update(__file__=path, __cached__=None, __loader__=loader)
        try:
            code = loader.get_code("__main__") if compiled else loader.source_to_code(loader.get_data(path), path)
        except (SyntaxError, ValueError, ImportError) as exc:
            _show_with(exc, None)
            raise
        assert code is not None, "both loaders raise instead"
        return lambda: exec(code, main.__dict__)


def _is_package(path: str) -> bool:
    """Whether it is a folder or a zip file, which Python searches for a `__main__`; OSError if it cannot be read."""
    if os.path.isdir(path):
        return True
    open(path, "rb").close()
    from zipimport import ZipImportError, zipimporter

    with contextlib.suppress(ZipImportError):
        zipimporter(path)
        return True
    return False


def _show_with(exc: BaseException, traceback: TracebackType | None) -> None:
    """Let whatever will show this uncaught exception begin at `traceback`, in the program's own first frame."""
    show = sys.excepthook  # the program may have set its own

    def hook(kind: type[BaseException], value: BaseException, tb: TracebackType | None) -> None:
        if value is exc:
            # On its way out of here the exception has collected our frames again.
            value.__traceback__ = tb = sys.last_traceback = traceback
        show(kind, value, tb)

    sys.excepthook = hook


@dataclass
class Session:
    """The detector around one program, and what becomes of its findings.

    Attributes:
        code: the program's exit code, as far as it is known.
        interrupted: it was ended by Ctrl-C.

    Raises:
        typer.BadParameter: a report of such a name could not be written.
    """

    threshold: float
    reports: list[Path]
    live: bool
    deep: bool
    allow: list[str]
    fail: bool
    quiet: bool
    code: int = 0
    interrupted: bool = False
    _pid: int = 0  # of the process that reports; 0: not begun, or done
    _detector: SlowCallbackDetector = field(init=False)
    _view: LiveView | None = None

    def __post_init__(self) -> None:
        self.reports = [_checked(path) for path in self.reports]

    def start(self) -> None:
        """Watch from now on until the process ends. Main thread."""
        from .debug.slow import SlowCallbackDetector

        if self.live:
            self._view = self._begin_view()
        self._detector = SlowCallbackDetector(
            threshold=self.threshold,
            every_loop=True,
            on_stall=self._view.on_stall if self._view else None,
            log=not self.quiet and self._view is None,
            allow=self.allow,
            deep=self.deep,
        )
        self._pid = os.getpid()
        atexit.register(self._finish)  # before any of the program's, so it runs after them
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._on_sigterm)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=self._forget)
        Waker().start()
        if sys.version_info >= (3, 12):
            warnings.filterwarnings("ignore", r"This process \(pid=\d+\) is multi-threaded", DeprecationWarning)
        self._detector.start()
        if self._view:
            self._view.start(self._detector.report)

    def _begin_view(self) -> LiveView | None:
        if sys.stderr is None or not sys.stderr.isatty():
            _say("--live needs a terminal on stderr; going on without")
            return None
        from .cli_live import LiveView

        return LiveView(self.threshold)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """The default is to end at once and without `atexit`: so it does, but for the reports."""
        signal.signal(number, signal.SIG_DFL)  # a second one ends even this
        self.code = 128 + number
        try:
            self._finish()
        finally:
            signal.raise_signal(number)

    def _forget(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _finish(self) -> None:
        """Report, once, in the process that was started and in none that it forked."""
        if self._pid != os.getpid():
            return
        self._pid = 0
        if self._view:
            self._view.stop()
        report = self._detector.stop()
        written = [self._write(report, path) for path in self.reports]
        if not self.quiet:
            self._show(report)
        if self.interrupted and os.name == "posix":
            # The interpreter would end by the signal, too, had it not forgotten why: it does when text is compiled.
            _flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        elif self.code == 0 and not all(written):
            _flush()
            os._exit(UNWRITTEN)
        elif self.code == 0 and self.fail and report.verdict == "fail":
            _flush()
            os._exit(STALLED)

    def _write(self, report: Report, path: Path) -> bool:
        from .debug.report import write

        try:
            write(report, path)
        except OSError as exc:
            _say(f"{path}: {exc.strerror or exc}")
            return False
        return True

    def _show(self, report: Report) -> None:
        if sys.__stderr__ is None:
            return
        from rich.console import Console

        from .debug.report import table

        text = table(report)
        with contextlib.suppress(OSError, ValueError):  # gone, or closed
            Console(file=sys.__stderr__).print(text)


def _checked(path: Path) -> Path:
    """The path of a report, absolute, for the program may go elsewhere."""
    from .debug.report import check_ending

    try:
        check_ending(path)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--report") from exc
    path = path.absolute()
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{path}: no such folder", param_hint="--report")
    return path


def _flush() -> None:
    """What the interpreter would still do after our `atexit` function, the last one, if we let it."""
    logging = sys.modules.get("logging")
    if logging is not None:  # its own function was registered before ours
        logging.shutdown()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):  # gone, or closed
            if stream is not None:
                stream.flush()


def _say(message: str) -> None:
    _print(f"offload: {message}")


def _print(text: str) -> None:
    """On the stderr that the process was given: by now the program may have put something else in its place."""
    if sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):  # gone, or closed: then nobody can be told
            print(text, file=sys.__stderr__, flush=True)
