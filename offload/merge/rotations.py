"""How logs lose their names: each kind of rotation that programs, logrotate and administrators make, for a Workload.

app.log ──► app.log.1 ──► app.log.2.gz ──► app.log.3.gz        renamed, or linked and unlinked; the oldest removed
        ──► app.log-20260101-7 ──► app.log-20260101-7.xz       the same with a date
        ──► app.log.1 (a copy), app.log cut                    by a program that appends, or writes where it was
app.log ──► points at another file                             a link that is swapped
        ──► deleted and made anew; cut and written anew        by who cares for no reader: once all of it is read
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import lzma
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Way = Literal["rename", "link", "copy", "swap", "delete", "rewrite", "none"]


@dataclass(frozen=True)
class Kind:
    """How a log is written and rotated.

    Attributes:
        name: of the log, without `.log`.
        way: renamed; linked and unlinked; copied and cut; a link swapped; deleted; cut and written anew; not at all.
        packs: the ending of files that are packed, all behind the first; "": none are.
        dated: rotated files have dates, not numbers.
        keeps: how many rotated files there are at most; an older one is removed when it is read. 0: all.
        headed: every file begins with the same lines.
        appends: written with O_APPEND; otherwise a cut file gets a hole where it was cut.
        times: a copy has the times of what it is made of (`cp -p`).
        ends: files end with a line end; otherwise the last line of some lacks it.
        empty: also rotated when nothing was written since.
    """

    name: str
    way: Way
    packs: str = ""
    dated: bool = False
    keeps: int = 0
    headed: bool = False
    appends: bool = True
    times: bool = False
    ends: bool = True
    empty: bool = False


# What logrotate does as it comes; what peers can be compared with.
CLASSIC = (
    Kind("a", "rename", packs=".gz"),
    Kind("b", "copy"),
    Kind("c", "rename"),
    Kind("d", "copy", packs=".gz"),
)
ALL = (
    *CLASSIC,
    Kind("f\udcff", "rename", packs=".xz", dated=True, headed=True),
    Kind("g", "copy", packs=".gz", times=True, appends=False),
    Kind("h", "swap"),
    Kind("i", "link", packs=".zst", keeps=3),
    Kind("k", "delete", headed=True),
    Kind("l", "rewrite", headed=True),
    Kind("m", "rename", ends=False, empty=True),
)
LATER = Kind("e", "none")  # nobody rotates it, as nobody may know it yet

_MODULES = {".zst": "zstandard"}
HEAD = b"".join(b"#%03d the head that every file of this log has\n" % number for number in range(12))


@dataclass
class Log:
    """One log: the program that writes it, and its files.

    Attributes:
        rest: of a line that was begun.
        old: descriptors that lost their name and are still written to, each with its stream.
        late: how many there were.
        files: what is behind the newest, the last one first.
        fresh: something was written since the last rotation.
    """

    path: Path
    kind: Kind
    file: Any = None
    rest: bytes = b""
    old: list[tuple[bytes, Any]] = field(default_factory=list)
    late: int = 0
    rotations: int = 0
    files: list[Path] = field(default_factory=list)
    fresh: bool = False

    @property
    def stream(self) -> bytes:
        return os.fsencode(self.kind.name)

    def open(self) -> None:
        """As its program opens it: made if it is not there."""
        if self.kind.way == "swap":
            self._swap()
        self.file = self.path.open("ab" if self.kind.appends else "wb", buffering=0)

    def _swap(self) -> None:
        """Have the name point at a new file."""
        target = self.path.parent / "linked" / f"{self.path.name}.2026-{self.rotations:04d}"
        target.parent.mkdir(exist_ok=True)
        target.touch()
        made = self.path.with_name(f".{self.path.name}.new")
        made.symlink_to(target)
        made.replace(self.path)

    def rotate(self, did: Counter[str], is_read: Callable[[Path], bool]) -> None:
        """Rotate it; the program goes on with the new file, and still has the old one where that was renamed."""
        way = self.kind.way
        self.rotations += 1
        if way in ("rename", "link", "copy"):
            self._make_room(did, is_read)
        if way in ("copy", "rewrite"):
            self._cut(did)
        else:
            self._leave(did)
        self.fresh = False

    def _cut(self, did: Counter[str]) -> None:
        if self.kind.way == "copy":
            copy = shutil.copy2 if self.kind.times else shutil.copy
            copy(self.path, self._first())
            self.files.insert(0, self._first())
            did["files copied and truncated"] += 1
        else:
            did["files written anew"] += 1
        os.truncate(self.path, 0)

    def _leave(self, did: Counter[str]) -> None:
        """Have another file under the name."""
        self.close_old()  # a program that is told to open its log anew has done so by the next rotation
        way = self.kind.way
        if way == "delete":
            self.file.close()
            self.path.unlink()
            did["files deleted"] += 1
        else:
            self.late += 1
            self.old.append((b"%s-late-%d" % (self.stream, self.late), self.file))
            if way == "link":
                self._first().hardlink_to(self.path)
                self.path.unlink()
                did["files linked"] += 1
            elif way == "rename":
                self.path.rename(self._first())
                did["files renamed"] += 1
            else:
                did["links swapped"] += 1
        if way in ("rename", "link"):
            self.files.insert(0, self._first())
        self.open()

    def close_old(self) -> None:
        while self.old:
            self.old.pop()[1].close()

    def close(self) -> None:
        self.close_old()
        self.file.close()

    def _first(self) -> Path:
        end = f"-20260101-{self.rotations:04d}" if self.kind.dated else ".1"
        return self.path.with_name(self.path.name + end)

    def _make_room(self, did: Counter[str], is_read: Callable[[Path], bool]) -> None:
        """As logrotate: app.log.1 becomes app.log.2, and so on, all behind the first packed, the oldest removed."""
        packs = self.kind.packs
        if self.kind.keeps and len(self.files) >= self.kind.keeps and is_read(self.files[-1]):
            self.files.pop().unlink()
            did["files removed"] += 1
        for at in range(len(self.files) - 1, -1, -1):
            path = self.files[at]
            if not self.kind.dated:
                end = path.suffix if path.suffix == _ending(packs) else ""
                path = path.rename(self.path.with_name(f"{self.path.name}.{at + 2}{end}"))
            if packs and path.suffix != _ending(packs):
                if at == 0:
                    self.close_old()  # what is written to a file after it was packed is lost to everybody
                path = pack(path, _ending(packs))
                did["files packed"] += 1
            self.files[at] = path


def _ending(packs: str) -> str:
    module = _MODULES.get(packs)
    return packs if module is None or importlib.util.find_spec(module) is not None else ".gz"


def pack(path: Path, end: str = ".gz") -> Path:
    """As gzip, xz and zstd do: another inode, written bit by bit; the time of the last change is kept, then the plain
    one goes."""
    status = path.stat()
    packed = path.with_name(f"{path.name}{end}")
    with path.open("rb") as plain, contextlib.closing(_packer(packed, end)) as out:
        shutil.copyfileobj(plain, out)
    os.utime(packed, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.unlink()
    return packed


def _packer(path: Path, end: str) -> Any:
    if end == ".gz":
        return gzip.open(path, "wb", compresslevel=1)
    if end == ".xz":
        return lzma.open(path, "wb", preset=0)
    import zstandard

    return zstandard.open(path, "wb")
