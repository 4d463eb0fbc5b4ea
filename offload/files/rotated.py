"""What becomes of a log that lost its name: the names it may have now, and how to know it again by what is in it.

    app.log ──► app.log.1 ──► app.log.2.gz          renamed, then packed
            ──► app-2026-11-21.log                  the same with a date
            ──► app.log.1 (a copy, app.log is cut)  copytruncate

A file is what was read if its head and the bytes before the offset (the guard) are what was read there, packed or not.
Many logs begin alike, and little may have been read of one; so where the inode is another one, it must also have been
made, and written to, after the one that was read was made.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..packets.codec import CommitEntry, SourceInfo
from ..packets.format import GUARD_BYTES, HEAD_BYTES, Compression
from ..packets.ledger import digest
from .contents import Contents, open_contents, unpacked_name

# What stands behind the name or before its suffix: a number or a date, or a word for "the one before".
_BEHIND = re.compile(r"[.\-_](\d[\d.\-_:T]*|old|bak|prev|save|orig)|~")
_BETWEEN = re.compile(r"[.\-_]\d[\d.\-_:T]*|[.\-_](old|bak|prev)")
_MARK = re.compile(r"\d|~|[.\-_](old|bak|prev|save|orig)")
_DIGITS = re.compile(r"[.\-_]\d[\d.\-_:T]*")
_YEAR_BYTES = 6  # so many digits of a mark or more are a date, fewer a number
_SETTLED = 0.05  # seconds after which a folder's time of change tells every later change: it has a coarse clock


@dataclass(slots=True)
class Resume:
    """A generation of a source in a packet file, and how far it was read."""

    info: SourceInfo
    entry: CommitEntry

    @property
    def identity(self) -> tuple[int, int]:
        return self.info.device, self.info.inode


Former = dict[tuple[int, int], Resume]
"""Device and inode of files that lost their name after they were read -> how far, and how to know them."""


def is_rotated(name: str, of: str) -> bool:
    """Whether a file of this name may be what rotation made of the log `of`; both without their folder."""
    plain = unpacked_name(name)
    if plain == of:
        return name != of
    if plain.startswith(of):
        return _BEHIND.fullmatch(plain, len(of)) is not None
    stem, suffix = os.path.splitext(of)
    inside = plain.startswith(stem) and plain.endswith(suffix) and len(plain) > len(of)
    return bool(suffix) and inside and _BETWEEN.fullmatch(plain, len(stem), len(plain) - len(suffix)) is not None


def rotated_from(name: str) -> Iterator[str]:
    """Names of logs of which a file of this name may be a rotated one, the longest first."""
    plain = unpacked_name(name)
    if plain != name:
        yield plain
    if _MARK.search(plain) is None:
        return  # as most names
    suffix = os.path.splitext(plain)[1]
    for at in range(len(plain) - 1, 0, -1):
        if plain[at] in ".-_~":
            yield from (of for of in (plain[:at], plain[:at] + suffix) if is_rotated(name, of))


def holds(contents: Contents, entry: CommitEntry) -> bytes | None:
    """Whether a file begins with what was read of it, by head and guard: then the guard's bytes, else None."""
    # The size comes last, if at all: of a packed file it costs to unpack the whole of it.
    if not has_head(contents, entry):
        return None
    guard = contents.read_at(entry.resume_off - entry.guard_len, entry.guard_len)
    if entry.guard_len:
        return guard if digest(guard) == entry.guard else None
    return guard if contents.look()[0] >= entry.resume_off else None


def has_head(contents: Contents, entry: CommitEntry) -> bool:
    """Whether a file begins with the first bytes, HEAD_BYTES at most, of what was read."""
    return not entry.head_len or digest(contents.read_at(0, entry.head_len)) == entry.head


def is_hole(entry: CommitEntry) -> bool:
    """Whether nothing but NULs stand at both ends of what was read: that tells next to nothing."""
    ends = (entry.head, entry.head_len), (entry.guard, entry.guard_len)
    return entry.guard_len > 0 and all(hash == digest(bytes(length)) for hash, length in ends if length)


