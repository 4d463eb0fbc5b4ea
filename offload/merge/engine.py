"""The merge: a thread that reads many tails, a thread that writes one packet file, and the loop that called for it.

    caller's loop          reader's thread                        writer's thread
    ─────────────          ───────────────                        ───────────────
    run() ───────────────► inotify / time ─► dirty tails
                           Tail.read ─► arena ──── steps ───────► frames, one writev, COMMIT, fsync
    progress ◄──────────── count           ▲                           │
    stop() ──────────────►                 └──── arena free again ◄────┘

Promises:
    - Each source's bytes stand in the packet file once and in order, whatever ends the merge; started again, it goes on
      where the packet file ends, for nothing else says where that is.
    - Memory is bounded by the arenas, whatever the sources hold: when all are under way, reading waits for the writer.
    - One frame for each read of a source, no object for a line.
    - `stop()` ends it with everything read so far in the file; if little is left (_SOON), with everything there is.
    - What cannot be read (missing, not allowed) is told in `progress.problems` and does not keep the others waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TypeVar

from ..errors import ClosedResourceError, OffloadError
from ..files.packet_file import Fsync, Piece, open_regular
from ..files.packet_stream import PacketWriter
from ..files.tail import Arena, Begin, Former, Gap, Resume, Seen, Step, Tail, holds, is_former
from ..files.watch import Watch
from ..loops import Call, LoopThread, outlast
from ..packets.codec import CommitEntry, GapInfo, SourceInfo
from ..packets.ledger import Ledger, SourceState
from ..packets.recover import Recovery
from .sources import Sources

R = TypeVar("R")

ARENAS = 4  # one is read into, one is written, and two so that neither waits for the other's hiccup
PAUSE = 0.001  # between two looks while following: lines that come together share a frame
_OTHERS = 64  # descriptors that are left to the rest of the program
_SOON = 64 << 20  # bytes in the sources that a stop still reads: some tenths of a second
_UNNUMBERED = -1  # a source that is not in the packet file yet
_LOOK = 1.0  # seconds between looks at everything, whatever the system reports …
_LOOK_PER_SOURCE = 0.005  # … more for many sources: looking at one costs some 15 µs


@dataclass
class Progress:
    """How far a merge is; written by its reader, read by anybody.

    Attributes:
        sources: files found.
        lines, bytes: handed to the packet file in this run.
        gaps: stretches that nobody can read any more.
        problems: path -> why it is not read.
        caught_up: everything that was there at the last look is read.
    """

    sources: int = 0
    lines: int = 0
    bytes: int = 0
    gaps: int = 0
    problems: dict[str, OSError] = field(default_factory=dict)
    caught_up: bool = False
    started: float = field(default_factory=time.monotonic)
    _tails: list[Tail] = field(default_factory=list)
    _ended: float = 0.0

    @property
    def seconds(self) -> float:
        """How long the run has taken."""
        return (self._ended or time.monotonic()) - self.started

    def ended(self) -> None:
        self._ended = time.monotonic()

    @property
    def lag_bytes(self) -> int:
        """Bytes that are in the sources and not read, as of the last look."""
        return sum(tail.lag for tail in list(self._tails))


class Target(Protocol):
    """What a merge needs of the packet file that it writes; each method as PacketFile's."""

    @property
    def identity(self) -> tuple[int, int]: ...
    @property
    def ledger(self) -> Ledger: ...
    def generations(self, state: SourceState) -> Iterator[tuple[SourceInfo, CommitEntry]]: ...
    def open_source(self, info: SourceInfo, source_id: int | None = None) -> int: ...
    def gap(self, source_id: int, info: GapInfo) -> None: ...
    def append(self, pieces: Iterable[Piece], stats: Mapping[int, tuple[int, int]] | None = None) -> None: ...


class Output(Protocol):
    """Where a Target is, on a thread of its own; each method as PacketWriter's."""

    async def start(self) -> object: ...
    def use(self, function: Callable[[Target], R], /) -> Call[R]: ...
    async def aclose(self) -> None: ...


