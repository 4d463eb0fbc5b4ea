"""The workload that other collectors lose or double lines of: rotation, late lines and twenty kills, at the same time.

Three logs of 6,000 lines; a.log is renamed and made anew, b.log is copied and truncated, and a program goes on to write
to the file that was a.log. Meanwhile the merge is killed with SIGKILL 20 times, and started again at once. Of these
lines rsyslog loses 366 or doubles 5,000, syslog-ng loses 1,070, and `tail -F` without a kill loses 18 to 31.

    OFFLOAD_KILL_SEED  what to begin the random choices with; a failure names the one it had
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import pytest

import offload
from offload.merge.audit import verify
from offload.merge.split import stat
from offload.merge.torture import read_lines
from offload.merge.workload import Checker, Findings
from offload.merge.workload import line as make_line

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL, rename under descriptors")]

SEED = int(os.environ.get("OFFLOAD_KILL_SEED", str(random.randrange(1 << 32))))
KILLS, LINES, LATE = 20, 6000, 10
PATIENCE = 60.0
MAX_CUT = 3000  # bytes that a kill may take off the packet file's end as well


class Writer:
    """Three programs and a logrotate: `steps` gives out what they do, a little at a time."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.written: Counter[bytes] = Counter()
        self._folder = folder
        self._chance = chance

    def line(self, name: str, number: int) -> bytes:
        self.written[name.encode()] += 1
        return make_line(name.encode(), number, b"x" * self._chance.randrange(30, 100))

    def steps(self) -> Iterator[int]:
        """Write on; gives the number of lines that each log has."""
        files = {name: (self._folder / f"{name}.log").open("ab", buffering=0) for name in "abc"}
        old = None
        for number in range(LINES):
            if number == 2500:
                old = files["a"]
                (self._folder / "a.log").rename(self._folder / "a.log.1")
                files["a"] = (self._folder / "a.log").open("ab", buffering=0)
                shutil.copy(self._folder / "b.log", self._folder / "b.log.1")
                os.truncate(self._folder / "b.log", 0)
            for name, file in files.items():
                line = self.line(name, number)
                cut = self._chance.randrange(1, len(line))
                file.write(line[:cut])
                file.write(line[cut:])
            if old is not None and number in (2510, 2600):
                first = 0 if number == 2510 else LATE
                old.write(b"".join(self.line("late", first + late) for late in range(LATE)))
            yield number
        assert old is not None
        for log in (*files.values(), old):
            log.close()


@contextmanager
def merging(folder: Path, out: Path, glob: str) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | {"PYTHONPATH": str(Path(offload.__file__).parents[1])}
    command = [sys.executable, "-m", "offload", "merge", "-f", "--quiet", str(folder / glob), "-o", str(out)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def write(steps: Iterator[int], count: int) -> bool:
    """Do so many; whether there was one left."""
    return sum(1 for _ in islice(steps, count)) > 0


def wait(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Until the condition holds; a hundred times a second."""
    for _ in range(int(PATIENCE * 100)):
        if condition():
            return
        with suppress(subprocess.TimeoutExpired):
            raise AssertionError(f"it ended with {process.wait(0.01)}")
    raise AssertionError(f"nothing came for {PATIENCE} s, seed {SEED}")


def size(out: Path) -> int:
    return out.stat().st_size if out.exists() else 0


@pytest.mark.parametrize("glob", ["*.log", "*.log*"])
@pytest.mark.parametrize("torn", [False, True], ids=["killed", "killed and torn"])
def test_nothing_is_lost_or_doubled(tmp_path: Path, glob: str, torn: bool) -> None:
    """Each of the 18,021 lines is in the packet file once, those of each log in order, and no gap is stated."""
    chance = random.Random(f"{SEED} {glob} {torn}")
    folder, out = tmp_path / "logs", tmp_path / "merged.opk"
    folder.mkdir()
    writer = Writer(folder, chance)
    steps = writer.steps()
    for kill in range(KILLS):
        with merging(folder, out, glob) as process:
            at = size(out)
            # Otherwise it is killed while it starts, or everything may be in the packet file already.
            if write(steps, LINES // KILLS // 2) and kill % 4:
                wait(process, lambda at=at: size(out) > at)  # type: ignore[misc]
            write(steps, chance.randrange(LINES // KILLS))
            assert process.poll() is None
        if torn and out.exists() and size(out) > 2 * MAX_CUT:
            os.truncate(out, size(out) - chance.randrange(MAX_CUT))
    with merging(folder, out, glob) as process:
        write(steps, LINES)
        with (folder / "c.log").open("ab") as log:  # so that there is something to wait for
            log.write(writer.line("c", LINES))
        wait(process, lambda: stat(out).lines >= writer.written.total())
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    checker = Checker(writer.written)
    for line in read_lines(out):
        checker.take(line)
    assert checker.end() == Findings(), f"seed {SEED}"
    audit = verify(out)
    assert (audit.faults, audit.gaps) == ([], []), f"seed {SEED}"
