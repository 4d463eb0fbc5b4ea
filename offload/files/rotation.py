"""When a file that is appended to makes way for a new one, and where it goes.

Promises: a rotation only renames, so no line is written twice or moved; killed between any two of its steps it has lost
nothing, and the next one goes on. A file is never renamed over another, except over the oldest of `keep`.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

# How many digits strftime gives; what is not here is a name.
_DIGITS = {"Y": r"\d{4}", "j": r"\d{3}", "u": r"\d", "w": r"\d", "s": r"\d+", "%": "%"} | dict.fromkeys(
    "mdHMSyUWVI", r"\d\d"
)


@dataclass(frozen=True, slots=True)
class Rotation:
    """When to rotate a file, and what its old parts are called.

    Args:
        max_bytes: rotate before the write that would take the file over it; a larger write gets a file of its own.
        every: seconds; rotate before the first write of a new period. Periods begin at local midnight, and count on
            from there: 3600 is each full hour. A file that was there counts from its last change.
        suffix: a strftime pattern; `app.log` becomes `app.log.2026-11-21`, by the time at which it was begun, and
            `.1`, `.2` … behind that if there is one already. None: it becomes `app.log.1`, what was that
            `app.log.2`, and so on.
        keep: so many old parts at most; None: all.
    """

    max_bytes: int | None = None
    every: float | None = None
    suffix: str | None = None
    keep: int | None = 5

    def __post_init__(self) -> None:
        for name, least in (("max_bytes", 1), ("every", 1), ("keep", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}, or None")
        if self.max_bytes is None and self.every is None:
            raise ValueError("a rotation needs max_bytes or every")
        if self.suffix is not None and (not self.suffix or "/" in self.suffix or os.sep in self.suffix):
            raise ValueError(f"suffix is {self.suffix!r}, expected a part of a file name")

    def is_due(self, begun: float, now: float) -> bool:
        """Whether a new period has begun; both are seconds since the epoch."""
        return self.every is not None and self._period(begun) != self._period(now)

    def _period(self, moment: float) -> tuple[int, int, int]:
        assert self.every is not None
        local = time.localtime(moment)
        midnight = local.tm_hour * 3600 + local.tm_min * 60 + local.tm_sec
        if self.every > 86_400:  # counted in days from a day 0 of local time
            return (0, 0, int((moment + local.tm_gmtoff) // self.every))
        return (local.tm_year, local.tm_yday, int(midnight // self.every))

    def move(self, path: Path, begun: float) -> None:
        """Rename the file out of the way, and remove what is too old.

        Raises:
            OSError: as os.replace.
        """
        if self.suffix is None:
            free = next(n for n in itertools.count(1) if n == self.keep or not _nth(path, n).exists())
            for n in range(free, 1, -1):
                os.replace(_nth(path, n - 1), _nth(path, n))
            os.replace(path, _nth(path, 1))
            return
        first = path.with_name(f"{path.name}.{time.strftime(self.suffix, time.localtime(begun))}")
        names = itertools.chain([first], (_nth(first, n) for n in itertools.count(1)))
        os.replace(path, next(name for name in names if not name.exists()))
        if self.keep is not None:
            for old in self._parts(path)[: -self.keep]:
                old.unlink(missing_ok=True)

    def _parts(self, path: Path) -> list[Path]:
        """The old parts that are there, oldest first."""
        assert self.suffix is not None
        dated = re.sub("%(.)", lambda m: _DIGITS.get(m[1], r"[^\W\d]+"), re.escape(self.suffix))
        whole = re.compile(rf"{re.escape(path.name)}\.{dated}(?:\.(\d+))?")
        found = [(match, name) for name in path.parent.iterdir() if (match := whole.fullmatch(name.name))]
        found.sort(key=lambda each: (each[1].stat().st_mtime_ns, int(each[0][1] or 0)))
        return [name for _, name in found]


def _nth(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