class Merge:
    """Merge the lines of many files into one packet file.

        async with Merge(Sources(["logs/"]), "merged.opk") as merge:
            await merge.run()

    Args:
        sources: what to read; a list of files, folders and globs will do.
        output: the packet file; one that is there is continued. It is never read as a source. Or an Output: what
            stands for a packet file that is elsewhere (`net/client.py`).
        follow: go on with what is added until `stop()`, otherwise end with what is there.
        fsync: as for PacketFile.
        poll: look by time, do not trust the system to report changes (network mounts).
    """

    def __init__(
        self,
        sources: Sources | Sequence[str],
        output: str | os.PathLike[str] | Output,
        *,
        follow: bool = False,
        fsync: Fsync = "interval",
        poll: bool = False,
    ) -> None:
        self.progress = Progress()
        self._sources = sources if isinstance(sources, Sources) else Sources(sources)
        self._follow = follow
        self._poll = poll
        if isinstance(output, str | os.PathLike):
            output = PacketWriter(output, fsync=fsync, mend=_can_be_read_again)
        self._writer: Output = output
        self._reader = LoopThread("merge reader")
        self._tails: dict[str, Tail] = {}
        self._open: set[Tail] = set()  # those that stay open between two reads, as many as there are descriptors for
        self._descriptors = _spare_descriptors()
        self._resumes: dict[str, Resume] = {}
        self._next_id = 0
        self._former: Former = {}
        self._names: dict[tuple[int, int], str] = {}  # of the files that sources had when the packet file was left
        self._output_identity: tuple[int, int] | None = None
        self._stopping = False
        self._ran = False
        self._watch: Watch | None = None
        self._arenas: deque[Arena] = deque()
        self._under_way: deque[tuple[Call[None], Arena]] = deque()
        self._strangers: set[str] = set()  # changed paths that are no sources, until the next look

    async def start(self) -> Self:
        """Open the packet file and learn where it stands. Raises as PacketWriter.start()."""
        await self._writer.start()
        try:
            await self._writer.use(self._learn)
            await self._reader.start()
        except BaseException:
            await self._writer.aclose()
            raise
        return self

    async def run(self) -> Progress:
        """Read until the end of what is there, or while following until `stop()`.

        Raises:
            BrokenResourceError: the packet file could not be written; it ends with its last whole frame.

        Runs on the merge's threads. Cancelling ends it as soon as what was read is in the file.
        """
        if self._ran:
            raise ClosedResourceError("this merge has run; make another to go on")
        self._ran = True
        self.progress.started = time.monotonic()
        try:
            await self._reader.run(self._engine)
        finally:
            self.progress.ended()
        return self.progress

    def stop(self) -> None:
        """End `run()` soon; from any thread, any number of times."""
        self._stopping = True
        watch = self._watch
        if watch is not None:
            with contextlib.suppress(OffloadError):  # it has ended
                self._reader.post(watch.wake)

    async def aclose(self) -> None:
        """Stop, if `run()` is still under way, end both threads and close the packet file."""
        self.stop()
        try:
            await self._reader.aclose()
        finally:
            await self._writer.aclose()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        except OffloadError:
            if exc is None:  # otherwise the block knows already
                raise

    # --- on the writer's thread ---------------------------------------------------------------------------------------

    def _learn(self, file: Target) -> None:
        for state in file.ledger.sources.values():
            path = os.fsdecode(state.path)
            self._resumes[path] = Resume(state.info, state.entry())
            self._names[state.info.device, state.info.inode] = path
            for info, entry in file.generations(state):
                self._former.setdefault((info.device, info.inode), entry)
        self._next_id = len(file.ledger.sources)
        self._output_identity = file.identity

    # --- on the reader's thread ---------------------------------------------------------------------------------------

    async def _engine(self) -> None:
        self._arenas.extend(Arena() for _ in range(ARENAS))
        watch = self._watch = Watch(poll=self._poll) if self._follow else None
        try:
            self._scan(watch)
            caught_up = await self._pass(self._tails.values(), final=watch is None)
            if watch is not None:
                await self._go_on(watch, caught_up=caught_up)
                if self.progress.lag_bytes <= _SOON:
                    # Once more, with what came while we stopped, and last lines that have no end yet.
                    self._stopping = False
                    self._scan(watch)
                    await self._pass(self._tails.values(), final=True)
        finally:
            for tail in self._tails.values():
                tail.close()
            if watch is not None:
                watch.close()
            # Cancelled or not: a batch that is under way must end before anybody may think that we have.
            await self._land_all()

    async def _go_on(self, watch: Watch, *, caught_up: bool) -> None:
        """Follow until stopped."""
        next_look = 0.0
        while not self._stopping:
            while self._under_way and caught_up:
                await self._landed()
            await asyncio.sleep(PAUSE)
            if not self._stopping:
                await watch.wait(max(0.0, next_look - time.monotonic()))
            if self._stopping:
                return
            changed = watch.take()
            now = time.monotonic()
            if changed is None or now >= next_look:
                next_look = now + max(_LOOK, _LOOK_PER_SOURCE * len(self._tails))
                self._strangers.clear()
                self._scan(watch)
                dirty = list(self._tails.values())
            else:
                unknown = {p for p in changed if p not in self._tails} - self._strangers
                if unknown:
                    self._strangers |= unknown
                    self._scan(watch)
                    changed |= unknown
                dirty = [self._tails[p] for p in changed if p in self._tails]
            if dirty:
                caught_up = await self._pass(dirty, final=False)

    def _scan(self, watch: Watch | None) -> None:
        """Find files that are not known yet."""
        if watch is not None:
            for folder in self._sources.folders():
                watch.add(folder)
        files, missing = self._sources.scan()
        for path in files:
            if path in self._tails or path not in self._resumes:
                continue
            if not self._is_taken(path, (files[path].st_dev, files[path].st_ino)):
                self._add(path)
        held = {tail.identity for tail in self._tails.values()}
        for path, status in files.items():
            identity = (status.st_dev, status.st_ino)
            if path in self._tails or identity in held or identity == self._output_identity:
                continue  # known; a link to a source, or the file that one is still reading under the name it had
            held.add(identity)
            former = self._former.get(identity)
            if former is not None and is_former(path, former):
                if status.st_size > former.resume_off:
                    self._add(path).begin_at(former)  # its writer went on after we had left it
                continue
            name = self._names.get(identity)
            if name is not None and is_former(path, self._resumes[name].entry):
                if name not in self._tails:
                    self._add(name)  # renamed since, and the name not taken yet
                continue
            self._add(path).size = status.st_size
        self.progress.sources = len(self._tails)
        for path in [p for p in self.progress.problems if p not in self._tails]:
            del self.progress.problems[path]
        self.progress.problems.update(missing)

    def _add(self, path: str) -> Tail:
        resume = self._resumes.get(path)
        source_id = _UNNUMBERED if resume is None else resume.entry.source_id
        tail = self._tails[path] = Tail(
            path, source_id, resume, follow=self._follow, former=self._former, taken=self._is_taken
        )
        self.progress._tails.append(tail)
        return tail

    def _is_taken(self, path: str, identity: tuple[int, int]) -> bool:
        """Whether this file is one that another source reads or has read: a chain of renames gave it this name."""
        name = self._names.get(identity)
        if name == path and path not in self._tails:
            return False  # as it was left
        if any(tail.identity == identity and tail.path != path for tail in self._tails.values()):
            return True
        former = self._former.get(identity)
        if former is not None and is_former(path, former):
            return True
        return name is not None and name != path and is_former(path, self._resumes[name].entry)

    async def _pass(self, tails: Iterable[Tail], *, final: bool) -> bool:
        """Read what is there from these tails, an arena each in turn; False if stopped before the end."""
        queue = deque(tails)
        arena = await self._free_arena()
        steps: list[Step] = []
        stats: dict[int, tuple[int, int]] = {}
        self.progress.caught_up = False
        while queue and not self._stopping:
            tail = queue.popleft()
            before = len(steps)
            unnumbered = tail.source_id == _UNNUMBERED
            if unnumbered:
                tail.source_id = self._next_id
            try:
                more = tail.read(arena, steps, final=final)
            except OSError as exc:
                self._trouble(tail, exc)
                more = False
            else:
                self.progress.problems.pop(tail.path, None)
            if len(steps) > before:
                stats[tail.source_id] = (tail.size, tail.mtime_ns)
                self._next_id += unnumbered
            elif unnumbered:
                tail.source_id = _UNNUMBERED  # it could not be opened: the number goes to the next that can
            full = not self._keep(tail, more or self._follow)
            if more and full and not self._follow:
                queue.appendleft(tail)  # to its end first: opened again, it would be read up to the size it has then
            elif more:
                queue.append(tail)
            if more or arena.room < len(arena.data) // 16 or len(steps) >= 512:
                self._send(arena, steps, stats)
                arena, steps, stats = await self._free_arena(), [], {}
        self._send(arena, steps, stats)
        self.progress.caught_up = not queue
        return not queue

    def _keep(self, tail: Tail, wanted: bool) -> bool:
        """Leave a tail open that is wanted; False if there are no descriptors left for it."""
        self._open.discard(tail)
        room = len(self._open) < self._descriptors
        if wanted and tail.is_open and room:
            self._open.add(tail)
        elif not wanted or self._follow:
            tail.close()
        return room

    def _trouble(self, tail: Tail, exc: OSError) -> None:
        self.progress.problems[tail.path] = exc
        tail.close()

    def _send(self, arena: Arena, steps: list[Step], stats: dict[int, tuple[int, int]]) -> None:
        if not steps:
            arena.at = 0
            self._arenas.append(arena)
            return
        for step in steps:
            if type(step) is Piece:
                self.progress.lines += step.count
                self.progress.bytes += len(step.payload)
            elif type(step) is Gap:
                self.progress.gaps += 1
        call = self._writer.use(lambda file: file.append(_pieces(file, steps), stats))
        self._under_way.append((call, arena))

    async def _free_arena(self) -> Arena:
        while not self._arenas:
            await self._landed()
        return self._arenas.popleft()

    async def _land_all(self) -> None:
        """Wait for every batch under way, then raise what the first that failed raised: the others' is the same."""
        failure: OffloadError | None = None
        while self._under_way:
            try:
                await self._landed()
            except OffloadError as exc:
                failure = failure or exc
        if failure is not None:
            raise failure

    async def _landed(self) -> None:
        """Wait for the oldest batch under way."""
        call, arena = self._under_way.popleft()
        await outlast(call)  # a batch may not be dropped: those behind it go on where it ends
        arena.at = 0
        self._arenas.append(arena)


