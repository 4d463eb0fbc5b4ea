"""The command `offload torture`. What it needs is imported when it runs."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .merge.torture import Report, Torture

NOT_ALL, INTERRUPTED = 1, 130


def register(app: typer.Typer, epilog: str) -> None:
    """Add the command of this module."""
    app.command(epilog=epilog)(torture)


def torture(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]",
            help="Where to write, on the disk that is to be tried; empty or not there yet.",
            show_default="a new folder",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="N", min=0.1, help="How long; some 250 kB of logs a second.")
    ] = 60.0,
    seed: Annotated[
        int | None, typer.Option(metavar="S", help="Of all that is random: to repeat a run.", show_default="random")
    ] = None,
    wild: Annotated[
        bool, typer.Option("--wild", help="Rotate logs again before anything of them was read, as in a long stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")] = False,
) -> None:
    """Try the promise on your own disk: logs are written, rotated and packed while the merge is killed again and again.

    Then each line is looked for: lost, doubled, reordered and garbled ones are counted, and the seed is told that
    repeats them. Ctrl-C ends it early and checks what there is. Exit code 0: there are none.
    """
    from .merge.torture import Torture

    if not hasattr(os, "fork"):
        raise typer.BadParameter("needs SIGKILL and files that are renamed while they are open: no Windows")
    folder = Path(tempfile.mkdtemp(prefix="offload-torture-")) if directory is None else directory
    running = Torture(folder, random.randrange(1 << 32) if seed is None else seed, seconds=seconds, wild=wild)
    _run(running, seconds)
    report = running.report
    if as_json:
        print(json.dumps(_record(report, folder)), flush=True)
    else:
        for text in _sentences(report, folder, "--wild " if wild else ""):
            print(text.encode(errors="surrogateescape").decode(errors="backslashreplace"), flush=True)
    if not report.findings.ok:
        raise typer.Exit(NOT_ALL)


def _run(running: Torture, seconds: float) -> None:
    """Run it to its end, with a progress bar on a terminal; Ctrl-C or SIGTERM ends it early, the second one at once."""
    asked = 0.0

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        now = time.monotonic()
        if asked and now - asked > 1:  # sooner it is the same signal, once to us and once to our group
            raise KeyboardInterrupt
        asked = asked or now
        running.stop()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    steps = running.run()
    try:
        if sys.stderr.isatty():
            _show(running, steps, seconds)
        else:
            for _ in steps:
                pass
    finally:
        steps.close()  # ends the merge that it has started
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(running: Torture, steps: Any, seconds: float) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task, then = bar.add_task("", total=seconds), 0.0
        for doing in steps:
            if (now := time.monotonic()) - then > 0.1:
                report, then = running.report, now
                kills = report.did["kills"]
                about = f"seed {report.seeds[-1]}  ·  {report.lines:,} lines  ·  {kills} kills  ·  {doing}"
                bar.update(task, completed=min(report.seconds, seconds), description=about, refresh=True)


def _sentences(report: Report, folder: Path, options: str) -> list[str]:
    found, did = report.findings, report.did
    seeds = f"seed {report.seeds[0]}" if len(report.seeds) == 1 else f"seeds {report.seeds[0]} to {report.seeds[-1]}"
    texts = [
        f"{folder}: {report.lines:,} lines ({report.bytes / 1e6:.1f} MB) in {report.seconds:.1f} s, {seeds}",
        "  " + ", ".join(f"{count:,} {what}" for what, count in sorted(did.items())),
        f"  lost {found.lost}, doubled {found.doubled}, reordered {found.reordered}, garbled {found.garbled}",
    ]
    texts += [f"  {text}" for text in (*found.examples, *found.faults)]
    texts += [f"  stated as lost: {text}" for text in found.gaps]
    if found.ok:
        return [*texts, "Every line is in the packet file once, in order and as it was."]
    seed = report.seeds[-1]
    again = f"to repeat it: offload torture {options}--seed {seed}"
    return [*texts, f"NOT every line is there once, in order and as it was; {again}; {folder / f'seed-{seed}'} has it."]


def _record(report: Report, folder: Path) -> dict[str, Any]:
    found = report.findings
    return {
        "folder": os.fspath(folder),
        "ok": found.ok,
        "seeds": report.seeds,
        "lines": report.lines,
        "bytes": report.bytes,
        "seconds": round(report.seconds, 3),
        "did": dict(report.did),
        "lost": found.lost,
        "doubled": found.doubled,
        "reordered": found.reordered,
        "garbled": found.garbled,
        "faults": found.faults,
        "gaps": found.gaps,
        "examples": found.examples,
    }
