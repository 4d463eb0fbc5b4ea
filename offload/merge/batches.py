"""Batches on their way from the reader of a merge to its writer: a few, each with the arena that its payloads stand in.

    Batches.arena() ─► Tail.read ─► send ─► append, on the writer's thread ─► landed: the arena is free again

Memory is bounded by the arenas. A batch that was sent is never dropped: those behind it go on where it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from ..errors import OffloadError
from ..files.packet_file import Piece
from ..files.reading import Arena, Begin, Gap, Seen, Step
from ..loops import Call, outlast
from ..packets.codec import CommitEntry, GapInfo, SourceInfo
from ..packets.format import HOLE_STRUCT, Flag, GapReason
from ..packets.ledger import Ledger, SourceState
from .by_time import TimeOrder
from .progress import Progress

R = TypeVar("R")

ARENAS = 4  # one is read into, one is written, and two so that neither waits for the other's hiccup
FULL = 512  # steps


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
    def held(self, source_id: int, start: int, end: int, generation: int | None = None) -> Call[bytes | OSError]: ...
    async def aclose(self) -> None: ...


class Batches:
    """For the reader's loop.

    Args:
        writer: takes them.
        progress: counts what is in them.
        order: what may hold lines back, and puts others in their place.
        patiently: waits for a batch that is under way, and sees to what must be done meanwhile.
    """

    def __init__(
        self,
        writer: Output,
        progress: Progress,
        order: TimeOrder | None,
        patiently: Callable[[Call[None]], Awaitable[object]],
    ) -> None:
        self._writer = writer
        self._progress = progress
        self._order = order
        self._patiently = patiently
        self._arenas: deque[Arena] = deque()
        self._under_way: deque[tuple[Call[None], Arena]] = deque()

    @property
    def are_under_way(self) -> bool:
        return bool(self._under_way)

    def begin(self, sources: int) -> None:
        """Make the arenas, for so many sources."""
        size: dict[str, Any] = {} if self._order is None else {"size": self._order.arena_bytes(sources)}
        self._arenas.extend(Arena(**size) for _ in range(ARENAS))

    async def arena(self) -> Arena:
        """One that is free; wait for one. Raises as the batch that frees it."""
        while not self._arenas:
            await self.landed()
        return self._arenas.popleft()

    def send(self, arena: Arena, steps: list[Step], stats: dict[int, tuple[int, int]]) -> None:
        """Hand over what was read; `stats` as for PacketFile.append."""
        if self._order is not None:
            steps, stats = self._order.released(stats)
        if not steps:
            arena.at = 0
            self._arenas.append(arena)
            return
        for step in steps:
            if type(step) is Piece:
                self._progress.lines += step.count
                self._progress.bytes += _source_bytes(step)
            elif type(step) is Gap:
                self._progress.gaps += step.info.is_loss
                self._progress.regressions += step.info.reason is GapReason.REGRESSION
        call = self._writer.use(lambda file: file.append(pieces(file, steps), stats))
        self._under_way.append((call, arena))

    def ask(self) -> None:
        """Send a batch of nothing: what the disk refused since the last one is met as that lands."""
        if not self._under_way:
            self._under_way.append((self._writer.use(lambda file: None), self._arenas.popleft()))

    def let_go(self) -> None:
        """Hand over what the order still holds, whatever its turn."""
        if self._order is not None:
            self._order.let_go()
            self.send(Arena(0), [], {})

    async def land_all(self) -> None:
        """Wait for every batch under way, then raise what the first that failed raised: the others' is the same."""
        failure: OffloadError | None = None
        while self._under_way:
            try:
                await self.landed()
            except OffloadError as exc:
                failure = failure or exc
        if failure is not None:
            raise failure

    async def landed(self) -> None:
        """Wait for the oldest batch under way."""
        call, arena = self._under_way[0]
        await self._patiently(call)
        self._under_way.popleft()
        await outlast(call)  # a batch may not be dropped: those behind it go on where it ends
        arena.at = 0
        self._arenas.append(arena)


def pieces(file: Target, steps: Iterable[Step]) -> Iterator[Piece]:
    # New sources first: their SOURCE frames are synced before what follows them, all of a batch with one fsync.
    for step in sorted(steps, key=lambda step: type(step) is not Begin or not step.first):
        if type(step) is Piece:
            yield step
        elif type(step) is Begin:
            if step.left is not None:
                state = file.ledger.sources[step.source_id]
                state.size, state.mtime_ns = step.left
            source_id = file.open_source(step.info, None if step.first else step.source_id)
            assert source_id == step.source_id, "the reader numbers sources as the packet file does"
        elif type(step) is Gap:
            file.gap(step.source_id, step.info)
        elif type(step) is Seen:
            state = file.ledger.sources[step.source_id]
            state.head, state.tail = step.head, step.guard


def _source_bytes(piece: Piece) -> int:
    return int(HOLE_STRUCT.unpack(piece.payload)[0]) if piece.flags & Flag.HOLE else len(piece.payload)
