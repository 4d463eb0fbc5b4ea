"""A file of frames, opened for writing: whole frames or none, and what makes them durable. For one thread.

`PacketFile` is one that knows sources and segments; what is promised to its users stands there.

Why a later run may trust its fsync after one that failed (FORMAT.md, rule 6, without segments): the system may have
dropped the pages that it could not write and call them clean, though they can still be read; an fsync that is tried
again then succeeds and proves nothing. So nothing is called durable but what was handed to the system before an fsync
that succeeded, by the run that made this fsync. What a run finds behind `durable_upto`, whoever left it there and for
whatever reason, it checks as it opens the file and writes again in place, the same bytes, before its first fsync. If
the system has kept them, they are dirty now, and the fsync is about them; if it has not, their checksums tell, and they
are damage, to be read again from the sources. No mark is needed that the failing disk would have to take: that no
COMMIT calls them durable is the mark. Frames stay where they are, so no reader sees one vanish (rule 9).
Of a run with "none" only what `recover` checks is written again: no fsync of its was ever told of a failure, so the
system still tells the next one. Systems without fcntl and pwrite (Windows) only fsync.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar
from zlib import crc32

from ..errors import PacketError
from ..packets.codec import Buffer, FileInfo, Header, PacketDecoder, pack_header, unpack_header
from ..packets.format import HEADER_BYTES, Flag, FrameType
from ..packets.ledger import Ledger
from ..packets.recover import Recovery, recover
from .append import AppendFile, whole_pieces
from .descriptor import read_at
from .rolling import Index, begun, open_live, take_back
from .series import live_path

Fsync = Literal["none", "interval", "always"]
Full = Callable[[OSError | None], bool]
T = TypeVar("T")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, slots=True)
class Durable:
    """Up to where a packet file is known to be on the disk.

    Attributes:
        upto: byte of the file (of the live segment); all before it is.
        lines: that stand before it there; None: a run before this one made them durable, and did not say how many.
        time: of the fsync that proved it, Unix seconds; None: it was in a run before.
    """

    upto: int
    lines: int | None = None
    time: float | None = None


class FrameFile:
    """A packet file as frames, and the state that they leave. Arguments, errors and attributes: see PacketFile."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: Fsync,
        written_by: str,
        clock: Callable[[], int],
        full: Full | None,
    ) -> None:
        if fsync not in ("none", "interval", "always"):
            raise ValueError(f"fsync is {fsync!r}, expected 'none', 'interval' or 'always'")
        self.path = Path(path)
        self.fsync = fsync
        self._written_by = written_by
        self._clock = clock
        self._full = full
        self._waits = False  # for room
        self._failed: tuple[int, str] | None = None  # what an fsync said
        self._epoch = secrets.randbits(32)
        self._begun = False  # whether this run has written a frame
        self._staged: list[Buffer] = []  # frames that the ledger knows and the file does not
        self._live = live_path(path)
        take_back(self._live)
        self._file: AppendFile = open_live(self._live)
        try:
            self.recovery: Recovery = recover(self._read_at, self._file.end)
            if self.recovery.hole is None and self.recovery.torn:
                self._file.cut(self.recovery.ledger.end)
            self._begun_ns = begun(self._read_at)  # the segment's first frame
            self.ledger: Ledger = self.recovery.ledger
            self._synced = self.ledger.durable_upto
            # Perhaps it was made, or got its name, by a run that was killed before it could sync the folder.
            self._file.created = self._file.created or not self._synced or self.segment > 0
            if self.fsync != "none":
                self._file.will_sync()
        except BaseException:
            self._file.close()
            raise
        self._index = Index()
        self.durable = Durable(self._synced)
        self._left = max(self._synced, self.recovery.checked), self._file.end  # by runs before; not written again yet

    @property
    def segment(self) -> int:
        """The number of the present segment: 0, 1, 2 …"""
        return self.ledger.info.segment if self.ledger.info is not None else 0

    def cut_hole(self) -> None:
        """Give up what stands behind damage after the last COMMIT; the caller knows how to get it again."""
        self._file.cut(self.ledger.end)
        self.recovery = replace(self.recovery, hole=None, behind=())
        self._left = self._left[0], self._file.end

    @property
    def end(self) -> int:
        """Size of the file in bytes."""
        return self._file.end

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of the file."""
        status = os.fstat(self._file.fd)
        return status.st_dev, status.st_ino

    def sync(self) -> None:
        """Have everything written so far on the disk.

        Raises:
            OSError: it may or may not be there, and trying again proves nothing, so that it is not tried again; this
                writer must be closed. A later one may know more; see the head of this module.
        """
        end = self._file.end
        if self._failed is None and end > self._synced:
            try:
                self._renew()
                self._file.sync()
            except OSError as exc:
                where = f"bytes {self._synced} to {end} are not known to be on the disk"
                self._failed = exc.errno or errno.EIO, f"{exc.strerror or exc}, from fsync: {where}"
                raise OSError(*self._failed) from exc
            self._synced = end
            # Frames that are applied and not written yet stand behind `end`: their lines are not among those before it.
            lines = self.ledger.total_lines if self.ledger.end == end else self.durable.lines
            self.durable = Durable(end, lines, time.time())
        if self._failed is not None:
            raise OSError(*self._failed)

    def _renew(self) -> None:
        """Write what runs before this one left unsynced again; see the head of this module."""
        start, end = self._left
        while start < end:
            # What was read as it was opened may have been dropped since, and be read from the disk, from before.
            decoder = PacketDecoder(offset=start, on_damage=None if self.recovery.hole is None else lambda damage: None)
            try:
                self._file.rewrite(start, end, decoder.feed)
                decoder.close()
                start = end
            except PacketError as exc:
                raise OSError(errno.EIO, f"damaged since it was opened, at {exc}") from exc
            except OSError as exc:
                self._wait_for_room(exc)
        self._left = end, end
        self._went_on()

    # --- frames -------------------------------------------------------------------------------------------------------

    def _stage(self, type: FrameType, payload: Buffer, **fields: int) -> None:
        """Put a frame behind those staged and take it into the ledger."""
        if not self._begun:
            self._begun = True
            new = self.ledger.info is None
            if new:
                self._stage(FrameType.FILE, FileInfo(secrets.token_bytes(16), 0, bytes(32), self._written_by).pack())
            if self.fsync != "none" and not self._synced:
                # Alone, or what a power cut leaves could not be told to be a packet file; also if a run before failed.
                self._write()
                self.sync()
            if not new and type is not FrameType.COMMIT:
                # A new run, a new epoch; and whatever the end of the last one left without a COMMIT gets it here.
                self._stage(FrameType.COMMIT, self.ledger.commit(self._synced).pack())
        ledger = self.ledger
        fields.setdefault("time_ns", 0 if type is FrameType.COMMIT else self._clock())
        if type is FrameType.COMMIT:
            fields["time_ns"] = self._clock()
            self._index.note(ledger.end, fields["time_ns"], ledger.total_lines)
        if type is FrameType.FILE:
            self._begun_ns = fields["time_ns"]
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
        while staged:
            start = self._file.end
            try:
                self._file.append(staged, partial(_whole_frames, staged))
            except OSError as exc:
                if not self._file.is_whole():
                    raise
                if exc.errno in _NO_ROOM and self._full is not None and self.fsync != "none" and not self._waits:
                    self.sync()  # what is there: the wait may be long
                self._wait_for_room(exc)
            staged = staged[_buffers_in(staged, self._file.end - start) :]
        self._went_on()

    def _wait_for_room(self, exc: OSError) -> None:
        """Return if it may be tried again; otherwise raise `exc`."""
        self._waits = exc.errno in _NO_ROOM and self._full is not None
        if self._full is None or not self._waits or not self._full(exc):
            raise exc

    def _went_on(self) -> None:
        if self._waits and self._full is not None:
            self._waits = False
            self._full(None)

    def _read_at(self, offset: int, length: int) -> bytes:
        return read_at(self._file.fd, offset, length)

    def _patiently(self, step: Callable[[], T]) -> T:
        """Do what may find no room, and wait for room."""
        while True:
            try:
                done = step()
            except OSError as exc:
                self._wait_for_room(exc)
            else:
                self._went_on()
                return done


def _buffers_in(staged: Iterable[Buffer], size: int) -> int:
    """How many of these buffers have been written, if so many bytes of whole frames have."""
    count = 0
    for buffer in staged:
        if size <= 0:
            break
        count, size = count + 1, size - len(buffer)
    return count


def _whole_frames(staged: Iterable[Buffer], taken: int) -> int:
    return whole_pieces(_frame_sizes(staged), taken)


def _frame_sizes(staged: Iterable[Buffer]) -> Iterator[int]:
    buffers = iter(staged)
    for raw in buffers:
        payload_len = unpack_header(raw).payload_len
        if payload_len:
            next(buffers)
        yield HEADER_BYTES + payload_len
