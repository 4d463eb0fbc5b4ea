"""Runs of lines of several sources, in order: a k-way merge that never changes the order within a source.

    source a   ─ chunk ─ chunk ─►  head ┐
    source b   ─ chunk ──────────►  head ┼─ the least key first; of equal ones, what came first ─► stretches of a chunk
    source c   ─ chunk ─ chunk ─►  head ┘

A chunk is some lines that stand behind one another in their source, cut into runs: lines with one key. A line without a
time of its own has the key of the line before it in its source, so that what belongs together (a stack trace) stays
together. Neighbours that go out together go out as one stretch.

Memory is that of the chunks, and some 100 bytes for each run in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Generic, NamedTuple, TypeVar

from .times import BEGINNING, Times

NEVER = -(1 << 80)  # the key of what stands before the first time of its source: it is given at once
ALWAYS = 1 << 80
_JSON = ord("{")
_JSON_BYTES = 64 << 10

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Chunk(Generic[T]):
    """Some lines of one source.

    Attributes:
        number: its place among those of all sources, as they came.
        keys, ends: of each run its key, and where it ends in the data; at least one.
        item: whatever the user of this module wants back.
        at: the next run; `start`: where it begins.
    """

    number: int
    keys: list[int]
    ends: list[int]
    item: T
    at: int = 0
    start: int = 0


class Stretch(NamedTuple, Generic[T]):
    """Runs of a chunk that go out together: `data[start:end]`; `last`: nothing of the chunk is left."""

    item: T
    start: int
    end: int
    last: bool


class Order(Generic[T]):
    """The heads of the sources, by key.

    Attributes:
        highest: the greatest key that was given out.
        late: runs that were given out behind one with a greater key, as (item, start, end), since it was last emptied.
    """

    def __init__(self) -> None:
        self._heads: list[tuple[int, int, deque[Chunk[T]]]] = []
        self.highest = NEVER
        self.late: list[tuple[T, int, int]] = []

    def put(self, queue: deque[Chunk[T]], chunk: Chunk[T]) -> None:
        """Another chunk of a source; `queue` is that source's, and nobody else puts into it or takes from it."""
        queue.append(chunk)
        if len(queue) == 1:
            heappush(self._heads, (chunk.keys[0], chunk.number, queue))

    def heads(self) -> Iterator[Chunk[T]]:
        """The chunks that stand first in their sources, the one with the least key first, the others in any order."""
        return (queue[0] for _, _, queue in self._heads)

    def take(self, bound: int) -> Iterator[Stretch[T]]:
        """What is no later than `bound`, in order. It may be left at any time, and chunks put between two stretches."""
        heads, late = self._heads, self.late
        while heads and heads[0][0] <= bound:
            _, number, queue = heappop(heads)
            chunk = queue[0]
            keys, ends, at, start = chunk.keys, chunk.ends, chunk.at, chunk.start
            # Its runs go on as long as they are before the next source's head.
            limit, rival = (heads[0][0], heads[0][1]) if heads else (bound, number)
            if limit > bound:
                limit, rival = bound, number
            if number > rival:
                limit -= 1  # of equal keys the rival's came first
            highest, end, count = self.highest, start, len(keys)
            key = keys[at]  # the first goes, for it was the least head
            while True:
                if key >= highest:
                    highest = key
                elif key > NEVER:
                    late.append((chunk.item, end, ends[at]))
                end = ends[at]
                at += 1
                if at == count:
                    break
                key = keys[at]
                if key > limit:
                    break
            self.highest = highest
            chunk.at, chunk.start = at, end
            if at == count:
                queue.popleft()
                if queue:
                    heappush(heads, (queue[0].keys[0], queue[0].number, queue))
            else:
                heappush(heads, (key, number, queue))
            yield Stretch(chunk.item, start, end, at == count)


def cut(data: bytes, times: Times, key: int, *, inside: bool = False) -> tuple[list[int], list[int]]:
    """Cut lines into runs.

    Args:
        data: lines; the last may have no end.
        key: of the line before.
        inside: the data begins within a line.

    Returns:
        The runs' keys and ends.
    """
    keys, ends = list[int](), list[int]()
    of, find, size = times.of, data.find, len(data)
    at, last = 0, None
    while at < size:
        end = find(b"\n", at) + 1 or size
        if end - at <= BEGINNING:
            found = of(data[at:end])
        else:
            found = of(data[at : min(end, at + (_JSON_BYTES if data[at] == _JSON else BEGINNING))])
        if inside:
            found, inside = None, False
        if found is None:
            found = key
        if found == last:
            ends[-1] = end
        else:
            keys.append(found)
            ends.append(end)
            key = last = found
        at = end
    return keys, ends
