"""Logs as programs and logrotate make them, with lines that prove themselves; and what became of those lines.

A line says whose it is and which one, and carries its own checksum:

    b 1743 some text of any bytes 9a3f01c7
    │ │                           └ CRC-32 of all before it: a line that was torn, cut or glued to another shows
    │ └ number in its stream: 0, 1, 2 …; one that is missing, there twice or too early shows
    └ stream: the log's name, or for lines that came late to a file that had lost its name, one of its own (`b-late-3`)

`Workload.step` does one random thing, the same for the same seed: lines in one write or in pieces, a line whose rest
comes much later, a rotation of one of the kinds in `rotations.py`, the packing of an older file, lines to the old
descriptor. All of it in one thread; so nobody writes between the copy and the cut of a copytruncate, where bytes are
lost to everybody, whatever reads.

What is promised of the lines of a stream is: each once, in order, as it was.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

from ..packets.format import HEAD_BYTES
from .rotations import CLASSIC, HEAD, LATER, Kind, Log
from .rotations import pack as pack

# What a log may hold, and what may be taken for something else: line ends of others, NULs, the beginning of a frame.
_NOISE = random.Random(0).randbytes(2000).hex().encode() + b"\r\0\xff\xffOPK\x01\x04\0\0 end"
_PLAIN = random.Random(0).randbytes(2000).hex().encode()
ROTATIONS = 0.02  # of the steps
_LONG = 0.001  # of the lines are long

_LOST = 100_000  # bytes that a power cut may take
_EXAMPLES = 10


def line(stream: bytes, number: int, filling: bytes) -> bytes:
    """The line with its checksum and its end."""
    head = b"%s %d %s" % (stream, number, filling)
    return b"%s %08x\n" % (head, crc32(head))


class Workload:
    """Logs in a folder, and what is done to them; for one thread.

    Args:
        folder: where; must be there.
        seed: of everything that is random.
        longest: bytes of the longest lines; some are that long.
        plain: no bytes but letters and digits, for readers that cannot keep others.
        rotations: of all steps.
        kinds: of the logs.

    Attributes:
        written: stream -> how many lines it has.
        repeated: lines that stand at the beginning of many files -> how often.
        did: what was done -> how often.
        may_rotate: whether the log of this path may lose its file now; not before whoever reads knows it.
        is_read: whether the file of this path is read to its end: only then may it go for good.
    """

    def __init__(
        self,
        folder: Path,
        seed: str,
        *,
        longest: int = 900_000,
        plain: bool = False,
        rotations: float = ROTATIONS,
        kinds: Sequence[Kind] = CLASSIC,
    ) -> None:
        self.folder = folder
        self.written: dict[bytes, int] = {}
        self.repeated: Counter[bytes] = Counter()
        self.did: Counter[str] = Counter()
        self.bytes = 0
        self.may_rotate: Callable[[Path], bool] = lambda path: False
        self.is_read: Callable[[Path], bool] = lambda path: False
        self._chance = random.Random(seed)
        self._noise = _PLAIN if plain else _NOISE
        self._longest = longest
        self._rotations = rotations
        self.logs = [self._log(kind) for kind in kinds]
        for log in self.logs:
            self._write(log, 1 + self._chance.randrange(20))

    @property
    def lines(self) -> int:
        return sum(self.written.values()) + self.repeated.total()

    def step(self) -> None:
        """Do one thing to one log."""
        chance = self._chance
        if self.logs[-1].kind is not LATER and chance.random() < 0.005:
            self.logs.append(self._log(LATER))
        log = chance.choice(self.logs)
        what = chance.random()
        if what < self._rotations:
            self._rotate(log)
        elif what < 0.12:
            self._begin_line(log)
        elif what < 0.25 and log.old:
            self._write_late(log)
        else:
            self._write(log, 1 + chance.randrange(20))

    def lose_end(self, chance: random.Random) -> None:
        """What a power cut does to a log: it lost its end, and its program begins anew; call it while nobody reads.

        Only what was read, so that nothing is lost to everybody.
        """
        log = chance.choice(self.logs)
        if log.rest or not log.kind.appends or not self.is_read(log.path):
            return
        data = log.path.read_bytes()
        # Where less is left it may be a new file that begins with the lines that all of them have.
        start = data.find(b"\n", max(HEAD_BYTES, len(data) - chance.randrange(1, _LOST))) + 1
        if 0 < start < len(data):
            log.close()
            os.truncate(log.path, start)
            log.file = log.path.open("ab", buffering=0)
            self.did["ends lost"] += 1

    def finish(self) -> None:
        """End what was begun, and write a line to each log: nobody waits for the one behind a rotated file then."""
        for log in self.logs:
            self._write(log, 1)

    def close(self) -> None:
        for log in self.logs:
            log.close()

    # --- lines --------------------------------------------------------------------------------------------------------

    def _log(self, kind: Kind) -> Log:
        log = Log(self.folder / f"{kind.name}.log", kind)
        log.open()
        self._head(log)
        return log

    def _head(self, log: Log) -> None:
        if log.kind.headed:
            log.file.write(HEAD)
            self.repeated.update(HEAD.splitlines(keepends=True))
            self.bytes += len(HEAD)

    def _line(self, stream: bytes) -> bytes:
        number = self.written.get(stream, 0)
        self.written[stream] = number + 1
        if self._chance.random() < _LONG:
            size = self._chance.randrange(self._longest // 2, self._longest)
        else:
            size = self._chance.randrange(150)
        at = self._chance.randrange(len(self._noise))
        filling = (self._noise[at:] + self._noise * (size // len(self._noise) + 1))[:size]
        made = line(stream, number, filling)
        self.bytes += len(made)
        return made

    def _write(self, log: Log, count: int) -> None:
        self._end_line(log)
        data = b"".join(self._line(log.stream) for _ in range(count))
        cuts = sorted(self._chance.randrange(len(data)) for _ in range(self._chance.choice([0, 0, 1, 3])))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            log.file.write(data[start:end])
        log.fresh = True

    def _begin_line(self, log: Log) -> None:
        self._end_line(log)
        data = self._line(log.stream)
        cut = self._chance.randrange(1, len(data))
        log.file.write(data[:cut])
        log.rest, log.fresh = data[cut:], True
        self.did["lines torn"] += 1

    def _end_line(self, log: Log) -> None:
        rest, log.rest = log.rest, b""
        if rest:
            log.file.write(rest)

    def _write_late(self, log: Log) -> None:
        stream, file = self._chance.choice(log.old)
        count = 1 + self._chance.randrange(5)
        file.write(b"".join(self._line(stream) for _ in range(count)))
        self.did["lines late"] += count

    def _rotate(self, log: Log) -> None:
        kind = log.kind
        if kind.way == "none" or not (log.fresh or kind.empty) or not self.may_rotate(log.path):
            return
        if kind.way in ("delete", "rewrite") and (log.rest or not self.is_read(log.path)):
            return
        # A program that opens its log anew ends its line first, and one line may not be in two files.
        self._end_line(log)
        torn = not kind.ends and self._chance.random() < 0.5
        if torn:
            # A stream of its own: its end may be on its way, for all that anybody knows, so the next may come first.
            log.file.write(self._line(b"%s-end-%d" % (log.stream, log.rotations))[:-1])
            self.did["line ends left out"] += 1
        before = log.path.stat().st_size
        log.rotate(self.did, self.is_read)
        if torn:
            log.close_old()
        if kind.way == "rewrite":
            self._write_anew(log, before)
        elif kind.way != "copy":
            self._head(log)

    def _write_anew(self, log: Log, size: int) -> None:
        """More than there was, in one write, so that neither size nor head tells."""
        data = HEAD
        while len(data) <= size:
            data += self._line(log.stream)
        log.file.write(data)
        log.fresh = True
        self.repeated.update(HEAD.splitlines(keepends=True))
        self.bytes += len(HEAD)


# --- what checks ------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What is wrong with what came out; `ok` if nothing is.

    Attributes:
        lost: lines that were written and are not there.
        doubled: lines that are there once more than they were written, counted for each time.
        reordered: lines behind a later one of their stream.
        garbled: lines that nobody wrote: torn, cut, glued to another, or changed.
        faults: what `verify` or the merge itself complains of.
        gaps: what the packet file states as lost.
        examples: some of the above, a sentence each.
    """

    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    garbled: int = 0
    faults: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self == Findings()

    def example(self, text: str) -> None:
        if len(self.examples) < _EXAMPLES:
            self.examples.append(text)


