"""What all benchmarks here share: figures of several rounds, tables of them, and the machine that they come from.

A figure is the median over the rounds with its quartiles behind it, `12.3 (11.9–12.8)`. A ratio is taken within each
round, where both sides met the same machine, and is a median of these ratios: not a ratio of two medians.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Options:
    """How much work to do.

    Attributes:
        rounds: how often each contestant runs; None: what the benchmark thinks right.
        quick: little work, to see that everything runs; the figures mean little.
        large: also what takes minutes and gigabytes.
    """

    rounds: int | None = None
    quick: bool = False
    large: bool = False

    def count(self, normal: int, quick: int) -> int:
        return quick if self.quick else normal

    def round_count(self, normal: int) -> int:
        return self.rounds or self.count(normal, 2)


class Figures:
    """Numbers by contestant and quantity, one for each round."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], list[float]] = defaultdict(list)

    def add(self, name: str, quantity: str, value: float) -> None:
        self._values[name, quantity].append(value)

    def has(self, name: str, quantity: str) -> bool:
        return (name, quantity) in self._values

    def median(self, name: str, quantity: str) -> float:
        return statistics.median(self._values[name, quantity])

    def show(self, name: str, quantity: str, scale: float = 1.0) -> str:
        """Median and quartiles, times `scale`; a dash if nobody measured it."""
        return spread([v * scale for v in self._values.get((name, quantity), ())])

    def ratio(self, name: str, other: str, quantity: str) -> str:
        """How many times `other` the figure of `name` is, round by round."""
        mine, theirs = self._values.get((name, quantity), ()), self._values.get((other, quantity), ())
        if name == other or not mine or not theirs:
            return "–"
        return spread([a / b for a, b in zip(mine, theirs, strict=True)], "x")


def spread(values: Sequence[float], unit: str = "") -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{number(values[0])}{unit}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{number(middle)}{unit} ({number(low)}–{number(high)})"


def number(value: float) -> str:
    """Three digits that matter."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


@dataclass
class Table:
    """A titled table that reads as plain text and as markdown; the first column is text, the others are figures."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [max(len(row[i]) for row in (self.head, *self.rows)) for i in range(len(self.head))]

        def line(cells: Sequence[str]) -> str:
            texts = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
            return f"| {' | '.join(texts)} |"

        rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        lines = [f"### {self.title}", "", line(self.head), line(rule), *map(line, self.rows), ""]
        if self.notes:
            lines += [*(f"- {note}" for note in self.notes), ""]
        return "\n".join(lines)


def machine() -> str:
    """What the figures depend on, and nothing that names a machine."""
    model = ""
    with_info = Path("/proc/cpuinfo")
    if with_info.exists():
        names = [line.split(":", 1)[1].strip() for line in with_info.read_text().splitlines() if "model name" in line]
        model = f" ({names[0]})" if names else ""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{len(cpus())} CPUs{model}, {platform.system()} {platform.release()}, "
        f"{platform.python_implementation()} {platform.python_version()}{load}"
    )


def cpus() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shuffled(names: Sequence[str], round_number: int) -> list[str]:
    """An order of its own for each round, the same in each run: nobody always comes after the same neighbour."""
    order = list(names)
    random.Random(round_number).shuffle(order)
    return order


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder on tmpfs where there is one, removed at the end."""
    shm = Path("/dev/shm")
    base = shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="offload-bench-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(text: str) -> None:
    """What is being done, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


# --- whole programs --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run of a program, from before it was started to after it had ended."""

    seconds: float
    cpu: float
    rss: int  # peak, in bytes


# A process's peak memory begins with that of the one that started it. So a small one stands between: it imports
# next to nothing, and what it measures is ours alone.
_LAUNCHER = """
import os, sys, time
argv, out = sys.argv[2:], sys.argv[1]
actions = [(os.POSIX_SPAWN_OPEN, 1, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)]
start = time.perf_counter()
pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
_, status, usage = os.wait4(pid, 0)
seconds = time.perf_counter() - start
print([os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss])
"""


def run_program(*argv: str, stdout: str = os.devnull) -> Run:
    """Run a program to its end, its output into a file; a failure of it is one of ours."""
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, stdout, *argv]
    done = subprocess.run(launcher, stdout=subprocess.PIPE, text=True, check=True, env=environment())
    code, seconds, cpu, rss = json.loads(done.stdout)
    if code != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with {code}")
    return Run(seconds, cpu, rss if sys.platform == "darwin" else rss * 1024)


@functools.cache
def environment() -> dict[str, str]:
    """What programs run with: byte code is kept, as it is where a package was installed, but not in this tree."""
    folder = tempfile.mkdtemp(prefix="offload-bench-code-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPYCACHEPREFIX": folder}


def offload_command() -> list[str]:
    """The installed console script, else the package as a module."""
    script = Path(sys.executable).with_name("offload")
    return [str(script)] if script.exists() else [sys.executable, "-m", "offload"]
