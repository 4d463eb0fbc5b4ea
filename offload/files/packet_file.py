"""Packet files on disk, written: PacketFile, for one thread (`frame_source.py` reads).

The layout is in `packets/format.py`, what a frame does to the state in `packets/recover.py`; event loops use
`packet_stream.py`.

Promises:
    - One writer: the file is locked from opening to closing; a second writer gets BusyResourceError.
    - A batch goes out in one system call behind whole frames. What the disk refuses is cut back to the last whole
      frame, and the writer can only be closed from then on; unless `full` waits for room: then the rest of the batch
      goes out where it was cut, and what is in the file is synced by policy before the wait.
    - Whatever ended the writer before (kill -9 too), opening cuts a torn tail and goes on behind the last whole frame.
      A run that adds nothing leaves the file as it is, but for that and a COMMIT behind frames that lack one.
    - A COMMIT stands behind at most COMMIT_BYTES of frames and one batch.
    - `durable_upto` in a COMMIT never passes the bytes that an fsync before it has covered.
    - fsync policy: "none" leaves it to the system, "interval" syncs before the COMMIT of each interval, "always" before
      `append` returns. One fsync serves all that was written since the one before. But with "none", at most SYNC_BYTES
      and a batch are ever unsynced, and a new file's first frame and its name are on the disk before it has a second.
    - An fsync that failed is final: nothing behind it is called durable by this writer, and no other is tried.

What an fsync is worth after one that failed is in the head of `frame_file.py`.

With `segments` the file is closed as a segment when it is due, and the next one begun; `rolling.py` says how.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import PacketError
from ..packets.codec import Buffer, CommitEntry, FileInfo, GapInfo, SourceInfo
from ..packets.format import GUARD_BYTES, HEAD_BYTES, HEADER_BYTES, Flag, FrameType
from ..packets.ledger import Ledger, SourceState
from ..packets.recover import generations
from ..packets.restate import restate
from .descriptor import read_at
from .frame_file import Durable, FrameFile
from .frame_file import Fsync as Fsync
from .frame_file import Full as Full
from .recall import Recall, ranges
from .rolling import Index, begin_next, hand_over, opening, seal_of
from .segments import Segments

COMMIT_BYTES = 16 << 20
SYNC_BYTES = 64 << 20  # `recover` checks twice as much behind the last durable COMMIT


@dataclass(slots=True)
class Piece:
    """One frame of a source's content, before it has its place: what the source gave and what it counts.

    `time_ns`: when it arrived, if that is not when it is appended.
    """

    source_id: int
    payload: Buffer
    source_off: int
    count: int
    flags: Flag = Flag.NONE
    type: FrameType = FrameType.LINES
    time_ns: int | None = None


class PacketFile(FrameFile):
    """A packet file opened for writing, for one thread.

    Args:
        path: made if it is not there.
        fsync: see the head of this module.
        written_by: goes into the FILE frame.
        clock: Unix nanoseconds, for the arrival time in each frame.
        full: called with the error if there is no room on the disk (ENOSPC, EDQUOT), or no descriptor for the next
            segment (EMFILE, ENFILE); it blocks for as long as it likes and returns whether to try again, otherwise the
            error is raised. Called with None once there was room.
        settle: before the first content of a generation goes out, have its SOURCE frame on the disk (but with "none").
            Then each frame that a power cut leaves behind a hole is of a source that is known before the hole.
        segments: when to close it as a segment and begin the next; None: never.
        on_sealed: called with its number when a segment has been closed, and is on the disk.

    Raises:
        BusyResourceError: somebody else writes it.
        PacketError: no packet file, or one that is damaged where its state stands; it was not touched.
        OSError: as `os.open`.

    Attributes:
        ledger: the state at the end of the file; another one in each segment, with the same states of sources.
        recovery: what opening found.
        durable: what the last fsync that succeeded has proved; read from any thread.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: Fsync = "interval",
        written_by: str = "offload",
        clock: Callable[[], int] = time.time_ns,
        full: Full | None = None,
        settle: bool = False,
        segments: Segments | None = None,
        on_sealed: Callable[[int], object] | None = None,
    ) -> None:
        super().__init__(path, fsync=fsync, written_by=written_by, clock=clock, full=full)
        self._settles = settle and fsync != "none"
        self._segments = segments
        self._on_sealed = on_sealed
        self._recall: Recall | None = None
        self._recalled = False  # since the last tick
        try:
            self._opening = opening(self._read_at) if self.segment and segments is not None else 0
            self._bare = self.ledger.end <= self._opening  # it holds nothing of its own
            if self.ledger.sealed and self.recovery.hole is None:
                self._begin_segment()
            self._complete()
        except BaseException:
            self._forget()
            self._file.close()
            raise

    def source_named(self, path: bytes) -> SourceState | None:
        """The source of this path, as it stands now."""
        for state in self.ledger.sources.values():
            if state.path == path:
                return state
        return None

    def generations(self, state: SourceState) -> Iterator[tuple[SourceInfo, CommitEntry]]:
        """The earlier generations of a source, newest first: which file it was, and how far it was read."""
        return generations(self._read_at, self._file.end, state)

    def held(self, source_id: int, start: int, end: int, generation: int | None = None) -> bytes:
        """What it holds of a source's file, by the bytes' places in that file.

        Args:
            start, end: bytes [start, end) of the file.
            generation: one that ends in that file, which may have begun in earlier ones; None: the present one.

        Returns:
            b"" if it does not hold all of them, or no longer.

        Raises:
            OSError: a segment cannot be read.
        """
        if self._staged:  # of a batch that came to nothing
            self._write()
        state = self.ledger.sources[source_id]
        self._recalled = True
        try:
            generations = [(state.info, state.entry()), *self.generations(state)]
            wanted = ranges(generations, state.generation if generation is None else generation)
            if self._recall is None:
                self._recall = Recall(self._live, self.segment, self.ledger.end, self.ledger.prev_len)
            self._recall.grow(self.ledger.end)
            return self._recall.read(source_id, wanted, start, end)
        except PacketError:
            return b""
        except OSError as exc:
            if exc.errno in (errno.ENOENT, errno.EINVAL):  # a segment is gone, as retention does; or it is damaged
                return b""
            raise

    def _complete(self) -> None:
        """Know heads and guards of generations that go on in a file and were killed before their first COMMIT."""
        for state in self.ledger.sources.values():
            at = state.resume_off
            if at and at == state.info.start_off and not (state.tail or state.guard_len):
                with contextlib.suppress(OSError):
                    state.head = self.held(state.source_id, 0, min(at, HEAD_BYTES))
                    state.tail = self.held(state.source_id, max(0, at - GUARD_BYTES), at)

    def _forget(self) -> None:
        recall, self._recall = self._recall, None
        if recall is not None:
            recall.close()

    def open_source(self, info: SourceInfo, source_id: int | None = None) -> int:
        """Begin a source, or the next generation of one, and return its id. It goes out with the next append."""
        if source_id is None:
            source_id, generation, seq = len(self.ledger.sources), 0, 0
            info = info._replace(before=None)
        else:
            state = self.ledger.sources[source_id]
            generation, seq = state.generation + 1, state.next_seq
            info = info._replace(before=state.entry())
        self._stage(
            FrameType.SOURCE,
            info.pack(),
            source_id=source_id,
            seq=seq,
            source_off=info.start_off,
            generation=generation,
        )
        return source_id

    def gap(self, source_id: int, info: GapInfo) -> None:
        """State bytes of a source that nobody can recover. It goes out with the next append."""
        state = self.ledger.sources[source_id]
        assert state.resume_off == info.start <= info.end, "a gap that does not begin where its source stands"
        self._stage(
            FrameType.GAP,
            info.pack(),
            source_id=source_id,
            seq=state.next_seq,
            source_off=state.resume_off,
            generation=state.generation,
        )

    def append(self, pieces: Iterable[Piece], stats: Mapping[int, tuple[int, int]] | None = None) -> None:
        """Write these pieces, a frame each, in one system call; with fsync "always" return once they are on the disk.

        Args:
            pieces: each one's `source_off` must be where its source stands.
            stats: size in bytes and mtime in ns of sources, as seen when they were read; goes into the next COMMIT.

        Raises:
            OSError: the file ends at the last whole frame; this writer must be closed.
        """
        now = self._clock()
        for piece in pieces:
            if self._segments is not None and self._is_due(len(piece.payload), now):
                self._roll()
            state = self.ledger.sources[piece.source_id]
            assert piece.source_off == state.resume_off, "a piece that does not follow the one before"
            if self._settles and state.source_frame >= self._synced:
                self._write()
                self.sync()
            self._stage(
                piece.type,
                piece.payload,
                flags=piece.flags,
                source_id=piece.source_id,
                seq=state.next_seq,
                source_off=piece.source_off,
                count=piece.count,
                generation=state.generation,
                time_ns=now if piece.time_ns is None else piece.time_ns,
            )
            self._bare = False
        for source_id, (size, mtime_ns) in (stats or {}).items():
            state = self.ledger.sources[source_id]
            state.size, state.mtime_ns = size, mtime_ns
        self._write()
        if self.fsync == "always" or (self.fsync == "interval" and self._file.end - self._synced >= SYNC_BYTES):
            self.sync()
        if self._file.end - max(0, self._committed()) >= COMMIT_BYTES:
            self.commit()

    def commit(self) -> None:
        """Write a COMMIT if a frame was written since the last one."""
        if self._staged or self.ledger.changed:
            if self._staged:
                self._write()
            info = self.ledger.commit(self._synced)
            self._stage(FrameType.COMMIT, info.pack())
            self._write()

    def tick(self) -> None:
        """What is due at the end of an interval: fsync by policy, then a COMMIT."""
        if self._staged or self.ledger.changed:
            self._check_place()
            if self.fsync != "none":
                self._write()
                self.sync()
            self.commit()
        if self._segments is not None and self._is_due(0, self._clock()):
            self._roll()
        if not self._recalled:  # it holds descriptors of segments, which may be removed
            self._forget()
        self._recalled = False

    def close(self, *, broken: bool = False) -> None:
        """Write the last COMMIT, sync by policy, unlock. `broken`: only let go of the file."""
        try:
            if not broken:
                self.tick()
                if self.fsync != "none":
                    self.sync()
                self._check_place()
        finally:
            self._forget()
            self._file.close()

    def _check_place(self) -> None:
        """Raises FileNotFoundError if what is written can no longer be found where the user expects it."""
        try:
            status = os.stat(self._live)
        except FileNotFoundError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self.identity:
            raise FileNotFoundError(errno.ENOENT, "was removed or replaced while it was written", os.fspath(self.path))

    def _committed(self) -> int:
        return self.ledger.last_commit if self.ledger.last_commit < self.ledger.end else 0

    def resegment(self, segments: Segments) -> None:
        """Close segments by other rules from now on; only where it was opened with some."""
        assert self._segments is not None, "a plain packet file stays one"
        self._segments = segments

    # --- segments ---------------------------------------------------------------------------------------------------

    def due_in(self) -> float | None:
        """Seconds until the present segment is too old; None: it never is, or holds nothing of its own."""
        if self._segments is None or self._segments.max_age is None or self._bare:
            return None
        return max(0.0, self._segments.max_age - (self._clock() - self._begun_ns) / 1e9)

    def _is_due(self, size: int, now: int) -> bool:
        """Whether the segment ends before a frame of so many bytes; one that states sources alone is never closed."""
        assert self._segments is not None
        end, most, age = self.ledger.end, self._segments.max_bytes, self._segments.max_age
        if self._bare:
            return False
        if most is not None and size and end + HEADER_BYTES + size > max(most, 2 * self._opening):
            return True
        return age is not None and now - self._begun_ns >= age * 1e9

    def _roll(self) -> None:
        """Close this segment and begin the next one."""
        self._check_place()
        if self._staged:
            self._write()
        self._stage(FrameType.COMMIT, self.ledger.commit(self._synced, full=True).pack())
        index = None
        for payload in self._index.frames():
            index = self.ledger.end if index is None else index
            self._stage(FrameType.INDEX, payload)
        self._stage(FrameType.SEAL, seal_of(self.ledger, index, self._begun_ns).pack())
        self._write()
        self._begin_segment()

    def _begin_segment(self) -> None:
        """Begin the next segment, with the live name; the present one ends in a SEAL."""
        self._forget()
        self.sync()
        file, before = self._file, self.ledger
        assert before.info is not None
        end, size = self.segment, file.end

        def history(state: SourceState) -> Iterator[tuple[SourceInfo, CommitEntry]]:
            return generations(lambda offset, length: read_at(file.fd, offset, length), size, state)

        try:
            self._file = self._patiently(lambda: begin_next(self._live, file.fd))
            self.ledger, self._index, self._begun = Ledger(), Index(), True
            self._synced, self._left = 0, (0, 0)
            info = FileInfo(before.info.file_id, end + 1, before.next_chain(), self._written_by)
            self._stage(FrameType.FILE, info.pack())
            for state, again in restate(before, history, lambda: self.ledger.end):
                self._stage(
                    FrameType.SOURCE,
                    again.pack(),
                    flags=Flag.RESTATED,
                    source_id=state.source_id,
                    seq=state.next_seq,
                    source_off=state.resume_off,
                    generation=state.generation,
                )
            # The states that others may hold go on, with what is known of heads and tails.
            for source_id, state in before.sources.items():
                new = self.ledger.sources[source_id]
                state.info, state.source_frame = new.info, new.source_frame
                self.ledger.sources[source_id] = state
            self._stage(FrameType.COMMIT, self.ledger.commit(self.ledger.end).pack())
            self._write()
            self._file.created = False
            self._file.sync()
            self._patiently(lambda: hand_over(self._live, end, file.fd))
        finally:
            file.close()
        self._file.path = self._live
        self._synced = self._opening = self._file.end
        self.durable = Durable(self._synced, 0, time.time())
        self._bare = True
        if self._on_sealed is not None:
            self._on_sealed(end)
