"""The files beside a log: where it is if it lost its name, what had the name in between, what was written to since.

Rotation renames one file after the other, and what is looked for may get a name that was looked at already: a search
during which names changed is made again.

Each search gives files that no other source reads or has read, opened; the caller closes them. A file that is being
packed is passed over: what it is made from is there until it is whole. So is one that vanishes. But where a file cannot
be read that may be the one (EIO, EACCES, no descriptor left), a search raises OSError: what it holds must not count as
lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from typing import NamedTuple, TypeVar

from ..packets.codec import SourceInfo
from ..packets.format import HEAD_BYTES, Compression
from .contents import Contents, open_contents, unpacked_name
from .rotated import (
    Folders,
    Resume,
    best_match,
    holds,
    in_order,
    is_hole,
    is_old_copy,
    is_same,
    latest,
    may_follow,
    only_alike,
)

Identity = tuple[int, int]
Taken = Callable[[str, Identity], bool]
"""Whether a path's file, with this device and inode, is another source's."""


class Grown(NamedTuple):
    """A file that was left and is not as it was then, and the generation that says how it was."""

    path: str
    contents: Contents
    known: Resume

    def close(self) -> None:
        self.contents.close()


Found = TypeVar("Found", list[Contents], list[Grown], "Contents | None")

_BLOCK = 1 << 16
# Of a file that is gone, is none, or cannot be unpacked (yet); any other error says nothing of what is in it.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EINVAL, errno.ENXIO, errno.ENOSYS)
_TRIES = 20  # of a search, until it counts although names changed meanwhile; a rotation is over after one or two
# Generations back from the present one in which late lines are looked for: again and again, and at the start.
_GENERATIONS = 8
_AT_THE_START = 32  # as many as a segment states


class Beside:
    """The files beside a log.

    Args:
        path: the log's.
        folders: shared with others.
        taken, followed: see Tail.
    """

    def __init__(self, path: str, folders: Folders, taken: Taken, followed: Callable[[str], bool]) -> None:
        self._path = path
        self._folders = folders
        self._taken = taken
        self._followed = followed
        self.told: set[str] = set()  # files that hold what was read, though their names do not say so

    def changed_ns(self) -> int | None:
        """When a file last came to the log's folder or left it; None: it may be changing now."""
        return self._folders.changed_ns(self._path)

    def find(
        self, wanted: Resume, contents: Contents | None, held: Set[Identity], history: Sequence[Resume]
    ) -> Contents | None:
        """The file that was read, whatever its name is now; `contents` is what has the log's name."""
        goes_on = contents is not None and continues(contents, wanted)
        if contents is not None and contents.identity == wanted.identity and not is_same(contents, wanted.info):
            goes_on = False  # its number was used again; that it begins alike says little
        if contents is not None and goes_on and is_same(contents, wanted.info):
            # Where all that was read is a hole, the next hole over it looks alike.
            copy = self.copy_of(wanted, held, history) if is_hole(wanted.entry) else None
            if copy is not None and not is_beginning(copy, contents, wanted.entry.resume_off):
                return copy
            if copy is not None:
                copy.close()
            return contents
        begun = goes_on and not is_hole(wanted.entry)  # NULs are in any file that was cut in place
        found = self._steady({wanted.info.inode}, lambda: self._elsewhere(wanted, held, history, begun=begun))
        return found or (contents if goes_on else None)

    def _elsewhere(
        self, wanted: Resume, held: Set[Identity], history: Sequence[Resume], *, begun: bool
    ) -> Contents | None:
        """The file that was read, under another name; `begun`: what has the log's name holds what was read, too."""
        # First the file itself, under another name: many logs begin alike, and little may have been read of it.
        for path, inode in self._folders.beside(self._path):
            other = _opened(path) if inode == wanted.info.inode else None
            if other is None:
                continue
            try:
                if is_same(other, wanted.info) and continues(other, wanted):
                    return other
            except OSError as exc:
                _pass_over(exc, other)
            other.close()
        if begun and wanted.entry.resume_off >= HEAD_BYTES:
            return None  # put back from a copy
        return self._copy_of(wanted, held, history)

    def renamed(self, info: SourceInfo, held: Set[Identity]) -> tuple[str, Contents] | None:
        """The file of this generation, whatever it holds now, if it has another name."""
        path = self._folders.named(self._path, info.inode)
        other = None if path is None else self._stranger(path, held)
        if path is None or other is None:
            return None
        if is_same(other, info):
            return path, other
        other.close()
        return None

    def copy_of(self, wanted: Resume, held: Set[Identity], history: Sequence[Resume]) -> Contents | None:
        """A file that holds what was read, packed or not, and was written since: the longest of them."""
        return self._steady({wanted.info.inode}, lambda: self._copy_of(wanted, held, history))

    def _copy_of(self, wanted: Resume, held: Set[Identity], history: Sequence[Resume]) -> Contents | None:
        if not wanted.entry.resume_off:
            return None  # nothing was read that could tell
        found: list[tuple[str, Contents]] = []
        for path, other in self._strangers(held):
            try:
                if best_match(other, [wanted, *history]) is wanted:
                    other.look()
                    found.append((path, other))
                    continue
            except OSError as exc:
                _pass_over(exc, other, *(each for _, each in found))
            other.close()
        if not found:
            return None
        if is_hole(wanted.entry) or wanted.entry.resume_off < HEAD_BYTES:
            best = in_order(found)[0]  # where only a hole was read, or a header, those that came after it look alike
        else:
            best = max((other for _, other in found), key=lambda other: other.look()[0])
        for _, other in found:
            if other is not best:
                other.close()
        return best

    def between(
        self, wanted: Resume, contents: Contents, held: Set[Identity], history: Sequence[Resume], since_ns: int = 0
    ) -> list[Contents]:
        """Files that had the name after this one and lost it before anybody looked, oldest first.

        `since_ns`: only those that were written to later.
        """
        return self._steady({wanted.info.inode}, lambda: self._between(wanted, contents, held, history, since_ns))

    def _between(
        self, wanted: Resume, contents: Contents, held: Set[Identity], history: Sequence[Resume], since_ns: int
    ) -> list[Contents]:
        found: list[tuple[str, Contents]] = []
        for path, other in self._strangers(held | {contents.identity}):
            try:
                later = (
                    not self._followed(path)
                    and may_follow(other, wanted)
                    and (wanted.info.birth_ns or other.changed_ns() > wanted.entry.mtime_ns)
                    and other.changed_ns() > since_ns
                )
                known = best_match(other, [wanted, *history]) if later else None
                named = wanted.info._replace(
                    device=contents.identity[0], inode=contents.identity[1], birth_ns=contents.birth_ns
                )
                new = known is None or only_alike(other, known, named)
                if later and new and not is_old_copy(other, wanted) and other.look()[0]:
                    found.append((path, other))
                    continue
            except OSError as exc:
                _pass_over(exc, other, *(each for _, each in found))
            other.close()
        return in_order(found)

    def left(
        self, wanted: Resume, contents: Contents, held: Set[Identity], history: Sequence[Resume]
    ) -> list[Contents]:
        """Copies of a file of which nothing was read before it was cut, and that has new bytes now; oldest first."""
        if not history:
            return []  # nobody knows since when
        found = self.between(wanted, contents, held, history, history[-1].entry.mtime_ns)
        copies = [other for other in found if not is_beginning(other, contents, 0)]
        for other in found:
            if other not in copies:
                other.close()
        return copies

    def grown(self, present: Resume, history: Sequence[Resume], held: Set[Identity], *, start: bool) -> list[Grown]:
        """Files that were left and are not as they were then.

        Not the one that has the log's name, whatever else leads to it (hard links, a link's target): its turn comes.

        Args:
            present: the file that is read now.
            history: the oldest first.
            start: look farther back, and at packed ones too.
        """
        if not history:
            return []
        late = history[-(_AT_THE_START if start else _GENERATIONS) :]
        inodes = {former.info.inode for former in late}
        return self._steady(inodes, lambda: self._grown(present, late, history, held, packed=start))

    def _grown(
        self,
        present: Resume,
        late: Sequence[Resume],
        history: Sequence[Resume],
        held: Set[Identity],
        *,
        packed: bool,
    ) -> list[Grown]:
        with contextlib.suppress(OSError):
            status = os.stat(self._path)
            held = held | {(status.st_dev, status.st_ino)}
        # Most were not written to since: a look at the name is all that each of them costs.
        newest = {former.identity: former for former in late}
        paths: list[str] = []
        for former in newest.values():
            path = self._folders.named(self._path, former.info.inode)
            plain = path is not None and unpacked_name(path) == path  # otherwise it has the number of one that is gone
            if path is not None and plain and _status(path)[0] != former.entry.resume_off:
                paths.append(path)
        left = _last_of_each(present.info, history)
        if packed:
            paths += self._packed_since(min(map(_changed_ns, late)), left)
        found: list[Grown] = []
        for path in dict.fromkeys(paths):
            other = None
            with contextlib.suppress(OSError):  # the next start looks again; nothing counts as lost by this
                other = self._stranger(path, held)
            if other is None:
                continue
            try:
                if other.compression is Compression.NONE:
                    known = best_match(other, latest(other, history))
                    if known is None:  # it lost its end, perhaps
                        known = next((former for former in reversed(history) if is_same(other, former.info)), None)
                else:
                    known = best_match(other, _may_go_on(other.changed_ns(), left, history))
                    # A copy, and what was packed while it was still read, has what was read in another generation.
                    if known is not None and best_match(other, [known, *history, present]) is not known:
                        known = None
                again = any(known is each.known for each in found)  # it is being packed: both are there for a moment
                if known is not None and not again and other.look()[0] != known.entry.resume_off:
                    found.append(Grown(path, other, known))
                    held = held | {other.identity}
                    continue
            except OSError:
                pass
            other.close()
        return found

    def _packed_since(self, since_ns: int, left: Sequence[Resume]) -> list[str]:
        """Packed files that were changed since, and are not just what was read of one that was left.

        Packing keeps the time. Late lines may be older than what was read of the next file, so a packed file is as it
        was if the very file was read to its end at that time. Two files may have been changed in the same tick of the
        clock: then the files are counted that were read to their end then and are not there any more.
        """
        times: dict[int, list[str]] = {}
        for path in self._folders.rotated(self._path):
            if unpacked_name(path) != path and (changed := _status(path)[1]) >= since_ns:
                times.setdefault(changed, []).append(path)
        read: Counter[int] = Counter()
        for former in left:
            entry = former.entry
            read[entry.mtime_ns] += entry.mtime_ns in times and entry.size <= entry.resume_off and not self._has(former)
        return [path for changed, paths in times.items() if len(paths) > read[changed] for path in paths]

    def _has(self, former: Resume) -> bool:
        """Whether this very file is there, not packed, as far as it can be read; its number may be another's by now."""
        path = self._folders.named(self._path, former.info.inode)
        if path is None or unpacked_name(path) != path:
            return False
        try:
            other = _opened(path)
        except OSError:
            return True
        try:
            return other is not None and is_same(other, former.info)
        finally:
            _close(other)

    def _steady(self, inodes: Set[int], search: Callable[[], Found]) -> Found:
        """What a search found while no name changed that may be one of this log's files, or of these inodes'."""
        before = self._folders.listing(self._path)
        for _ in range(_TRIES):
            found = search()
            try:
                after = self._folders.listing(self._path)
                if after == before or self._ours(after, inodes) == self._ours(before, inodes):
                    return found
            except BaseException:
                _close(found)
                raise
            before = after
            _close(found)
        return search()

    def _ours(self, listing: list[list[tuple[str, int]]], inodes: Set[int]) -> list[tuple[str, int]]:
        rotated = set(self._folders.rotated_in(listing, self._path))
        return [each for names in listing for each in names if each[1] in inodes or each[0] in rotated]

    def _strangers(self, held: Set[Identity]) -> Iterator[tuple[str, Contents]]:
        """What rotation may have made of the log and nobody reads."""
        for path in dict.fromkeys((*self._folders.rotated(self._path), *self.told)):
            other = self._stranger(path, held)
            if other is not None:
                yield path, other

    def _stranger(self, path: str, held: Set[Identity]) -> Contents | None:
        other = _opened(path)
        if other is not None and (other.identity in held or self._taken(path, other.identity)):
            other.close()
            return None
        return other


