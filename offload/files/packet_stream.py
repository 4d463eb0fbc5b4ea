"""Packet files for event loops: PacketWriter and PacketReader, each on a thread of its own.

    async with PacketWriter("merged.opk") as sink:
        await sink.write(b"a line\n", source="web-1")

    async with PacketReader("merged.opk") as reader:
        async for frame in reader:
            print(frame.packets())

Promises, beyond those of `packet_file.py`:
    - Writes of one source stand in the file in the order made; neighbours share frames, so a line costs its bytes.
    - `write` takes its place at once; over `max_bytes` not yet written, awaiting it waits.
    - What was written has its COMMIT within `interval` seconds, and by policy its fsync.
    - Nothing is lost in silence: what the disk refuses reaches the next `write`, `flush` and `aclose` as
      BrokenResourceError from the OSError. `aclose`, and the interpreter's exit, write what was accepted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import ClosedResourceError, PacketError, PacketTooLargeError
from ..loops import Call
from ..packets.codec import Buffer, Frame, SourceInfo, line_pieces, packets_payload
from ..packets.format import MAX_PAYLOAD, Compression, EntryFlag, FrameType
from ..packets.ledger import SourceState
from ..packets.recover import Recovery
from .append import as_bytes
from .frame_source import FrameSource
from .intake import MAX_BYTES, OnThread, Writing
from .keeper import Keeper
from .packet_file import Fsync, Full, PacketFile, Piece
from .seekable import zstandard
from .segments import Segments
from .series import live_path

R = TypeVar("R")

INTERVAL = 0.1
LINES_BYTES = 1 << 20  # of source in one frame: what a reader holds at once, and how much of a long line waits for more


class PacketWriter(Writing[tuple[str, bytes, bool]]):
    """A packet file that any loop or thread can write, on a thread of its own.

    Args:
        path: made if it is not there; an existing packet file is continued.
        fsync, written_by: as for PacketFile.
        max_bytes: bytes that may wait for the disk before `write` makes its caller wait.
        interval: seconds until what was written has its COMMIT.
        mend: asked on the writer's thread if the file is damaged behind its last COMMIT with valid frames behind the
            damage (a power cut can leave that): True says that all of it can be written again, so it is cut off.
            With it, SOURCE frames are on the disk before what follows them (`settle` of PacketFile).
        anew: called on the writer's thread with path and error if the file is damaged there and is not cut, or where
            its state stands: it puts a sound one in its place, or raises. Without it, opening raises PacketError and
            leaves the file as it is.
        full: waits for room on the disk, on the writer's thread, while all else that is written waits behind; see
            PacketFile. Without it, a full disk breaks the writer.
        segments: when the file is closed as a segment and the next begun, and what becomes of the closed ones.
        exit_timeout: seconds for which the interpreter's exit, and a caller after Ctrl-C, waits for the disk.

    Use it as `async with`, or by `start()` and `aclose()`. What breaks it (`BrokenResourceError` from the OSError)
    reaches the next `write`, `flush` and `aclose`; the file ends at its last whole frame.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: Fsync = "interval",
        max_bytes: int = MAX_BYTES,
        interval: float = INTERVAL,
        written_by: str = "offload",
        mend: Callable[[Recovery], bool] | None = None,
        anew: Callable[[Path, PacketError], object] | None = None,
        full: Full | None = None,
        segments: Segments | None = None,
        exit_timeout: float = 5.0,
    ) -> None:
        super().__init__(path, "packets", str(path), max_bytes, exit_timeout)
        self._mend = mend
        self._anew = anew
        self._full = full
        self._fsync: Fsync = fsync
        self._written_by = written_by
        self._interval = interval
        self._segments = segments
        self._keeper: Keeper | None = None
        self._age: asyncio.TimerHandle | None = None  # until the present segment is too old
        self._file: PacketFile | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ids: dict[str, int] = {}
        self._rests: dict[int, bytearray] = {}  # of each source: bytes behind its last line end, not written yet

    def write(self, data: str | Buffer, source: str = "") -> Awaitable[None]:
        """Append to a source's lines; the place is taken now, awaiting waits for room only.

        Args:
            data: bytes or text (UTF-8) of the source, verbatim; lines end at LF, and one may come in pieces. A rest
                without LF waits for its end until `flush` or `aclose`.
            source: its name in the packet file.

        Raises:
            ClosedResourceError: closed or not started; nothing was accepted.
            BrokenResourceError: the disk refused an earlier write.
        """
        return self._write(data, source, packet=False)

    def write_packet(self, packet: str | Buffer, source: str = "") -> Awaitable[None]:
        """Append one packet of any bytes, 0 to 16 MiB, to a source; otherwise as `write`.

        Raises:
            PacketTooLargeError: over 16 MiB; nothing was accepted.
        """
        return self._write(packet, source, packet=True)

    def flush(self, *, fsync: bool = False) -> Call[None]:
        """Have everything written so far in the file under a COMMIT; with `fsync` on the disk."""
        return self._thread.call(self._flush, fsync)

    def resegment(self, segments: Segments) -> Call[None]:
        """Close segments, and keep closed ones, by other rules from now on.

        Raises:
            ValueError: it was opened without segments.
            ImportError: nothing here can pack them.
        """
        return self._thread.call(self._resegment, segments)

    def held(self, source_id: int, start: int, end: int, generation: int | None = None) -> Call[bytes | OSError]:
        """What the file holds of a source, as `PacketFile.held`, behind what was written before.

        An error says that it cannot be read now; it breaks nothing.
        """

        def held(file: PacketFile) -> bytes | OSError:
            try:
                return file.held(source_id, start, end, generation)
            except OSError as exc:
                return exc

        return self.use(held)

    def use(self, function: Callable[[PacketFile], R]) -> Call[R]:
        """Run a function with the open PacketFile on the writer's thread, behind what was written before.

        What `function` writes gets its COMMIT within the interval. An OSError from it breaks the writer.
        """
        return self._thread.call(self._use, function)

    def _write(self, data: str | Buffer, source: str, *, packet: bool) -> Awaitable[None]:
        data = as_bytes(data)
        if packet and len(data) > MAX_PAYLOAD:
            raise PacketTooLargeError(
                f"packet is {len(data)} bytes, limit is {MAX_PAYLOAD}; use write for long lines", 0
            )
        if source not in self._ids:
            os.fsencode(source)  # a name that is none is refused here, and not on the thread with all that came with it
        return self._put((source, data, packet), len(data))

    # --- on the writer's thread -------------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._segments is not None and self._segments.compress:
            zstandard()
        try:
            self._file = self._continue()
        except PacketError as exc:
            if self._anew is None:
                raise
            self._anew(self.path, exc)
            self._file = self._continue()
        if self._segments is not None and self._segments.are_kept:
            self._keeper = Keeper(live_path(self.path), self._segments, self._file.segment - 1)
            self._keeper.start()
        self._opened = True
        self._arm()

    def _continue(self) -> PacketFile:
        file = PacketFile(
            self.path,
            fsync=self._fsync,
            written_by=self._written_by,
            full=self._full,
            settle=self._mend is not None,
            segments=self._segments,
            on_sealed=self._sealed,
        )
        try:
            hole = file.recovery.hole
            if hole is not None and self._mend is not None and self._mend(file.recovery):
                file.cut_hole()
            elif hole is not None:
                raise PacketError(
                    f"damaged up to byte {hole.end}, with valid frames behind; keep this file and write to a new one",
                    hole.start,
                )
        except BaseException:
            file.close(broken=True)
            raise
        return file

    def _resegment(self, segments: Segments) -> None:
        if self._segments is None or self._file is None:
            raise ValueError(f"{self.path} has no segments, expected one that was opened with them")
        if segments.compress:
            zstandard()
        self._segments = segments
        self._file.resegment(segments)
        if self._age is not None:
            self._age.cancel()
            self._age = None
        if self._keeper is not None:
            self._keeper.resegment(segments)
        elif segments.are_kept:
            self._keeper = Keeper(live_path(self.path), segments, self._file.segment - 1)
            self._keeper.start()
        self._arm()

    def _sealed(self, number: int) -> None:
        if self._keeper is not None:
            self._keeper.sealed(number)

    def _use(self, function: Callable[[PacketFile], R]) -> R:
        self._intake.take_all()
        self._check()
        assert self._file is not None
        try:
            with self._breaking():
                return function(self._file)
        finally:
            self._arm()
        raise self._broken()

    def _take(self, batch: list[tuple[str, bytes, bool]]) -> None:
        if self._error is not None:
            return
        assert self._file is not None
        with self._breaking():
            self._file.append(self._pieces(batch))
        self._arm()

    def _pieces(self, batch: list[tuple[str, bytes, bool]]) -> Iterator[Piece]:
        """Frames for a batch: neighbours of one source and kind share a frame, so the order of each source stays."""
        runs: dict[tuple[str, bool], list[bytes]] = {}
        latest: dict[str, bool] = {}
        for source, data, packet in batch:
            if latest.setdefault(source, packet) is not packet:
                yield from self._run(source, runs.pop((source, not packet)), packet=not packet)
                latest[source] = packet
            runs.setdefault((source, packet), []).append(data)
        for (source, packet), parts in runs.items():
            yield from self._run(source, parts, packet=packet)

    def _run(self, source: str, parts: list[bytes], *, packet: bool) -> Iterator[Piece]:
        source_id = self._source_id(source)
        if not packet:
            rest = self._rests.pop(source_id, None)
            data = b"".join([rest, *parts] if rest else parts)
            yield from self._lines(source_id, data, ended=False)
            return
        yield from self._end_line(source_id)
        at, size = 0, 0
        for end, part in enumerate(parts):
            size += len(part) + 4
            if size > MAX_PAYLOAD and end > at:
                yield self._packets(source_id, parts[at:end])
                at, size = end, len(part) + 4
        yield self._packets(source_id, parts[at:])

    def _lines(self, source_id: int, data: bytes, *, ended: bool) -> Iterator[Piece]:
        state = self._sources()[source_id]
        view, at = memoryview(data), 0
        for piece in line_pieces(data, 0, len(data), state.open, ended=ended, limit=LINES_BYTES):
            if piece.end == len(data) and piece.open is EntryFlag.OPEN_FRAGMENT:
                break  # so that there is a rest to end the line with, if no more comes
            at = piece.end
            yield Piece(source_id, view[piece.start : piece.end], state.resume_off, piece.count, piece.flags)
        if at < len(data):
            self._rests[source_id] = bytearray(view[at:])

    def _end_line(self, source_id: int) -> Iterator[Piece]:
        rest = self._rests.pop(source_id, None)
        if rest:
            yield from self._lines(source_id, bytes(rest), ended=True)

    def _packets(self, source_id: int, packets: Sequence[bytes]) -> Piece:
        payload, flags = packets_payload(packets)
        off = self._sources()[source_id].resume_off
        return Piece(source_id, payload, off, len(packets), flags, FrameType.PACKETS)

    def _sources(self) -> dict[int, SourceState]:
        assert self._file is not None
        return self._file.ledger.sources

    def _source_id(self, source: str) -> int:
        found = self._ids.get(source)
        if found is None:
            assert self._file is not None
            path = os.fsencode(source)
            state = self._file.source_named(path)
            if state is not None:
                found = state.source_id
            else:
                found = self._file.open_source(SourceInfo(0, 0, 0, 0, Compression.NONE, path))
            self._ids[source] = found
        return found

    def _flush(self, fsync: bool) -> None:
        def flush(file: PacketFile) -> None:
            file.append(piece for source_id in list(self._rests) for piece in self._end_line(source_id))
            if fsync:
                file.sync()
            file.commit()

        self._use(flush)

    def _arm(self) -> None:
        """See that what was written gets its COMMIT."""
        file = self._file
        if self._timer is None and self._error is None and file is not None and file.ledger.changed:
            self._timer = asyncio.get_running_loop().call_later(self._interval, self._tick)
        if self._segments is not None and self._age is None and self._error is None and file is not None:
            due = file.due_in()
            if due is not None:
                self._age = asyncio.get_running_loop().call_later(due, self._grown_old)

    def _grown_old(self) -> None:
        self._age = None
        self._tick()
        self._arm()

    def _tick(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._file is not None and self._error is None:
            with self._breaking():
                self._file.tick()

    def _finish(self) -> None:
        file = self._file
        if file is None:
            return
        self._intake.finish(self._closed if self._error is None else self._broken)
        for timer in (self._timer, self._age):
            if timer is not None:
                timer.cancel()
        with self._breaking():
            if self._error is None:
                file.append(piece for source_id in list(self._rests) for piece in self._end_line(source_id))
                file.close()
        if self._error is not None:
            file.close(broken=True)
        if self._keeper is not None:
            self._keeper.close()
        self._check()


class PacketReader(OnThread):
    """The frames of a packet file as `async for`, read on a thread of their own.

        async with PacketReader("merged.opk") as reader:
            async for frame in reader:
                for packet in frame.packets(): ...

    Args:
        path: a packet file.
        follow: wait for more at the end, as `tail -f`; a last frame that is not whole is "not yet".
        poll: seconds between looks while following.

    Raises (from the iteration):
        PacketError: an invalid frame; without `follow`, also a torn tail.
    """

    def __init__(self, path: str | os.PathLike[str], *, follow: bool = False, poll: float = 0.05) -> None:
        super().__init__(path, "reader")
        self._follow = follow
        self._poll = poll
        self._source: FrameSource | None = None

    async def __aiter__(self) -> AsyncIterator[Frame]:
        source = self._source
        if source is None:
            raise ClosedResourceError(f"{self.path} is not open; use it as `async with`, or await its start()")
        while True:
            frames = await self._thread.call(source.read)
            for frame in frames or ():
                yield frame
            if frames is None:
                if not self._follow:
                    await self._thread.call(source.end)
                    return
                await asyncio.sleep(self._poll)

    def _open(self) -> None:
        self._source = FrameSource(self.path, follow=self._follow)

    def _finish(self) -> None:
        if self._source is not None:
            self._source.close()
