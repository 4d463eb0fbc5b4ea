"""The command line: `offload merge | cat | verify | split | stat | export | repair | demo | run | serve | send`, and
`offload status | torture | doctor`.

The only place that prints, with `cli_merge`, `cli_read` for what reads packet files, `cli_run` and `cli_live` for
`offload run`, `cli_net` for `serve` and `send`, `cli_status`, `cli_torture`, `cli_doctor`, and `cli_text`, which they
share.
Results go to stdout, everything else to stderr; a status line only if that is a terminal.
What a command needs is imported when it runs, so that `offload --version` starts as fast as Python lets it.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.models import CommandInfo

from . import __version__, cli_doctor, cli_merge, cli_net, cli_read, cli_run, cli_status, cli_torture
from .cli_text import (
    EXIT_CODES,
    INTERRUPTED,
    NO_OUTPUT,
    NOT_ALL,
    OK,
    USAGE,
    Failure,
    code_of,
    say,
    sentence,
)
from .errors import OffloadError

if TYPE_CHECKING:
    pass


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Merge growing logs into one packet file, exactly once, and take them out again.",
    epilog=EXIT_CODES,
)


def main() -> NoReturn:
    """The `offload` command; ends the process with one of EXIT_CODES, or as the program of `offload run` does."""
    stdout, stderr = sys.stdout, sys.stderr
    errors = getattr(stdout, "errors", None)
    if sys.stdout is None:  # started with it closed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    buffer = getattr(sys.stdout, "buffer", None)
    if isinstance(buffer, io.RawIOBase):  # `python -u`: a write that a signal cut short would lose the rest in silence
        sys.stdout = open(buffer.fileno(), "w", encoding=sys.stdout.encoding, closefd=False)  # noqa: SIM115
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path may be any bytes
    every = app.registered_commands
    # Only what is asked for is built: reading the options of them all takes a tenth of a short command's time.
    asked = "".join(sys.argv[1:2])
    wanted = [each for each in every if asked in (_name(each), "--version")]
    app.registered_commands = wanted[:1] or every
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except Failure as exc:
        say(str(exc))
        code = exc.code
    except (typer.Abort, KeyboardInterrupt):
        say("interrupted")
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        code = NOT_ALL
    except Exception as exc:
        code = _explain(exc)
    finally:
        app.registered_commands = every
    if isinstance(code, cli_run.Program):
        with contextlib.suppress(AttributeError):
            stdout.reconfigure(errors=errors)  # type: ignore[union-attr]
        sys.stdout, sys.stderr = stdout, stderr
        code()  # outside of the `try`: what the program raises is its own
        sys.exit(OK)
    try:
        sys.stdout.flush()
    except OSError:  # told already; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code or OK)


def _name(command: CommandInfo) -> str:
    return str(command.name or getattr(command.callback, "__name__", ""))


def _explain(exc: Exception) -> int:
    """One line for an error that a command did not expect; a bug of ours is still told in full."""
    if isinstance(exc, OffloadError | OSError):
        say(sentence(exc, "stdout"))
        return code_of(exc)
    wording = getattr(exc, "format_message", None)  # wrong usage
    if wording is None:
        raise exc
    context = getattr(exc, "ctx", None)
    command = "offload" if context is None or context.parent is None else f"offload {context.info_name}"
    if message := wording():  # none, if the help was shown instead
        say(f"{message.rstrip('.')}; see {command} --help")
    return USAGE


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


cli_merge.register(app, EXIT_CODES)
cli_read.register(app, EXIT_CODES)


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
        raise Failure(sentence(exc), NO_OUTPUT) from exc


app.command(epilog=cli_run.EXIT_CODES, context_settings=cli_run.SETTINGS)(cli_run.run)
cli_net.register(app, EXIT_CODES)
cli_torture.register(app, EXIT_CODES)
cli_status.register(app, EXIT_CODES)
cli_doctor.register(app, EXIT_CODES)