def is_same(contents: Contents, info: SourceInfo) -> bool:
    """Whether this is the very file of a generation: device, inode, and when that was made, where this is known."""
    known = info.birth_ns and contents.birth_ns
    return contents.identity == (info.device, info.inode) and (not known or info.birth_ns == contents.birth_ns)


def may_follow(contents: Contents, known: Resume) -> bool:
    """Whether a file can be a copy of this generation's, or one that came after: made and written to since."""
    made = known.info.birth_ns
    if not made:
        return True
    plain = contents.compression is Compression.NONE and contents.birth_ns
    # A copy whose times were kept (`cp -p`) was last written to before it was made, and so is what it is packed into.
    written = min(made, known.entry.mtime_ns)  # 0: nobody knows when
    return contents.changed_ns() >= written and (not plain or contents.birth_ns >= made)


def is_former(path: str, former: Resume) -> bool:
    """Whether this file is one that was read already, under another name; its inode may belong to a new one."""
    try:
        contents = open_contents(path)
    except OSError:
        return False
    try:
        return is_same(contents, former.info) and holds(contents, former.entry) is not None
    finally:
        contents.close()


def best_match(contents: Contents, readings: Iterable[Resume]) -> Resume | None:
    """The generation that this file holds most of; None: it holds none of them."""
    best = None
    for known in readings:
        if best is not None and known.entry.resume_off <= best.entry.resume_off:
            continue
        same = is_same(contents, known.info)
        if not same and not (known.entry.head_len and may_follow(contents, known)):
            continue  # nothing was read of it that could tell, or it is older
        if holds(contents, known.entry) is not None:
            best = known
    return best


def latest(contents: Contents, history: Iterable[Resume]) -> list[Resume]:
    """Of these generations, the oldest first, those that a file may go on with: of this very file only its last one.

    If that does not match, the file was cut or lost its end, though it may hold what an earlier one had.
    """
    known = list(history)
    own = [each for each in known if is_same(contents, each.info)]
    return [each for each in known if all(each is not before for before in own[:-1])]


def only_alike(contents: Contents, known: Resume, newest: SourceInfo) -> bool:
    """Whether a file that holds a generation may be another that begins alike: all logs of a day with the same header.

    Little was read of that generation, the file has more, and it is no copy that copytruncate made, for the log (of
    which this is the newest generation) gets a new file when it is rotated. If it is a copy after all, less than
    HEAD_BYTES are there twice; taken for one, all of another file could be lost.
    """
    entry, info = known.entry, known.info
    if is_same(contents, info) or contents.compression is not Compression.NONE or entry.resume_off >= HEAD_BYTES:
        return False
    cut = (info.device, info.inode, info.birth_ns) == (newest.device, newest.inode, newest.birth_ns)
    return not cut and contents.look()[0] > entry.resume_off


def is_old_copy(contents: Contents, known: Resume) -> bool:
    """Whether this is a copy of a generation that was made before the last of what was read was written."""
    entry = known.entry
    if contents.changed_ns() > entry.mtime_ns or not entry.head_len or not may_follow(contents, known):
        return False
    size = contents.look()[0]
    if not size or size >= entry.resume_off or size < entry.head_len:
        return False  # what is shorter than the head is not told by its hash
    return has_head(contents, entry)


def in_order(files: Iterable[tuple[str, Contents]]) -> list[Contents]:
    """Files of one log with their paths, the oldest first.

    By when they were made, where this is known of all. Otherwise by their names, if those count (app.log.2 is older
    than app.log.1) or have dates that begin with the year; else packed ones by when they were last written, though late
    lines may have been.
    """
    found = sorted(files, key=lambda pair: _age(*pair))
    made = {contents.birth_ns for _, contents in found if contents.compression is Compression.NONE}
    if len(made) == len(found) and all(made):
        return [contents for _, contents in found]
    marks = [_mark(path) for path, _ in found]
    if all(len(mark) < _YEAR_BYTES for mark in marks):
        if all(marks):
            found.sort(key=lambda pair: -int(_mark(pair[0])))
    elif len({len(mark) for mark in marks}) == 1 and all(mark.startswith(("19", "20")) for mark in marks):
        found.sort(key=lambda pair: _mark(pair[0]))
    return [contents for _, contents in found]


