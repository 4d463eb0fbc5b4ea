"""Whose file is it? What the packet file knows of its sources, and which files they read now.

Every file in the sources' folders is exactly one of these:

    a source's present file, or one that it left and keeps open     the source reads it
    one that a source has read, under another name                  nobody reads it; what was added since, that source
    a copy of what a source reads (copytruncate, before the cut)    nobody reads it, and it is told
    none of them                                                    a source of its own

A name says only whom to ask; the answer is in the file: inode and birth time, head and guard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from ..files.contents import unpacked_name
from ..files.rotated import Folders, Former, Resume, is_former, rotated_from
from ..files.tail import Tail
from ..packets.codec import CommitEntry, SourceInfo
from ..packets.ledger import SourceState

Identity = tuple[int, int]
Generations = Callable[[SourceState], Iterator[tuple[SourceInfo, CommitEntry]]]


class Known:
    """The sources of a merge and their files. For one thread, once `learn` has returned.

    Attributes:
        tails: path -> what reads it.
        copies: path of a copy -> path of the source that has all of it.
    """

    def __init__(self, *, follow: bool, linger: float) -> None:
        self.tails: dict[str, Tail] = {}
        self.copies: dict[str, str] = {}
        self._follow = follow
        self._linger = linger
        self._folders = Folders()
        self._resumes: dict[str, Resume] = {}
        self._parked: dict[str, Tail] = {}  # of sources that are no longer read; as they were left
        self._histories: dict[str, list[Resume]] = {}
        self._names: dict[Identity, str] = {}  # of the files that sources had when the packet file was left
        self._former: Former = {}
        self._held: dict[Identity, str] = {}  # who may be reading a file; the tail says whether it does
        self._rotated: dict[str, set[str]] = {}  # path of a log -> sources whose names rotation may have made of it
        self._answers: dict[tuple[str, Identity], tuple[int, int]] = {}  # size and mtime of files that are somebody's

    def learn(self, sources: dict[int, SourceState], generations: Generations) -> None:
        """Take in what a packet file says of its sources."""
        for state in sources.values():
            path = os.fsdecode(state.path)
            read = [Resume(state.info, state.entry()), *(Resume(*former) for former in generations(state))]
            *history, resume = _completed(read[::-1])
            self._resumes[path] = resume
            self._note(path)
            self._names[resume.identity] = path
            for former in history[::-1]:
                self._former.setdefault(former.identity, former)
            self._histories[path] = history

    def resume(self, path: str) -> Resume | None:
        return self._resumes.get(path)

    def add(self, path: str, source_id: int, size: int) -> Tail:
        """Begin or go on to read a source; `size`: what it is known to have."""
        parked = path in self._parked
        tail = self.tails[path] = self._parked.pop(path) if parked else self._tail(path, source_id, size)
        self._note(path)
        return tail

    def park(self, path: str) -> None:
        """Read a source no more, and let go of its files; `add` goes on where it was, and its files stay known."""
        tail = self.tails.pop(path)
        tail.close()
        at = tail.resume()
        if at is not None:  # otherwise nothing of it is in the packet file
            self._parked[path] = tail
            self._resumes[path] = at
            self._names[at.identity] = path

    def set_linger(self, seconds: float) -> None:
        """For how long files that lost their name are kept open, from now on."""
        self._linger = seconds
        for tail in (*self.tails.values(), *self._parked.values()):
            tail.set_linger(seconds)

    def is_held(self, identity: Identity) -> bool:
        """Whether some source reads this file now."""
        return self._holder(identity) is not None

    def is_taken(self, owner: str, path: str, identity: Identity) -> bool:
        """Whether a file is another source's than this one: a chain of renames gave it its name."""
        holder = self._holder(identity)
        if holder is not None and holder != owner:
            return True
        former = self._former.get(identity)
        if former is not None and os.fsdecode(former.info.path) != owner and is_former(path, former):
            return True
        name = self._names.get(identity)
        if name is not None and name != owner and is_former(path, self._resumes[name]):
            return True
        try:  # where app.log.1 is a source too: it may be a copy of app.log now, or have been packed as app.log.2.gz
            asked = path == owner or unpacked_name(path) != path
            return asked and self.owner(path, os.stat(path), but=owner) is not None
        except OSError:
            return False

    def is_followed(self, owner: str, path: str) -> bool:
        """Whether what has this name is another source's, as far as a name can tell."""
        return path != owner and path in self.tails

    def owner(self, path: str, status: os.stat_result, but: str = "") -> tuple[str, str] | None:
        """Of which source a file is that is none itself, and what it is to it (see `Tail.adopt`); None: a new one.

        `but`: a source that is not asked.

        Raises:
            OSError: as `Tail.adopt`.
        """
        identity = status.st_dev, status.st_ino
        key, stamp = (path, identity), (status.st_size, status.st_mtime_ns)
        for source in self._candidates(path, identity):
            if source == but:
                continue
            if self._answers.get(key) == stamp:
                return source, "read"
            parked = self._parked.get(source)
            tail = self.tails.get(source) or parked or self._tail(source, self._resumes[source].entry.source_id, 0)
            answer = tail.adopt(path)
            if answer is None:
                continue
            if parked is None or answer == "late":  # otherwise nobody wants it read
                self._parked.pop(source, None)
                self.tails[source] = tail
            if tail.is_open:
                self._answers[key] = stamp  # otherwise it is seen when the source is opened
            if answer == "copy":
                self.copies[path] = source
            return source, answer
        self.copies.pop(path, None)
        return None

    def _candidates(self, path: str, identity: Identity) -> Iterator[str]:
        """Sources that may know a file, by its inode and by its name."""
        former, folder = self._former.get(identity), os.path.dirname(path)
        names = [] if former is None else [os.fsdecode(former.info.path)]
        names += [self._names[identity]] if identity in self._names else []
        name = os.path.basename(path)
        logs = [os.path.join(folder, log) for log in rotated_from(name)]
        names += logs
        if unpacked_name(name) != name:  # app.log.2.gz may be what app.log.1 was, if that is a source too
            names += [sibling for log in logs for sibling in self._rotated.get(log, ())]
        return (name for name in dict.fromkeys(names) if name in self.tails or name in self._resumes)

    def _note(self, path: str) -> None:
        folder, name = os.path.split(path)
        for log in rotated_from(name):
            self._rotated.setdefault(os.path.join(folder, log), set()).add(path)

    def _holder(self, identity: Identity) -> str | None:
        path = self._held.get(identity)
        tail = None if path is None else self.tails.get(path)
        return path if tail is not None and identity in tail.identities else None

    def _tail(self, path: str, source_id: int, size: int) -> Tail:
        return Tail(
            path,
            source_id,
            self._resumes.get(path),
            history=self._histories.setdefault(path, []),
            follow=self._follow,
            linger=self._linger,
            former=self._former,
            held=self._held,
            taken=lambda other, identity: self.is_taken(path, other, identity),
            followed=lambda other: self.is_followed(path, other),
            folders=self._folders,
            recalls=True,
            size=size,
        )


def _completed(generations: list[Resume]) -> list[Resume]:
    """The same, the oldest first, with what an earlier generation of the same file tells of it.

    Where late lines of a file were read, or it lost its end, its later generation begins in the middle: of what stands
    before that, a packet file has the hash only from the next COMMIT on, which a kill may prevent.
    """
    before: dict[tuple[int, int, int], CommitEntry] = {}
    made: list[Resume] = []
    for known in generations:
        entry, info = known.entry, known.info
        file = info.device, info.inode, info.birth_ns
        older = before.get(file)
        if older is not None and older.resume_off >= info.start_off:
            if entry.head_len < older.head_len <= info.start_off:
                entry = entry._replace(head_len=older.head_len, head=older.head)
            if info.start_off == older.resume_off == entry.resume_off and older.guard_len > entry.guard_len:
                entry = entry._replace(guard_len=older.guard_len, guard=older.guard)
        before[file] = entry
        made.append(Resume(info, entry))
    return made