def _pieces(file: Target, steps: Iterable[Step]) -> Iterator[Piece]:
    for step in steps:
        if type(step) is Piece:
            yield step
        elif type(step) is Begin:
            source_id = file.open_source(step.info, None if step.first else step.source_id)
            assert source_id == step.source_id, "the reader numbers sources as the packet file does"
        elif type(step) is Gap:
            file.gap(step.source_id, step.info)
        elif type(step) is Seen:
            state = file.ledger.sources[step.source_id]
            state.head, state.tail = step.head, step.guard


def _spare_descriptors() -> int:
    """How many files may stay open: what the system grants this process, but for some that others need."""
    try:
        import resource
    except ImportError:  # Windows: what the C library grants
        return 512 - _OTHERS
    granted, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 30 if granted == resource.RLIM_INFINITY else max(1, granted - _OTHERS)


def _can_be_read_again(recovery: Recovery) -> bool:
    """Whether the sources still hold everything that stands behind the damage."""
    wanted: dict[int, int] = {}
    for header in recovery.behind:
        state = recovery.ledger.sources.get(header.source_id)
        if state is None or state.generation != header.generation:
            return False
        end = header.source_off + header.payload_len
        wanted[header.source_id] = max(end, wanted.get(header.source_id, 0))
    for source_id, end in wanted.items():
        state = recovery.ledger.sources[source_id]
        try:
            fd, status = open_regular(os.fsdecode(state.path))
        except OSError:
            return False
        try:
            if status.st_size < end or holds(fd, state.entry()) is None:
                return False
        finally:
            os.close(fd)
    return True