def _mark(path: str) -> str:
    """The digits of what rotation puts behind a name: a number, or a date with what tells two of a day."""
    marks = _DIGITS.findall(unpacked_name(os.path.basename(path)))
    return re.sub(r"\D", "", marks[-1]) if marks else ""


def _age(path: str, contents: Contents) -> tuple[int, str]:
    plain = contents.compression is Compression.NONE and contents.birth_ns
    return contents.birth_ns if plain else contents.changed_ns(), path


class Folders:
    """What is in folders, listed again only when they have changed. For one thread; many tails share it.

    Each method raises OSError if a folder is there and cannot be listed: what is in it is not known then.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, list[tuple[str, int]]]] = {}
        self._inodes: dict[str, dict[int, str]] = {}

    def beside(self, path: str) -> Iterator[tuple[str, int]]:
        """Paths of the files beside this one, and where it is a link, beside what it leads to; with their inodes."""
        for name in dict.fromkeys((os.path.dirname(path), _real_folder(path))):
            yield from ((p, inode) for p, inode in self._list(name) if p != path)

    def listing(self, path: str) -> list[list[tuple[str, int]]]:
        """All that `beside` looks at, for comparing: another one if a name or an inode has changed."""
        return [self._list(name) for name in dict.fromkeys((os.path.dirname(path), _real_folder(path)))]

    def named(self, path: str, inode: int) -> str | None:
        """The path of the file beside this one that has this inode."""
        for folder in dict.fromkeys((os.path.dirname(path), _real_folder(path))):
            listed = self._list(folder)
            if folder not in self._inodes:
                self._inodes[folder] = {number: name for name, number in listed}
            found = self._inodes[folder].get(inode)
            if found is not None and found != path:
                return found
        return None

    def changed_ns(self, path: str) -> int | None:
        """When a name last changed in the folders in which `beside` looks; None: so lately that more may have."""
        try:
            times = [os.stat(name).st_mtime_ns for name in (os.path.dirname(path), _real_folder(path))]
        except OSError:
            return None
        return max(times) if time.time_ns() - max(times) > _SETTLED * 1e9 else None

    def rotated(self, path: str) -> Iterator[str]:
        """Those of them that rotation may have made of this log."""
        return (other for other in self.rotated_in(self.listing(path), path) if other != path)

    def rotated_in(self, listing: list[list[tuple[str, int]]], path: str) -> Iterator[str]:
        """The same, of a listing."""
        of = {os.path.basename(path), os.path.basename(os.path.realpath(path))}
        for names in listing:
            for other, _ in names:
                if any(is_rotated(os.path.basename(other), name) for name in of):
                    yield other

    def _list(self, folder: str) -> list[tuple[str, int]]:
        try:
            changed = os.stat(folder).st_mtime_ns
            known = self._known.get(folder)
            if known is not None and known[0] == changed:
                return known[1]
            now = time.time_ns()
            found = [(entry.path, entry.inode()) for entry in os.scandir(folder)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        self._inodes.pop(folder, None)
        # A change in the same tick of the folder's clock would not show.
        self._known[folder] = (changed if now - changed > _SETTLED * 1e9 else -1), found
        return found


def _real_folder(path: str) -> str:
    return os.path.dirname(os.path.realpath(path))


def entry_of(head: bytes, guard: bytes, offset: int, size: int, mtime_ns: int) -> CommitEntry:
    """How to know a file again that was read up to `offset`."""
    assert len(head) <= HEAD_BYTES
    assert len(guard) <= GUARD_BYTES
    fields = 0, 0, 0, offset, 0, size, mtime_ns, len(head), len(guard), 0, digest(head), digest(guard)
    return CommitEntry.make(fields)
