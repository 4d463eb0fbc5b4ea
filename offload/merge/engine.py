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
    - `reconfigure()` loses and doubles nothing: a source that is no longer wanted is read to its present end, then let
      go; wanted again, it goes on there.
    - What cannot be read (missing, not allowed) is told in `progress.problems` and does not keep the others waiting.
    - A full disk: while following it waits, and goes on by itself when there is room; otherwise it ends the merge. What
      else the disk refuses ends the merge, within a second also when there is nothing to write.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from ..errors import ClosedResourceError, OffloadError, PacketError
from ..files.packet_file import Fsync
from ..files.packet_stream import PacketWriter
from ..files.reading import Step
from ..files.segments import Segments
from ..files.series import live_path
from ..files.tail import Common, Shorter, Tail
from ..files.watch import Watch
from ..loops import Call, LoopThread
from .batches import FULL, Batches
from .batches import Output as Output
from .batches import Target as Target
from .by_time import ByTime, TimeOrder
from .finder import UNNUMBERED, Finder
from .held import Held
from .known import Known
from .mend import can_be_read_again, write_anew
from .progress import Patience
from .progress import Progress as Progress
from .shorter import start_of_new
from .sources import Sources

log = logging.getLogger("offload")

LINGER = 60.0  # a program that was told to open its log anew has done so by then
PAUSE = 0.001  # between two looks while following: lines that come together share a frame
_SOON = 64 << 20  # bytes in the sources that a stop still reads: some tenths of a second
_LOOK = 1.0  # seconds between looks at everything, whatever the system reports …
_LOOK_PER_SOURCE = 0.005  # … more for many sources: looking at one costs some 15 µs


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
        poll: look by time everywhere; on network mounts it is done by itself, as they do not report what others write.
        linger: seconds for which a file that lost its name is kept open after it was last written to, when following.
        max_held: files that nobody has a name for any more (deleted while we read them) use their room on the disk
            until they are read. If more bytes than this are unread in them, the oldest are given up: closed, with a GAP
            that states what nobody can read then. None: they are kept, however slow the output is.
        segments: as for PacketWriter, where `output` is a path.
        on_full: called on the writer's thread with the error when following begins to wait for room on the disk, or
            for a descriptor, and with None when it goes on; see also `Progress.full`. `stop()` and cancelling end the
            wait at once.
        by_time: write the lines in the order of the times in them; None: as they are read.
    """

    def __init__(
        self,
        sources: Sources | Sequence[str],
        output: str | os.PathLike[str] | Output,
        *,
        follow: bool = False,
        fsync: Fsync = "interval",
        poll: bool = False,
        linger: float = LINGER,
        on_full: Callable[[OSError | None], object] | None = None,
        segments: Segments | None = None,
        by_time: ByTime | None = None,
        max_held: int | None = None,
    ) -> None:
        self._known = Known(follow=follow, linger=linger)
        self._tails = self._known.tails
        self.progress = Progress(_tails=self._tails, copies=self._known.copies)
        self._patience = Patience(self.progress, on_full)
        self._held = Held(self.progress, max_held, follow=follow)
        sources = sources if isinstance(sources, Sources) else Sources(sources)
        self._follow = follow
        self._order = None if by_time is None else TimeOrder(by_time, self.progress)
        self._poll = poll
        if isinstance(output, str | os.PathLike):
            full = self._patience if follow else None
            output = PacketWriter(
                output,
                fsync=fsync,
                mend=can_be_read_again,
                anew=self._write_anew,
                full=full,
                segments=segments,
            )
        self._writer: Output = output
        self._batches = Batches(output, self.progress, self._order, self._patiently)
        path = live_path(output.path) if isinstance(output, PacketWriter) else None
        self._finder = Finder(sources, self._known, self.progress, path)
        self._reader = LoopThread("merge reader")
        self._next_id = 0
        self._stopping = False
        self._ran = False
        self._ended = False
        self._watch: Watch | None = None
        self._strangers: set[str] = set()  # changed paths that are no sources, until the next look
        self._changes: deque[Callable[[], None]] = deque()  # of settings, until the reader takes them in
        self._asking: list[asyncio.Future[None]] = []  # who waits for a look at everything, and what it finds
        self._leaving: list[Tail] = []  # no longer wanted, and not read to their ends
        self._looked: list[asyncio.Future[None]] = []  # for what the last look found

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

    def reconfigure(
        self,
        *,
        sources: Sources | Sequence[str] | None = None,
        linger: float | None = None,
        segments: Segments | None = None,
        by_time: ByTime | None = None,
        max_held: int | Literal["any", "as it is"] = "as it is",
    ) -> None:
        """Change settings while it follows, from the next look on; from any thread. None leaves one as it is.

        Of `by_time` the lateness changes, and all of `segments`, where the merge has them.

        Args:
            sources: what to read from now on. What is not in it any more is read to its present end and let go; what is
                in the packet file stays. Also the same again: all is looked at anew.

        Raises:
            ValueError: no sources given.
        """
        if sources is not None and not isinstance(sources, Sources):
            sources = Sources(sources)
        wanted = sources

        def change() -> None:
            if wanted is not None:
                self._finder.sources = wanted
            if linger is not None:
                self._known.set_linger(linger)
            if by_time is not None and self._order is not None:
                self._order.set_lateness(by_time.lateness)
            if max_held != "as it is":
                self._held.most = None if max_held == "any" else max_held
            if segments is not None and isinstance(self._writer, PacketWriter):
                self._writer.resegment(segments).add_done_callback(_told)

        self._changes.append(change)
        self._wake()

    async def caught_up(self) -> None:
        """Return once all that is in the sources at this moment is in the packet file; while following, for any loop.

        By time: or waits for its turn.

        Raises:
            ClosedResourceError: the merge ended before.
        """
        await self._reader.run(self._catch_up)

    def _wake(self) -> None:
        watch = self._watch
        if watch is not None:
            with contextlib.suppress(OffloadError):  # it has ended
                self._reader.post(watch.wake)

    def stop(self) -> None:
        """End `run()` soon; from any thread, any number of times. If the disk is full: now, as if it had failed."""
        self._stopping = True
        self._patience.end()
        self._wake()

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

    def _write_anew(self, path: Path, why: PacketError) -> None:
        self.progress.damaged, self.progress.repair = write_anew(path, why)

    def _learn(self, file: Target) -> None:
        self._known.learn(file.ledger.sources, file.generations)
        self._next_id = len(file.ledger.sources)
        self._finder.taken = file.identity
        self.progress.opened(file)

    # --- on the reader's thread ---------------------------------------------------------------------------------------

    async def _engine(self) -> None:
        watch = self._watch = Watch(poll=self._poll) if self._follow else None
        try:
            self._finder.scan(watch)
            self._batches.begin(len(self._tails))
            caught_up = await self._pass(self._tails.values(), final=watch is None)
            if watch is not None:
                await self._go_on(watch, caught_up=caught_up)
                if self.progress.lag_bytes <= _SOON:
                    # Once more, with what came while we stopped, and last lines that have no end yet.
                    self._stopping = False
                    self._finder.scan(watch)
                    await self._pass(self._tails.values(), final=True)
        except BaseException:
            self._patience.end()
            raise
        finally:
            for tail in self._tails.values():
                tail.close()
            if watch is not None:
                watch.close()
            try:
                self._batches.let_go()  # whatever ended it, what was read
            finally:
                # Cancelled or not: a batch that is under way must end before anybody may think that we have.
                try:
                    await self._batches.land_all()
                finally:
                    self._ended = True
                    for waiter in (*self._asking, *self._looked):
                        if not waiter.done():
                            waiter.set_exception(ClosedResourceError("the merge has ended"))

    async def _go_on(self, watch: Watch, *, caught_up: bool) -> None:
        """Follow until stopped."""
        next_look, order = 0.0, self._order
        told: set[str] = set()  # what has changed since the last look at everything
        while not self._stopping:
            while self._batches.are_under_way and caught_up:
                await self._batches.landed()
            if caught_up:
                self._tell_looked()
            await asyncio.sleep(PAUSE)
            if not (self._stopping or self._changes or self._asking):
                wake = next_look if order is None else min(next_look, order.due())
                await watch.wait(max(0.0, wake - time.monotonic()))
            if self._stopping:
                return
            if self._changes:
                self._change(watch)
                next_look = 0.0
            if self._leaving:
                await self._let_leave()
            if self._asking:
                self._looked += self._asking
                self._asking.clear()
                next_look = 0.0
            changed = watch.take()
            if changed is not None and self._finder.links:
                changed = {self._finder.links.get(path, path) for path in changed}
            now = time.monotonic()
            sizes: dict[Tail, int] = {}
            if changed is None or now >= next_look:
                next_look = now + max(_LOOK, _LOOK_PER_SOURCE * len(self._tails))
                self._batches.ask()
                # What came from them since they were looked at, and who has changed just now.
                self._finder.scan(watch, self._strangers | (changed or set()) - self._tails.keys())
                self._strangers.clear()
                dirty = list(self._tails.values())
                # What is written to a file that was linked and unlinked is told of the name that it was opened by.
                told |= self._tails.keys() if changed is None else changed
                for tail in dirty:
                    if tail.path in told:
                        tail.look_back()
                told.clear()
                if changed is not None:
                    sizes = {tail: tail.size for tail in dirty if tail.path not in changed}
                self._held.count(_LOOK)
            else:
                told |= changed
                unknown = {p for p in changed if p not in self._tails} - self._strangers
                if unknown:
                    self._strangers |= unknown
                    changed |= unknown | self._finder.scan(watch, unknown)
                dirty = [self._tails[p] for p in changed if p in self._tails]
            if order is not None:
                dirty += [tail for tail in order.deferred if tail not in dirty]
            if dirty or (order is not None and order.is_due()):
                caught_up = await self._pass(dirty, final=False)
            self._doubt(watch, sizes)

    def _doubt(self, watch: Watch, sizes: dict[Tail, int]) -> None:
        """Count what was written a look ago or longer, and nobody had told of; its folder is looked at by time then."""
        latest = time.time_ns() - int(_LOOK * 1e9)
        for tail, size in sizes.items():
            if tail.size > size and tail.mtime_ns < latest:
                self.progress.unreported += 1
                watch.distrust(os.path.dirname(os.path.realpath(tail.path)))

    def _change(self, watch: Watch) -> None:
        """Take in new settings."""
        while self._changes:
            self._changes.popleft()()
        watch.forget()
        self._leaving = self._finder.no_longer_wanted()

    async def _let_leave(self) -> None:
        """Read what is no longer wanted to its present end, and let go of it."""
        if await self._pass(self._leaving, final=True):
            for tail in self._leaving:
                self._held.let_go(tail)
                self._known.park(tail.path)
            self._leaving = []

    async def _catch_up(self) -> None:
        if self._ended or self._watch is None:
            raise ClosedResourceError("the merge does not follow, or has ended; await its run()")
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asking.append(waiter)
        self._watch.wake()
        await waiter

    def _tell_looked(self) -> None:
        looked, self._looked = self._looked, []
        for waiter in looked:
            if not waiter.done():
                waiter.set_result(None)

    async def _pass(self, tails: Iterable[Tail], *, final: bool) -> bool:
        """Read what is there from these tails, an arena each in turn; False if stopped before the end."""
        queue = deque(tails)
        batches = self._batches
        arena = await batches.arena()
        steps: list[Step] = []
        stats: dict[int, tuple[int, int]] = {}
        self.progress.caught_up = False
        order = self._order
        if order is not None:
            order.expect(queue, final=final and not self._leaving)  # others go on
        while queue and not self._stopping:
            tail = queue.popleft() if order is None else order.next(queue)
            if tail is None:
                break
            question: Shorter | None = None
            before = len(steps)
            unnumbered = tail.source_id == UNNUMBERED
            if unnumbered:
                tail.source_id = self._next_id
            try:
                more = tail.read(arena, steps, final=final)
            except Shorter as exc:
                more, question = True, exc
            except OSError as exc:
                self._trouble(tail, exc)
                more = self._held.makes_room(exc)
            else:
                self.progress.problems.pop(tail.path, None)
            if len(steps) > before:
                stats[tail.source_id] = (tail.size, tail.mtime_ns)
                self._next_id += unnumbered
            elif unnumbered:
                tail.source_id = UNNUMBERED  # it could not be opened: the number goes to the next that can
            if order is not None:
                order.put(tail, steps, more=more)
            full = not self._held.keep(tail, more or self._follow)
            if more and full and not self._follow:
                queue.appendleft(tail)  # to its end first: opened again, it would be read up to the size it has then
            elif more:
                queue.append(tail)
            if more or arena.room < len(arena.data) // 16 or len(steps) >= FULL:
                batches.send(arena, steps, stats)
                self._held.count(_LOOK)
                arena, steps, stats = await batches.arena(), [], {}
            if question is not None and not await self._settle(tail, question):
                queue.remove(tail)
                if order is not None:
                    order.put(tail, steps, more=False)
        batches.send(arena, steps, stats)
        self.progress.caught_up = not queue
        return not queue

    async def _settle(self, tail: Tail, question: Shorter) -> bool:
        """Compare a file that became shorter with what the output has of it; False: it cannot be read now."""
        generation = None if question.live else question.known.entry.generation

        def held(start: int, end: int) -> Call[bytes | OSError]:
            return self._writer.held(tail.source_id, start, end, generation)

        try:
            # By time, what was read just now may not be in the output yet.
            may_ask = self._order is None or not question.live
            tail.settle(question, await start_of_new(question, held) if may_ask else Common(0))
        except OSError as exc:
            self._trouble(tail, exc)
            return False
        return True

    def _trouble(self, tail: Tail, exc: OSError) -> None:
        self.progress.problems[tail.path] = exc
        tail.close()

    async def _patiently(self, call: Call[None]) -> None:
        """While a batch is under way, the output is slow: open the files that come, before they lose their names."""
        while self._watch is not None and not self._stopping and not call.done():
            if not (await asyncio.wait([call], timeout=_LOOK))[0]:
                self._finder.scan(self._watch)
                if self.progress.full is not None:
                    self._held.makes_room(self.progress.full)  # for the output, if it lacks descriptors
                self._held.hold(self._tails.values())
                self._held.count(_LOOK)


def _told(call: asyncio.Future[None]) -> None:
    if not call.cancelled() and (error := call.exception()) is not None:
        log.warning("segments stay as they were: %s", error)