class Checker:
    """Takes the lines that came out, in their order, and says what is wrong with them.

    Args:
        written: stream -> how many lines it has, numbered from 0.
        repeated: lines of no stream -> how often they were written.
    """

    def __init__(self, written: dict[bytes, int], repeated: Counter[bytes] | None = None) -> None:
        self._repeated = Counter(repeated)
        self._times = {stream: bytearray(count) for stream, count in written.items()}  # a byte for each line
        self._highest = dict.fromkeys(written, -1)
        self._found = Findings()

    def take(self, line: bytes) -> None:
        """The next line, with or without its line end."""
        found = self._found
        if line in self._repeated:
            self._repeated[line] -= 1
            return
        place = _place(
            line.lstrip(b"\0")
        )  # who does not append leaves a hole where a file was cut, if only a small one
        times = None if place is None else self._times.get(place[0])
        if place is None or times is None or place[1] >= len(times):
            found.garbled += 1
            found.example(f"garbled: {line[:80]!r}{'…' if len(line) > 80 else ''} ({len(line)} bytes)")
            return
        stream, number = place
        if times[number]:
            found.doubled += 1
            found.example(f"doubled: line {number} of {os.fsdecode(stream)}")
        elif number < self._highest[stream]:
            found.reordered += 1
            found.example(f"reordered: line {number} of {os.fsdecode(stream)} behind {self._highest[stream]}")
        times[number] = 1
        self._highest[stream] = max(number, self._highest[stream])

    def end(self) -> Findings:
        """No more lines come."""
        for stream, times in self._times.items():
            self._found.lost += times.count(0)
            for start, end in _runs(times):
                self._found.example(f"lost: {os.fsdecode(stream)} from line {start} to {end - 1}")
        for line, count in self._repeated.items():
            self._found.lost += max(0, count)
            self._found.doubled += max(0, -count)
            if count:
                what = "lost" if count > 0 else "doubled"
                self._found.example(f"{what}: {line!r}, {abs(count)} times")
        return self._found


def _place(line: bytes) -> tuple[bytes, int] | None:
    """Stream and number of a line that is whole."""
    head, _, sum = line.removesuffix(b"\n").rpartition(b" ")
    with contextlib.suppress(ValueError):
        if len(sum) == 8 and int(sum, 16) == crc32(head):
            stream, number, _ = head.split(b" ", 2)
            return stream, int(number)
    return None


def _runs(times: bytearray) -> Iterator[tuple[int, int]]:
    """Stretches of lines that never came."""
    start = times.find(0)
    while start >= 0:
        end = times.find(1, start)
        end = len(times) if end < 0 else end
        yield start, end
        start = times.find(0, end)
