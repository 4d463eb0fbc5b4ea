"""Which file a log is now, and which it was: found again after a stop, rotated meanwhile, cut, or begun anew.

What a Tail asks when there is no more in the files that it reads. The files beside a log are looked at by `beside.py`;
here it is decided what they are to the log. The cases are in the head of `tail.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Set

from ..packets.format import GUARD_BYTES, HEAD_BYTES, NONE_U64, Compression, GapReason
from .beside import Beside, Grown, Taken
from .contents import Contents, open_contents
from .mounts import network_mount
from .opened import Common, Opened, Shorter
from .reading import Generations, Reading, Seen, Step, reading_of, seen, taken_up
from .rotated import Former, Resume, best_match, has_head, holds, is_old_copy, is_same, latest, only_alike

_LINE = 1 << 20  # a line's beginning is looked for in so many bytes


class Succession(Opened):
    """The files of a log, one after the other.

    Args:
        beside: what is beside it.
        path, source_id, resume, history, follow, former, held, taken, size, clock, recalls: see Tail.
    """

    def __init__(
        self,
        path: str,
        source_id: int,
        resume: Resume | None,
        beside: Beside,
        *,
        history: list[Resume] | None,
        follow: bool,
        former: Former | None,
        held: dict[tuple[int, int], str] | None,
        taken: Taken,
        size: int,
        clock: Callable[[], float],
        recalls: bool,
    ) -> None:
        super().__init__(
            path, history=history, follow=follow, former=former, held=held, taken=taken, size=size, clock=clock
        )
        self._beside = beside
        self._looked_between: int | None = None  # when the folder had changed at the last look for such
        self._resumed = resume is not None
        self._recalls = recalls
        self._settled: dict[tuple[tuple[int, int], int], Common] = {}  # file, and up to where it was read -> the answer
        self._starts: dict[tuple[tuple[int, int], int, int], int] = {}  # of files that were left, as they were then
        self._undecided: tuple[tuple[int, int], int, int] | None = None  # the file, as it was then
        self._looks_back = False  # at the next read
        if resume is not None:
            entry = resume.entry
            known = Reading(resume.info, None, entry.resume_off, entry.size, entry.mtime_ns, open=entry.flags)
            known.entry = entry
            self._readings = [known]
        self._out = Generations(source_id, follow=follow, current=self._readings[0] if self._readings else None)

    def settle(self, question: Shorter, answer: Common) -> None:
        """Answer that."""
        self._settled[question.known.identity, question.known.entry.resume_off] = answer

    def adopt(self, path: str) -> str | None:
        """What this source knows of a file beside it that nobody reads, by what is in it.

        Returns:
            "read": it was read to its end. "late": it has more than was read, which the next read gives. "copy": all
            of it is in the file that is read now, as long as nobody cuts that one. None: it is another file.

        Raises:
            OSError: as `open_contents`.
        """
        contents = open_contents(path)
        try:
            if not contents.look()[0] and self._readings:
                return "copy"  # it is only being made
            present = [Resume(reading.info, reading.as_entry()) for reading in self._readings]
            # What is read now comes first: among the former ones stand earlier generations of the same files.
            formers = [former for former in self._history if all(former is not r.known for r in self._readings)]
            if any(is_same(contents, reading.info) for reading in present):
                formers = [former for former in formers if not is_same(contents, former.info)]
            known = best_match(contents, [*present, *latest(contents, formers)])
            newest = present[-1] if present else None
            if known is not None and newest is not None and only_alike(contents, known, newest.info):
                return None
            if known is not None and any(known is former for former in formers):
                if contents.look()[0] <= known.entry.resume_off:
                    return "read"
                self._readings.insert(max(0, len(self._readings) - 1), self._upto(taken_up(contents, known)))
                return "late"
            if known is not None and known is not newest:
                return "read"  # its descriptor is open
            if newest is not None and known is newest and self._readings[-1].contents is None:
                self._beside.told.add(path)
            if newest is not None and (known is newest or is_old_copy(contents, newest)):
                return "copy" if self._is_beginning(contents) is not False else None
            if any(is_old_copy(contents, former) for former in self._history):
                return "read"
            closed = newest is not None and self._readings[-1].contents is None and _is_shorter(contents, newest)
            if closed or any(_is_shorter(contents, former) for former in formers):
                return "read"  # what it has that is new, the next read gives
            return "copy" if self._is_beginning(contents) else None
        finally:
            if all(reading.contents is not contents for reading in self._readings):
                contents.close()

    def _is_beginning(self, contents: Contents) -> bool | None:
        """Whether all of this file stands at the beginning of the newest one; None: that was cut, or is not open."""
        reading = self._readings[-1] if self._readings else None
        if reading is None or reading.contents is None or not reading.stands():
            return None
        newest, size = reading.contents, contents.look()[0]
        if size > newest.look()[0] or contents.birth_ns < newest.birth_ns:
            return False
        guard = max(0, size - GUARD_BYTES)
        places = (0, min(size, HEAD_BYTES)), (guard, size - guard)
        return all(contents.read_at(*place) == newest.read_at(*place) for place in places)

    # --- which file it is ---------------------------------------------------------------------------------------------

    def _open(self, steps: list[Step]) -> None:
        missing: OSError | None = None
        contents: Contents | None = None
        waited = bool(self._waiting)
        try:
            contents = self._named()
        except FileNotFoundError as exc:
            missing = exc
        try:
            if self._readings:
                self._open_again(contents, missing, steps)
            elif missing is not None:
                raise missing
            else:
                assert contents is not None
                contents.look()
                self._readings = [self._upto(reading_of(contents, self.path))]
                self._out.select(self._readings[0], steps)
        finally:
            if contents is not None and all(r.contents is not contents for r in self._readings):
                if waited:
                    self._waiting.insert(0, contents)
                else:
                    contents.close()

    def _named(self) -> Contents:
        """The file that has the name, or had it while nobody could read on."""
        return self._waiting.pop(0) if self._waiting else open_contents(self.path)

    def _open_again(self, contents: Contents | None, missing: OSError | None, steps: list[Step]) -> None:
        """Find the file that was read, or state that it is gone."""
        wanted = self._readings[-1]
        present = Resume(wanted.info, wanted.as_entry())
        held = self.identities - {wanted.identity}
        found = self._beside.find(present, contents, held, self._all_read())
        if found is not None:
            self._settled.clear()  # whatever was asked, it is there again
            wanted.behind = found is not contents
            wanted.contents, wanted.grew = found, self._clock()
            if not is_same(found, wanted.info):
                wanted.owed = wanted.size
                wanted.size = wanted.offset
            if wanted.entry is not None and wanted.offset:
                seen(wanted, found)
                steps.append(Seen(self._out.source_id, wanted.head, wanted.guard))
            wanted.entry = None
            self._upto(wanted)
            if contents is not None and found is contents and not wanted.offset:
                left = self._beside.left(present, contents, self.identities, self._all_read())
                self._readings[:0] = self._ended(left)
        elif not self._lost_its_end(wanted, contents, held, steps):
            if contents is None:
                assert missing is not None
                raise missing
            # Its own inode may be among them: cut, written anew, and renamed then.
            between = self._between(present, contents, held)
            self._leave(wanted, self._after(between, contents), steps, same=is_same(contents, wanted.info))
        self._looks_back = True

    def _lost_its_end(
        self, wanted: Reading, contents: Contents | None, held: Set[tuple[int, int]], steps: list[Step]
    ) -> bool:
        """Go on in the file that was read if it did so; its program may have rotated it when it began anew."""
        present, live = Resume(wanted.info, wanted.as_entry()), wanted.entry is None
        if contents is not None and is_same(contents, wanted.info):
            between = self._beside.between(present, contents, held, self._all_read())
            for other in between:
                other.close()
            start = 0 if between else self._left_of(present, contents, live=live)
            if start:
                self._go_on_in(wanted, contents, start, steps)
            return start != 0
        renamed = self._beside.renamed(wanted.info, held)
        if renamed is None:
            return False
        path, other = renamed
        try:
            start = self._left_of(present, other, path, live=live)
        except BaseException:
            other.close()
            raise
        if start == 0:
            other.close()
            return False
        self._go_on_in(wanted, other, other.look()[0] if start is None else start, steps, behind=True)
        return True

    def _left_of(self, known: Resume, contents: Contents, path: str = "", *, live: bool) -> int | None:
        """How much a file that lost its end has of what was read; 0: it was truncated; None: it must go on first.

        Raises Shorter: nobody said yet.

        `live`: it was read just now. Of a local file its machine has not lost power since.
        """
        entry, size = known.entry, contents.look()[0]
        if not (self._recalls and size and entry.resume_off) or contents.compression is not Compression.NONE:
            return 0
        if live and network_mount(os.path.realpath(self.path)) is None:
            return 0
        if size >= entry.head_len and not has_head(contents, entry):
            return 0
        if not any(contents.read_at(0, HEAD_BYTES)):
            return 0  # a hole, as a writer without O_APPEND leaves where its file was truncated
        stamp = contents.identity, size, contents.changed_ns()
        if stamp == self._undecided:
            return None
        answer = self._settled.pop((known.identity, entry.resume_off), None)
        if answer is not None and answer.start is None:
            self._undecided = stamp
            return None
        if answer is not None and answer.start is not None and answer.start <= size:
            guard = answer.guard
            if contents.read_at(answer.start - len(guard), len(guard)) == guard:
                return answer.start
        raise Shorter(path or self.path, known, live=live)

    def _go_on_in(
        self, reading: Reading, contents: Contents, start: int, steps: list[Step], *, behind: bool = False
    ) -> None:
        """The file lost its end: its next generation goes on where it agrees with what was read."""
        end = NONE_U64 if reading.size > reading.offset else reading.offset
        self._out.gap(reading, steps, GapReason.REGRESSION, end)
        self._remember(reading)
        reading.contents = None
        again = Reading(reading.info, contents, start, behind=behind)
        seen(again, contents)
        self._readings[-1] = self._upto(again)
        self._out.select(again, steps)

    def _leave(self, wanted: Reading, following: list[Reading], steps: list[Step], *, same: bool) -> None:
        """The file that was read is gone, or was cut; `same`: what has the name is that one."""
        # If the one that has the name was read before, this one was at its end when it lost it.
        if wanted.size > wanted.offset or (wanted.offset and not following[-1].offset):
            self._out.gap(wanted, steps, GapReason.TRUNCATED if same else GapReason.UNLINKED)
        if wanted.offset:
            self._remember(wanted)
        self._readings = following
        self._out.select(following[0], steps)

    def look_back(self) -> None:
        """Have the next read take up files of earlier generations that were written to since."""
        self._looks_back = True

    def _look_back(self) -> None:
        found: list[Grown] = []
        if self._readings:
            newest = self._readings[-1]
            present = Resume(newest.info, newest.as_entry())
            found = self._beside.grown(present, self._history, self.identities, start=self._resumed)
        late: list[Reading] = []
        for number, each in enumerate(found):
            try:
                reading = self._left(*each)
            except BaseException:
                for contents in (*found[number:], *(r.contents for r in late)):
                    if contents is not None:
                        contents.close()
                raise
            if reading is not None:
                late.append(reading)
            else:
                each.close()
        self._readings[:0] = late
        self._looks_back = self._resumed = False

    def _left(self, path: str, contents: Contents, known: Resume) -> Reading | None:
        """A file of an earlier generation, from where it has something new; None: it has nothing."""
        size, start = contents.look()[0], known.entry.resume_off
        if holds(contents, known.entry) is None:
            stamp = known.identity, size, contents.changed_ns()
            if stamp not in self._starts:
                # Only of an earlier run's generation is it known where the packet file has it.
                found = self._left_of(known, contents, path, live=False) if known.entry.source_frame else 0
                if found is None:
                    return None
                self._starts[stamp] = found
            start = self._starts[stamp]
            if not start:
                older = best_match(contents, self._history)
                return self._upto(taken_up(contents, older)) if older and size > older.entry.resume_off else None
        if size <= start:
            return None
        if start == known.entry.resume_off:
            return self._upto(taken_up(contents, known))
        reading = Reading(known.info, contents, start)
        seen(reading, contents)
        return self._upto(reading)

    # --- which comes next ---------------------------------------------------------------------------------------------

    def _is_replaced(self, newest: Reading) -> bool:
        """Whether the name belongs to another file now, with something in it or in those that had it in between."""
        if self._waiting:
            return True
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        assert newest.contents is not None
        identity = status.st_dev, status.st_ino
        if identity == newest.contents.identity or self._taken(self.path, identity):
            return False
        return status.st_size > 0 or self._is_anything_between(newest)

    def _is_anything_between(self, newest: Reading) -> bool:
        """Whether a file that had the name after this one was rotated already; looked for when the folder changed."""
        changed = self._beside.changed_ns()
        if changed is not None and changed == self._looked_between:
            return False
        self._looked_between = changed
        try:
            contents = open_contents(self.path)
        except OSError:
            return False
        present = Resume(newest.info, newest.as_entry())
        found = self._beside.between(present, contents, self.identities, self._all_read())
        for other in (contents, *found):
            other.close()
        return bool(found)

    def _following(self, newest: Reading) -> list[Reading]:
        """The files that had the name after this one, and the one that has it."""
        try:
            contents = self._named()
        except OSError:
            return []  # it has lost its name again: its turn comes with the one that gets it
        between = self._between(Resume(newest.info, newest.as_entry()), contents, self.identities)
        try:
            return self._after(between, contents, asks=not between)
        except BaseException:
            self._waiting.insert(0, contents)
            raise

    def _after(self, between: list[Reading], contents: Contents, *, asks: bool = False) -> list[Reading]:
        """These, and the file that has the name."""
        if between and not contents.look()[0]:
            contents.close()  # its turn comes with its first bytes; until then the program may write to the one before
            between[-1].ended, between[-1].behind = False, True
            return between
        return [*between, self._begun(contents, asks=asks)]

    def _between(
        self, present: Resume, contents: Contents, held: Set[tuple[int, int]], since_ns: int = 0
    ) -> list[Reading]:
        return self._ended(self._beside.between(present, contents, held, self._all_read(), since_ns))

    def _ended(self, found: list[Contents]) -> list[Reading]:
        readings = [self._upto(reading_of(other, self.path)) for other in found]
        for reading in readings:
            reading.ended = True  # the next one has begun: first all of this
        return readings

    def _begun(self, contents: Contents, *, asks: bool) -> Reading:
        """The file that has the name: from its start, or from where it was left when late lines came to another."""
        same = [former for former in self._history if is_same(contents, former.info)][-1:]
        known = best_match(contents, same)
        if known is not None:
            return self._upto(taken_up(contents, known))
        by_packet_file = asks and same and same[0].entry.source_frame
        start = self._left_of(same[0], contents, live=False) if by_packet_file else 0
        return self._upto(reading_of(contents, self.path, _last_line(contents) if start is None else start))

    def _has_name(self, contents: Contents) -> bool:
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == contents.identity


def _is_shorter(contents: Contents, known: Resume) -> bool:
    """Whether this may be the file of a generation, without its end."""
    return is_same(contents, known.info) and known.entry.head_len == HEAD_BYTES and has_head(contents, known.entry)


def _last_line(contents: Contents) -> int:
    """Where the line begins that has no end yet."""
    size = contents.look()[0]
    start = max(0, size - _LINE)
    return start + contents.read_at(start, size - start).rfind(b"\n") + 1
