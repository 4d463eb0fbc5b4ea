"""The workload of `offload torture` through others: how many lines are lost, doubled, too late and torn, beside ours.

Five logs, renamed and made anew, copied and truncated, packed, with lines torn and lines that come late to the old
file; the same seed for all. A log is rotated once in ROTATE seconds at most, so that those who look by time have
looked; so the runs differ a little. All but `tail` are killed with SIGKILL and started again at the same steps; `tail`
keeps no state, and is left alone. Then each line is counted. Speed plays no part.

pygtail (pip install pygtail) is a library that a job calls now and then: here a loop calls it ten times a second.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench_merge import rsyslogd, text_lines
from measure import Options, Table, environment, memory_folder, offload_command, tell

from offload.merge.torture import read_lines
from offload.merge.workload import Checker, Findings, Workload

SEED = 1
PAUSE = 0.008  # seconds between two steps, at most
ROTATE = 1.0
SETTLED = 2.0  # seconds without a new byte after which a program is done
LONGEST = 2000  # bytes of a line: what all of them can keep

_RSYSLOG = """
global(workDirectory="{work}" maxMessageSize="64k")
module(load="imfile" mode="inotify")
template(name="raw" type="string" string="%msg%\\n")
input(type="imfile" File="{logs}/*.log" Tag="x" reopenOnTruncate="on" persistStateInterval="{interval}"
      freshStartTail="off" ruleset="out")
ruleset(name="out"){{ action(type="omfile" file="{output}" template="raw" ioBufferSize="64k" flushOnTXEnd="off") }}
"""

_PYGTAIL = """
import glob, os, sys, time
from pygtail import Pygtail
logs, output, work = sys.argv[1:]
with open(output, "ab", buffering=0) as out:
    while True:
        for path in sorted(glob.glob(os.path.join(logs, "*.log"))):
            offsets = os.path.join(work, os.path.basename(path))
            for line in Pygtail(path, offset_file=offsets, copytruncate=True, every_n=1, encoding="latin-1"):
                out.write(line.encode("latin-1"))
        time.sleep(0.1)
"""


@dataclass
class Place:
    """Where a program reads, writes and keeps its state."""

    logs: Path
    output: Path
    work: Path


@dataclass
class Program:
    """How to start it, and how to read what it wrote."""

    command: Callable[[Place], list[str]]
    lines: Callable[[Path], Iterable[bytes]] = text_lines
    killed: bool = True
    to_stdout: bool = False


def offload_merge(place: Place) -> list[str]:
    return [*offload_command(), "merge", "-f", "--quiet", "-o", str(place.output), str(place.logs / "*.log")]


def tail(place: Place) -> list[str]:
    return ["tail", "-n", "+1", "-F", "-q", *(str(place.logs / f"{name}.log") for name in "abcde")]


def pygtail(place: Place) -> list[str]:
    return [sys.executable, "-c", _PYGTAIL, str(place.logs), str(place.output), str(place.work)]


def rsyslog(interval: int) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        config = place.work / "rsyslog.conf"
        config.write_text(
            _RSYSLOG.format(work=place.work, logs=place.logs, output=place.output, interval=interval), encoding="utf-8"
        )
        (place.work / "rsyslog.pid").unlink(missing_ok=True)  # of the one that was killed
        return [str(rsyslogd()), "-n", "-f", str(config), "-i", str(place.work / "rsyslog.pid")]

    return command


def torment(program: Program, folder: Path, steps: int, kills: int) -> tuple[Findings, int]:
    """Run the workload and the program; what is wrong with what it wrote, and how many lines there were."""
    place = Place(folder / "logs", folder / "out", folder / "work")
    for each in (place.logs, place.work):
        each.mkdir()
    workload = Workload(place.logs, f"{SEED}", longest=LONGEST, plain=True, rotations=0.1)
    rotated: dict[Path, float] = {}

    def may_rotate(path: Path) -> bool:
        now = time.monotonic()
        if now - rotated.setdefault(path, now) < ROTATE:
            return False
        rotated[path] = now
        return True

    chance = random.Random(SEED)
    killed = set(chance.sample(range(steps // 10, steps), kills)) if program.killed else set()
    process = start(program, place)
    try:
        settle(place.output)
        workload.may_rotate = may_rotate
        for step in range(steps):
            workload.step()
            if step in killed:
                process.kill()
                process.wait()
                process = start(program, place)
            time.sleep(chance.random() * PAUSE)
        workload.finish()
        settle(place.output)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        workload.close()
    checker = Checker(workload.written)
    for line in program.lines(place.output):
        checker.take(line)
    return checker.end(), workload.lines


def start(program: Program, place: Place) -> subprocess.Popen[bytes]:
    with open(place.output if program.to_stdout else os.devnull, "ab") as out:
        return subprocess.Popen(program.command(place), stdout=out, stderr=subprocess.DEVNULL, env=environment())


def settle(path: Path) -> None:
    """Wait until a file has not grown for SETTLED seconds."""
    size, since = -1, time.monotonic()
    while time.monotonic() - since < SETTLED:
        now = path.stat().st_size if path.exists() else -1
        if now != size:
            size, since = now, time.monotonic()
        time.sleep(0.05)


def run(options: Options) -> list[Table]:
    steps, kills = options.count(4000, 400), options.count(20, 4)
    programs = {"offload merge": Program(offload_merge, read_lines)}
    notes = [f"seed {SEED}, {steps:,} steps, a rotation of a log each {ROTATE:.0f} s at most"]
    if rsyslogd() and sys.platform == "linux":
        for interval in (1000, 1):
            programs[f"rsyslog imfile, persistStateInterval={interval}"] = Program(rsyslog(interval))
    else:
        notes.append("rsyslog is not installed: left out")
    if shutil.which("tail"):
        programs["tail -F"] = Program(tail, killed=False, to_stdout=True)
    if importlib.util.find_spec("pygtail"):
        programs["pygtail, ten times a second"] = Program(pygtail)
    else:
        notes.append("pygtail is not installed: left out (pip install pygtail)")
    table = Table(
        "Rotation, late lines and kills", ("program", "kills", "lines", "lost", "doubled", "reordered", "torn")
    )
    for name, program in programs.items():
        tell(f"torture: {name}")
        with memory_folder() as folder:
            found, lines = torment(program, folder, steps, kills)
        counts = (found.lost, found.doubled, found.reordered, found.garbled)
        table.rows.append((name, str(kills if program.killed else 0), f"{lines:,}", *(f"{n:,}" for n in counts)))
    table.notes += notes
    return [table]