def continues(contents: Contents, wanted: Resume) -> bool:
    """Whether this file begins with what was read; the inode alone proves nothing, for they are used again."""
    if not wanted.entry.resume_off:
        return is_same(contents, wanted.info)  # nothing was read that could tell
    return holds(contents, wanted.entry) is not None


def _last_of_each(present: SourceInfo, history: Sequence[Resume]) -> list[Resume]:
    """The last generation of each file but the present one, whose earlier ones were cut."""
    last = {former.info[:3]: former for former in history}  # device, inode, when it was made
    if present.birth_ns:
        last.pop(present[:3], None)
    return list(last.values())


def _may_go_on(changed_ns: int, left: Sequence[Resume], history: Sequence[Resume]) -> list[Resume]:
    """With which generations a packed file that was changed at this time may go on: of each file only with the last.

    If it is newer than all that was read, also with one of which so little was read that another file begins alike.
    """
    newer = changed_ns > history[-1].entry.mtime_ns
    plain = [former for former in left if newer or former.info.compression is Compression.NONE]
    return plain + [former for former in history if newer and former.entry.resume_off < HEAD_BYTES]


def _changed_ns(former: Resume) -> int:
    """When this file was changed last, as far as known; not later."""
    return former.entry.mtime_ns or former.info.birth_ns


def is_beginning(copy: Contents, contents: Contents, start: int) -> bool:
    """Whether what a copy has behind this byte stands in a file too."""
    while True:
        data = copy.read_at(start, _BLOCK)
        if data != contents.read_at(start, len(data)):
            return False
        if not data:
            return True
        start += len(data)


def _close(found: Sequence[Contents | Grown] | Contents | None) -> None:
    for each in [found] if found is None or isinstance(found, Contents) else found:
        if each is not None:
            each.close()


def _opened(path: str) -> Contents | None:
    try:
        return open_contents(path)
    except OSError as exc:
        _pass_over(exc)
        return None


def _pass_over(exc: OSError, *opened: Contents | None) -> None:
    """Return if this is no file that could have been read; otherwise nothing is known of it: close these and raise."""
    if exc.errno in _NO_FILE:
        return
    for each in opened:
        if each is not None:
            each.close()
    raise exc


def _status(path: str) -> tuple[int, int]:
    """Size, as it is on the disk, and time of the last change; zeros: there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
