"""Packet files on disk, for one thread: PacketFile writes, FrameSource reads.

The layout is in `packets/format.py`, what a frame does to the state in `packets/recover.py`; event loops use
`packet_stream.py`.

Promises:
    - One writer: the file is locked from opening to closing; a second writer gets BusyResourceError.
    - A batch goes out in one system call behind whole frames. What the disk refuses is cut back to the last whole
      frame, and the writer can only be closed from then on.
    - Whatever ended the writer before (kill -9 too), opening cuts a torn tail and goes on behind the last whole frame.
      A run that adds nothing leaves the file as it is, but for that and a COMMIT behind frames that lack one.
    - A COMMIT stands behind at most COMMIT_BYTES of frames and one batch.
    - `durable_upto` in a COMMIT never passes the bytes that an fsync before it has covered.
    - fsync policy: "none" leaves it to the system, "interval" syncs before the COMMIT of each interval, "always" before
      `append` returns. One fsync serves all that was written since the one before.
    - Readers never write and never keep a writer out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from zlib import crc32

from ..errors import BusyResourceError, PacketError
from ..packets.codec import (
    Buffer,
    CommitEntry,
    Damage,
    FileInfo,
    Frame,
    GapInfo,
    Header,
    PacketDecoder,
    SourceInfo,
    pack_header,
    unpack_header,
)
from ..packets.format import HEADER_BYTES, Flag, FrameType
from ..packets.ledger import Ledger, SourceState
from ..packets.recover import Recovery, generations, recover
from .append import AppendFile, whole_pieces

Fsync = Literal["none", "interval", "always"]

COMMIT_BYTES = 16 << 20
READ_BYTES = 4 << 20


@dataclass(slots=True)
class Piece:
    """One frame of a source's content, before it has its place: what the source gave and what it counts."""

    source_id: int
    payload: Buffer
    source_off: int
    count: int
    flags: Flag = Flag.NONE
    type: FrameType = FrameType.LINES


