"""The golden packet files: what version 1 looks like on disk, written from the page in `format.py` alone.

    python tests/packets/golden.py            compare tests/data/packets/*.opk byte for byte; status 1 if one differs
    python tests/packets/golden.py --write    write those that are missing

Nothing of `offload` is used here on purpose: two programs that agree on the bytes prove the page, one that agrees with
itself does not. A golden file is only ever added: `--write` refuses to change one, because files like it are on the
disks of users. A new version of the format gets new golden files beside these.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

DATA = Path(__file__).parent.parent / "data" / "packets"

FILE, LINES, PACKETS, SOURCE, COMMIT, GAP, INDEX, SEAL, NOTE = range(9)
RESTATED = 128
FIRST, MIDDLE, LAST, UNTERMINATED, TABLE = 1, 2, 4, 8, 16
OPEN_FRAGMENT, OPEN_LINE = 1, 2
NONE_U64 = 2**64 - 1


def blake(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class Golden:
    """A packet file in the making. Every number is given by hand or kept here, none is computed by `offload`."""

    def __init__(self, epoch: int = 0x0BADCAFE, *, segment: int = 0, chain: bytes = bytes(32)) -> None:
        self.data = b""
        self.epoch = epoch
        self.time_ns = 1_700_000_000_000_000_000
        self.prev_len = 0
        self.chained = [chain]  # the chain of the last COMMIT and the headers since
        self.last_commit = NONE_U64
        info = struct.pack("<16sI32s", b"golden file, id.", segment, chain)
        self.frame(FILE, info + "offload tests · v1".encode())

    def frame(
        self,
        type: int,
        payload: bytes = b"",
        *,
        flags: int = 0,
        source: int = 0,
        seq: int = 0,
        off: int = 0,
        count: int = 0,
        generation: int = 0,
    ) -> int:
        """Append a frame and return its offset."""
        at = len(self.data)
        header = b"\xffOPK" + struct.pack("<BBHII", 1, type, flags, len(payload), source)
        header += struct.pack("<QQQ", seq, off, self.time_ns)
        header += struct.pack("<IIIII", count, crc32(payload), generation, self.prev_len, self.epoch)
        header += struct.pack("<I", crc32(header))
        self.data += header + payload
        self.chained.append(header)
        self.prev_len = len(header) + len(payload)
        self.time_ns += 1_000_000
        return at

    def source(
        self,
        path: bytes,
        source: int,
        before: bytes = b"",
        *,
        inode: int = 4711,
        generation: int = 0,
        seq: int = 0,
        start: int = 0,
    ) -> int:
        """A SOURCE frame; `before` is the entry that says how the generation before it ended."""
        compression = 1 if path.endswith(b".gz") else 0
        payload = struct.pack("<QQQQB7x", 0xFD00, inode + source, 0, start, compression) + before + path
        return self.frame(SOURCE, payload, source=source, seq=seq, off=start, generation=generation)

    def commit(self, total: int, *entries: bytes, full: bool, durable: int | None = None) -> None:
        chain = hashlib.sha256(b"".join(self.chained)).digest()
        durable = len(self.data) if durable is None else durable
        payload = struct.pack("<QQQ32sIB3x", durable, self.last_commit, total, chain, len(entries), full)
        self.chained = [chain]
        self.last_commit = self.frame(COMMIT, payload + b"".join(entries))

    def again(self, path: bytes, before: bytes, stands: bytes, *, inode: int) -> int:
        """A SOURCE frame that states a source again, where the entry `stands` says."""
        source, generation, frame, off, seq = struct.unpack_from("<IIQQQ", stands)
        assert frame == len(self.data), "the entry names another place"
        payload = struct.pack("<QQQQB7x", 0xFD00, inode, 0, 0, 0) + before + stands + path
        return self.frame(SOURCE, payload, flags=RESTATED, source=source, seq=seq, off=off, generation=generation)

    def seal(self, index: int, lines: int, begun_ns: int) -> bytes:
        """Close it as a segment; the chain that the next one names."""
        chain = hashlib.sha256(b"".join(self.chained)).digest()
        self.chained = [chain]
        self.frame(SEAL, struct.pack("<QQQ32s", index, lines, begun_ns, chain))
        return hashlib.sha256(b"".join(self.chained)).digest()


def entry(
    source: int,
    frame: int,
    off: int,
    seq: int,
    head: bytes = b"",
    guard: bytes | None = None,
    *,
    flags: int = 0,
    generation: int = 0,
) -> bytes:
    """An entry of a COMMIT; the guard is the head where a source is short."""
    guard = head if guard is None else guard
    hashes = blake(head) if head else bytes(16), blake(guard) if guard else bytes(16)
    return struct.pack(
        "<IIQQQQQHHI16s16s", source, generation, frame, off, seq, 0, 0, len(head), len(guard), flags, *hashes
    )


def empty() -> bytes:
    """A file that a writer began and committed, without a source."""
    g = Golden()
    g.commit(0, full=True)
    return g.data


def every_type() -> bytes:
    """One frame at least of every type, two sources, text that is not UTF-8, packets with and without a table."""
    g = Golden()
    app = g.source(b"/var/log/app.log", 0)
    g.frame(LINES, b"one\ntwo\n", count=2)
    bus = g.source(b"bus/\xe9\xff.gz", 1, start=100)
    g.frame(PACKETS, b"\x00\xffOPK\n\x00", source=1, off=100, count=1)
    packets = b"", b"a\nb", b"\xff" * 5
    table = struct.pack("<3I", *map(len, packets))
    g.frame(PACKETS, table + b"".join(packets), flags=TABLE, source=1, seq=1, off=107, count=3)
    sent = b"\x00\xffOPK\n\x00a\nb" + b"\xff" * 5
    g.commit(6, entry(0, app, 8, 2, b"one\ntwo\n"), entry(1, bus, 115, 4, guard=sent), full=True)
    g.frame(NOTE, b"a note", source=0)
    g.frame(GAP, struct.pack("<QQQB7x", 8, 1000, 7, 1), source=0, seq=2, off=8)
    g.frame(LINES, b"three\r\n", seq=2, off=1000, count=1)
    g.commit(7, entry(0, app, 1007, 3, b"one\ntwo\n", b"three\r\n"), full=False, durable=0)
    g.frame(INDEX, bytes(range(32)))
    g.frame(SEAL)
    return g.data


def fragments() -> bytes:
    """A line in three pieces, lines that the end of the source cut and that went on later, one cut by a generation."""
    g = Golden()
    at = g.source(b"long.log", 0)
    g.frame(LINES, b"long ", flags=FIRST)
    g.frame(LINES, b"longer ", flags=MIDDLE, off=5)
    g.commit(0, entry(0, at, 12, 0, b"long longer ", flags=OPEN_FRAGMENT), full=True)
    g.frame(LINES, b"longest\n", flags=LAST, off=12, count=1)
    g.frame(LINES, b"whole\ncut", flags=UNTERMINATED, seq=1, off=20, count=2)
    g.commit(3, entry(0, at, 29, 3, b"long longer longest\nwhole\ncut", flags=OPEN_LINE), full=False, durable=300)
    g.frame(LINES, b", goes on", flags=MIDDLE | UNTERMINATED, seq=3, off=29)
    g.frame(LINES, b", ends\n", flags=LAST, seq=3, off=38)
    g.frame(LINES, b"begun ", flags=FIRST, seq=3, off=45)
    g.frame(LINES, b"and cut", flags=MIDDLE | UNTERMINATED, seq=3, off=51, count=1)
    content = b"long longer longest\nwhole\ncut, goes on, ends\nbegun and cut"
    at = g.source(b"long.log", 0, entry(0, at, 58, 4, content, flags=OPEN_LINE), generation=1, seq=4)
    g.frame(LINES, b"again\n", seq=4, count=1, generation=1)
    g.commit(5, entry(0, at, 6, 5, b"again\n", generation=1), full=False)
    return g.data


def rotated() -> bytes:
    """A source in four generations: rotated, truncated inside a line with a loss stated, rotated while it was empty."""
    g = Golden()
    other = g.source(b"other.log", 0)
    first = g.source(b"app.log", 1)
    g.frame(LINES, b"first file\n", source=1, count=1)
    g.commit(1, entry(0, other, 0, 0), entry(1, first, 11, 1, b"first file\n"), full=True)
    g.frame(LINES, b"its end", source=1, seq=1, off=11, flags=UNTERMINATED, count=1)
    end = entry(1, first, 18, 2, b"first file\nits end", flags=OPEN_LINE)
    second = g.source(b"app.log", 1, end, inode=4800, generation=1, seq=2)
    g.frame(LINES, b"second", source=1, seq=2, flags=FIRST, generation=1)
    g.frame(GAP, struct.pack("<QQQB7x", 6, 100, NONE_U64, 1), source=1, seq=2, off=6, generation=1)
    end = entry(1, second, 100, 2, b"second", b"", generation=1)
    third = g.source(b"app.log", 1, end, inode=4800, generation=2, seq=2)
    end = entry(1, third, 0, 2, generation=2)
    fourth = g.source(b"app.log", 1, end, inode=4900, generation=3, seq=2)
    g.frame(LINES, b"fourth\n", source=1, seq=2, count=1, generation=3)
    g.commit(3, entry(1, fourth, 7, 3, b"fourth\n", generation=3), full=False)
    return g.data


def two_runs() -> bytes:
    """A second run of the writer: it begins with a COMMIT in its own epoch and goes on where the first one ended."""
    g = Golden()
    at = g.source(b"app.log", 0)
    g.frame(LINES, b"first run\n", count=1)
    g.commit(1, entry(0, at, 10, 1, b"first run\n"), full=True)
    g.epoch = 0x5EC0_17D0
    g.commit(1, full=False)
    g.frame(LINES, b"second run\n", seq=1, off=10, count=1)
    g.commit(2, entry(0, at, 21, 2, b"first run\nsecond run\n"), full=False)
    return g.data


def torn() -> bytes:
    """Two frames after the last COMMIT, the second cut in its payload."""
    g = Golden()
    at = g.source(b"app.log", 0)
    g.frame(LINES, b"safe\n", count=1)
    g.commit(1, entry(0, at, 5, 1, b"safe\n"), full=True)
    g.frame(LINES, b"whole\n", seq=1, off=5, count=1)
    g.frame(LINES, b"torn in the middle of the payload\n", seq=2, off=11, count=1)
    return g.data[:-20]


def hole() -> bytes:
    """Three frames after the last COMMIT, the second of them zeros: the disk's own order of pages after power loss."""
    g = Golden()
    at = g.source(b"app.log", 0)
    g.frame(LINES, b"safe\n", count=1)
    g.commit(1, entry(0, at, 5, 1, b"safe\n"), full=True)
    g.frame(LINES, b"whole\n", seq=1, off=5, count=1)
    start = g.frame(LINES, b"lost\n", seq=2, off=11, count=1)
    end = g.frame(LINES, b"behind\n", seq=3, off=16, count=1)
    return g.data[:start] + bytes(end - start) + g.data[end:]


def forged() -> bytes:
    """A log line that holds a whole COMMIT frame with right checksums; no walk from the start leads to it."""
    g = Golden()
    at = g.source(b"app.log", 0)
    g.frame(LINES, b"honest\n", count=1)
    g.commit(1, entry(0, at, 7, 1, b"honest\n"), full=True)
    liar = Golden()
    liar.commit(99, entry(0, at, 10**6, 10**5), full=True)
    text = b"look: " + liar.data[liar.last_commit :] + b" :look\n"
    g.frame(LINES, text, seq=1, off=7, count=text.count(b"\n"))
    return g.data


def sealed() -> bytes:
    """A segment: source 0 was rotated in it, and the last line of source 1 goes on in the next segment."""
    return closed()[0].data


def next_segment() -> bytes:
    """The segment behind that one: it states both sources again, of source 0 without its generation 0."""
    _, chain = closed()
    g = Golden(segment=1, chain=chain)
    first, second = len(g.data), len(g.data) + 64 + 40 + 88 + 88 + len(b"app.log")
    ended = entry(0, NONE_U64, 4, 1, b"old\n")
    new, other = entry(0, first, 4, 2, b"new\n", generation=1), entry(1, second, 5, 0, b"begun", flags=1)
    g.again(b"app.log", ended, new, inode=4712)
    g.again(b"other.log", b"", other, inode=4713)
    g.commit(0, new, other, full=True)
    g.frame(LINES, b" here\n", flags=4, source=1, off=5, count=1)
    g.commit(1, entry(1, second, 11, 1, b"begun here\n"[:5], b" here\n"), full=False)
    return g.data