class PacketFile:
    """A packet file opened for writing, for one thread.

    Args:
        path: made if it is not there.
        fsync: see the head of this module.
        written_by: goes into the FILE frame.
        clock: Unix nanoseconds, for the arrival time in each frame.

    Raises:
        BusyResourceError: somebody else writes it.
        PacketError: no packet file, or one that is damaged where its state stands; it was not touched.
        OSError: as `os.open`.

    Attributes:
        ledger: the state at the end of the file.
        recovery: what opening found.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: Fsync = "interval",
        written_by: str = "offload",
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        if fsync not in ("none", "interval", "always"):
            raise ValueError(f"fsync is {fsync!r}, expected 'none', 'interval' or 'always'")
        self.path = Path(path)
        self.fsync = fsync
        self._written_by = written_by
        self._clock = clock
        self._epoch = secrets.randbits(32)
        self._begun = False  # whether this run has written a frame
        self._staged: list[Buffer] = []  # frames that the ledger knows and the file does not
        self._file = AppendFile(path, readable=True)
        try:
            if not self._file.regular:
                raise OSError(errno.EINVAL, "no regular file; a packet file cannot be written there", os.fspath(path))
            lock(self._file.fd, self.path)
            self.recovery: Recovery = recover(self._read_at, self._file.end)
        except BaseException:
            self._file.close()
            raise
        self.ledger: Ledger = self.recovery.ledger
        self._synced = self.ledger.durable_upto
        if self.recovery.hole is None and self.recovery.torn:
            self._file.cut(self.ledger.end)

    def cut_hole(self) -> None:
        """Give up what stands behind damage after the last COMMIT; the caller knows how to get it again."""
        self._file.cut(self.ledger.end)
        self.recovery = Recovery(self.ledger, self.recovery.torn)

    @property
    def end(self) -> int:
        """Size of the file in bytes."""
        return self._file.end

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the file."""
        status = os.fstat(self._file.fd)
        return status.st_dev, status.st_ino

    def source_named(self, path: bytes) -> SourceState | None:
        """The source of this path, as it stands now."""
        for state in self.ledger.sources.values():
            if state.path == path:
                return state
        return None

    def generations(self, state: SourceState) -> Iterator[tuple[SourceInfo, CommitEntry]]:
        """The earlier generations of a source, newest first: which file it was, and how far it was read."""
        return generations(self._read_at, self._file.end, state)

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
        sources, now = self.ledger.sources, self._clock()
        for piece in pieces:
            state = sources[piece.source_id]
            assert piece.source_off == state.resume_off, "a piece that does not follow the one before"
            self._stage(
                piece.type,
                piece.payload,
                flags=piece.flags,
                source_id=piece.source_id,
                seq=state.next_seq,
                source_off=piece.source_off,
                count=piece.count,
                generation=state.generation,
                time_ns=now,
            )
        for source_id, (size, mtime_ns) in (stats or {}).items():
            sources[source_id].size, sources[source_id].mtime_ns = size, mtime_ns
        self._write()
        if self.fsync == "always":
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

    def sync(self) -> None:
        """Have everything written so far on the disk.

        Raises:
            OSError: it may or may not be there, and trying again proves nothing; this writer must be closed.
        """
        end = self._file.end
        if end > self._synced:
            self._file.sync()
            self._synced = end

    def tick(self) -> None:
        """What is due at the end of an interval: fsync by policy, then a COMMIT."""
        if self._staged or self.ledger.changed:
            self._check_place()
            if self.fsync != "none":
                self._write()
                self.sync()
            self.commit()

    def close(self, *, broken: bool = False) -> None:
        """Write the last COMMIT, sync by policy, unlock. `broken`: only let go of the file."""
        try:
            if not broken:
                self.tick()
                if self.fsync != "none":
                    self.sync()
                self._check_place()
        finally:
            self._file.close()

    def _check_place(self) -> None:
        """Raises FileNotFoundError if what is written can no longer be found where the user expects it."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self.identity:
            raise FileNotFoundError(errno.ENOENT, "was removed or replaced while it was written", os.fspath(self.path))

    # --- frames -----------------------------------------------------------------------------------------------------

    def _committed(self) -> int:
        return self.ledger.last_commit if self.ledger.last_commit < self.ledger.end else 0

    def _stage(self, type: FrameType, payload: Buffer, **fields: int) -> None:
        """Put a frame behind those staged and take it into the ledger."""
        if not self._begun:
            self._begun = True
            if self.ledger.info is None:
                self._stage(FrameType.FILE, FileInfo(secrets.token_bytes(16), 0, bytes(32), self._written_by).pack())
            elif type is not FrameType.COMMIT:
                # A new run, a new epoch; and whatever the end of the last one left without a COMMIT gets it here.
                self._stage(FrameType.COMMIT, self.ledger.commit(self._synced).pack())
        ledger = self.ledger
        fields.setdefault("time_ns", 0 if type is FrameType.COMMIT else self._clock())
        if type is FrameType.COMMIT:
            fields["time_ns"] = self._clock()
        payload_crc = crc32(payload)
        raw = pack_header(type, len(payload), payload_crc, prev_len=ledger.prev_len, epoch=self._epoch, **fields)
        header = Header(
            type,
            Flag(fields.get("flags", 0)),
            len(payload),
            fields.get("source_id", 0),
            fields.get("seq", 0),
            fields.get("source_off", 0),
            fields["time_ns"],
            fields.get("count", 0),
            payload_crc,
            fields.get("generation", 0),
            ledger.prev_len,
            self._epoch,
        )
        self._staged += (raw, payload) if len(payload) else (raw,)
        ledger.apply(header, payload if isinstance(payload, bytes) else memoryview(payload), raw, ledger.end)

    def _write(self) -> None:
        staged, self._staged = self._staged, []
        if staged:
            self._file.append(staged, lambda taken: whole_pieces(_frame_sizes(staged), taken))

    def _read_at(self, offset: int, length: int) -> bytes:
        return read_at(self._file.fd, offset, length)


def _frame_sizes(staged: Iterable[Buffer]) -> Iterator[int]:
    buffers = iter(staged)
    for raw in buffers:
        payload_len = unpack_header(raw).payload_len
        if payload_len:
            next(buffers)
        yield HEADER_BYTES + payload_len


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; a FIFO would block, a device never ends.

    Raises:
        OSError: as `os.open`; IsADirectoryError for a folder; a plain OSError for what else is no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    fd = os.open(path, flags)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return fd, status
    os.close(fd)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "no regular file", path)


def read_at(fd: int, offset: int, length: int) -> bytes:
    """At most `length` bytes at `offset`; fewer only at the end of the file."""
    parts: list[bytes] = []
    while length > 0:
        if hasattr(os, "pread"):
            data = os.pread(fd, length, offset)
        else:  # Windows; one thread uses the descriptor, so the shared position does no harm
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, length)
        if not data:
            break
        parts.append(data)
        offset += len(data)
        length -= len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def lock(fd: int, path: Path) -> None:
    """Lock a file for this descriptor's only use until it is closed.

    Raises:
        BusyResourceError: somebody else has the lock.
    """
    try:
        if os.name == "nt":
            import msvcrt

            # A byte far behind any data: locks are mandatory there, and readers must not meet it.
            os.lseek(fd, 1 << 62, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            for _ in range(100):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                # A reader in `is_locked` shares the lock for a moment. If we may not share it, it is a writer.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(fd, fcntl.LOCK_UN)
                time.sleep(0.001)
            raise BlockingIOError
    except (BlockingIOError, PermissionError):
        raise BusyResourceError(f"{path} is being written by somebody else; wait for it or write elsewhere") from None


def is_locked(fd: int) -> bool:
    """Whether somebody writes this packet file now; best effort, for messages."""
    if os.name == "nt":
        return False
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


class FrameSource:
    """Whole frames of a packet file in order, for one thread; nothing is held but one read and one frame.

    Args:
        path: a packet file; it may be growing.
        on_damage: as for PacketDecoder.
        follow: the file is growing, and its writer may be killed and started again: what is behind the last whole
            frame is read anew each time, for a new writer cuts it.

    Raises:
        OSError: as `os.open`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        on_damage: Callable[[Damage], None] | None = None,
        follow: bool = False,
    ) -> None:
        self.path = Path(path)
        self._follow = follow
        self._on_damage = on_damage
        self._suspect = -1  # while following: where no valid frame was found at the last look
        self._fd, _ = open_regular(os.fspath(path))
        self._decoder = PacketDecoder(on_damage=on_damage)
        self._at = 0

    @property
    def offset(self) -> int:
        """Where the next frame is expected."""
        return self._decoder.offset

    @property
    def pending(self) -> int:
        """Bytes read that are no whole frame yet."""
        return self._decoder.pending

    def read(self) -> list[Frame] | None:
        """The frames of the next READ_BYTES; None at the present end of the file.

        Raises:
            PacketError: no valid frame at this place.
        """
        data = read_at(self._fd, self._at, READ_BYTES)
        if not data and not (self._follow and self._decoder.pending):
            return None
        self._at += len(data)
        try:
            frames = self._decoder.feed(data)
        except PacketError:
            # A new writer may have cut a torn tail and written while we read: half of it old, half new. Twice at the
            # same place it is damage.
            if not self._follow or self._suspect == self._decoder.offset:
                raise
            self._suspect = self._decoder.offset
            self._again()
            return None
        if self._follow and self._decoder.pending and len(data) < READ_BYTES:
            self._again()
            return frames or None
        return frames

    def _again(self) -> None:
        """Read what is behind the last whole frame anew."""
        self._at = self._decoder.offset
        self._decoder = PacketDecoder(offset=self._at, on_damage=self._on_damage)

    def headers(self) -> Iterator[Frame]:
        """Every frame from the start, with its payload only where that describes the file: LINES, PACKETS are left out.

        Raises:
            PacketError: no valid header at this place; a torn tail ends the walk instead.
        """
        size, at = self.size(), 0
        while size - at >= HEADER_BYTES:
            header = unpack_header(self.read_at(at, HEADER_BYTES), offset=at)
            if at + header.frame_len > size:
                return
            content = header.type in (FrameType.LINES, FrameType.PACKETS)
            payload = b"" if content else self.read_at(at + HEADER_BYTES, header.payload_len)
            yield Frame(at, header, payload)
            at += header.frame_len

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read_at(self, offset: int, length: int) -> bytes:
        """Bytes at another place of the file."""
        return read_at(self._fd, offset, length)

    def end(self) -> list[Frame]:
        """Say that the file ends here; returns and raises as `PacketDecoder.close`."""
        return self._decoder.close()

    def is_being_written(self) -> bool:
        return is_locked(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        while (frames := self.read()) is not None:
            yield from frames