def closed() -> tuple[Golden, bytes]:
    g = Golden()
    begun_ns = 1_700_000_000_000_000_000
    at = g.source(b"app.log", 0)
    g.frame(LINES, b"old\n", count=1)
    after = g.source(b"app.log", 0, entry(0, at, 4, 1, b"old\n"), inode=4712, generation=1, seq=1)
    other = g.source(b"other.log", 1, inode=4712)
    g.frame(LINES, b"new\n", seq=1, count=1, generation=1)
    g.frame(LINES, b"begun", flags=1, source=1)
    committed_ns = g.time_ns
    g.commit(2, entry(0, after, 4, 2, b"new\n", generation=1), entry(1, other, 5, 0, b"begun", flags=1), full=True)
    place = b"".join(map(leb128, (g.last_commit, 2 * committed_ns, 2)))
    index = g.frame(INDEX, place)
    return g, g.seal(index, 2, begun_ns)


def leb128(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number % 128 + 128]), number // 128
    return out + bytes([number])


FILES: dict[str, Callable[[], bytes]] = {
    "empty.opk": empty,
    "every_type.opk": every_type,
    "forged.opk": forged,
    "fragments.opk": fragments,
    "hole.opk": hole,
    "rotated.opk": rotated,
    "series.000000.opk": sealed,
    "series.opk": next_segment,
    "torn.opk": torn,
    "two_runs.opk": two_runs,
}


def main(*, write: bool) -> int:
    status = 0
    for name, build in FILES.items():
        path, expected = DATA / name, build()
        found = path.read_bytes() if path.exists() else None
        if found is None and write:
            path.write_bytes(expected)
            print(f"{name}: written, {len(expected)} bytes")
        elif found != expected:
            print(f"{name}: {'missing' if found is None else 'differs; a golden file is never changed, add another'}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(write="--write" in sys.argv[1:]))
