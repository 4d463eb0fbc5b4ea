"""Files written by version 1, kept byte for byte: what was on a user's disk once stays readable for good."""

from __future__ import annotations

import hashlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from offload.packets import Flag, Frame, FrameType, Ledger, PacketDecoder, encode, recover
from offload.packets.codec import CommitInfo, Damage, SourceInfo
from offload.packets.format import EntryFlag
from offload.packets.ledger import digest
from offload.packets.recover import Hole, generations
from offload.packets.restate import contradictions

WRITER = Path(__file__).with_name("golden.py")
DATA = Path(__file__).parent.parent / "data" / "packets"
BUILDERS = runpy.run_path(str(WRITER))["FILES"]

# Of every file ever added. A line here is never changed and never taken away.
SHA256 = {
    "empty.opk": "70541150030f460b95c33f1e24fd921946696e6383cd683e9b60b61fd78e8197",
    "every_type.opk": "151b3f515972ce29c53c5c6973b20544ed0ba2670aea6e0c170389410fa73dba",
    "forged.opk": "d0d7e12b30cfbbb5c3ae6cd151c80fe5dc0bd676b18a3340e8df47c28a54213a",
    "fragments.opk": "d7601947574b1f8d68927cec6262294a4ce7eb37762fefd11692fdd14fe89f7a",
    "hole.opk": "39fd18bc53adb4f3a48a2012057910c07693e678092bf4a68c32c6dcaa681196",
    "rotated.opk": "3451c3b275d2a1190c53f5f79690ed22378335631a7e7e53ab786f918516fd15",
    "series.000000.opk": "a2114db466403d53c82ed0cad0f065295b7dd7b1a6bd8304e4cdac5227e239aa",
    "series.opk": "1997f2280c71063f3bf1df9a5ce02ac0c522d422955fea5fdf4caf747745d79d",
    "torn.opk": "3782c877d95f1f134fec7267b3a177f1ecefdc647e20819e1a34586729857bb4",
    "two_runs.opk": "cc66a837209c3790ba2395a23ec9edfbf21b77753715f81d8a1caf76412edcbc",
}
TORN = [Damage(601, 679, "torn tail: 78 bytes of a frame of at least 98")]
HOLE = [Damage(601, 670, "found 00 00 00 00, expected the magic ff 4f 50 4b")]


def decode(data: bytes) -> tuple[list[Frame], list[Damage]]:
    damage: list[Damage] = []
    decoder = PacketDecoder(on_damage=damage.append)
    frames = decoder.feed(data)
    return frames + decoder.close(), damage


@pytest.mark.parametrize("name", SHA256)
def test_golden_file_was_never_changed(name: str) -> None:
    """Each file ever added is still there with the bytes that it was added with."""
    assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == SHA256[name]


def test_every_golden_file_is_listed() -> None:
    """The folder, the list of checksums and the writer name the same files."""
    assert {path.name for path in DATA.glob("*.opk")} == SHA256.keys() == BUILDERS.keys()


def test_page_alone_is_enough_to_write_the_golden_files() -> None:
    """A writer that knows `format.py`'s page and nothing of the package makes the same bytes."""
    check = subprocess.run([sys.executable, str(WRITER)], capture_output=True, text=True, timeout=60, check=False)
    assert (check.stdout, check.stderr, check.returncode) == ("", "", 0)


@pytest.mark.parametrize(
    ("name", "expected", "damaged"),
    [
        ("empty.opk", "FILE COMMIT", []),
        (
            "every_type.opk",
            "FILE SOURCE LINES SOURCE PACKETS PACKETS COMMIT NOTE GAP LINES COMMIT INDEX SEAL",
            [],
        ),
        ("forged.opk", "FILE SOURCE LINES COMMIT LINES", []),
        (
            "fragments.opk",
            "FILE SOURCE LINES LINES COMMIT LINES LINES COMMIT LINES LINES LINES LINES SOURCE LINES COMMIT",
            [],
        ),
        ("hole.opk", "FILE SOURCE LINES COMMIT LINES LINES", HOLE),
        (
            "rotated.opk",
            "FILE SOURCE SOURCE LINES COMMIT LINES SOURCE LINES GAP SOURCE SOURCE LINES COMMIT",
            [],
        ),
        ("series.000000.opk", "FILE SOURCE LINES SOURCE SOURCE LINES LINES COMMIT INDEX SEAL", []),
        ("series.opk", "FILE SOURCE SOURCE COMMIT LINES COMMIT", []),
        ("torn.opk", "FILE SOURCE LINES COMMIT LINES", TORN),
        ("two_runs.opk", "FILE SOURCE LINES COMMIT COMMIT LINES COMMIT", []),
    ],
)
def test_golden_file_decodes(name: str, expected: str, damaged: list[Damage]) -> None:
    """The frames of a golden file, its damage, and each frame encoded again to the bytes it came from."""
    data = (DATA / name).read_bytes()
    frames, damage = decode(data)
    assert " ".join(frame.header.type.name for frame in frames) == expected
    assert damage == damaged
    for frame in frames:
        h = frame.header
        again = encode(
            h.type,
            frame.payload,
            flags=h.flags,
            source_id=h.source_id,
            seq=h.seq,
            source_off=h.source_off,
            time_ns=h.time_ns,
            count=h.count,
            generation=h.generation,
            prev_len=h.prev_len,
            epoch=h.epoch,
        )
        assert again == data[frame.offset : frame.end]


@pytest.mark.parametrize("name", [name for name in SHA256 if name != "hole.opk"])
def test_golden_file_has_no_faults(name: str) -> None:
    """A ledger that replays a golden file finds no fault; each COMMIT and SOURCE states what the ledger would state."""
    data = (DATA / name).read_bytes()
    ledger = Ledger()
    for frame in decode(data)[0]:
        assert list(ledger.faults(frame)) == []
        if frame.header.type is FrameType.COMMIT:
            found = CommitInfo.unpack(frame)
            assert found == ledger.commit(found.durable_upto)
        if frame.header.type is FrameType.SOURCE:
            state = ledger.sources.get(frame.header.source_id)
            if not frame.header.flags & Flag.RESTATED:
                assert SourceInfo.unpack(frame).before == (None if state is None else state.entry())
        ledger.apply(frame.header, frame.payload, data[frame.offset : frame.offset + 64], frame.offset)


@pytest.mark.parametrize(
    ("name", "lines", "torn", "hole"),
    [
        ("empty.opk", 0, 0, None),
        ("every_type.opk", 7, 0, None),
        ("forged.opk", 2, 0, None),
        ("fragments.opk", 5, 0, None),
        ("hole.opk", 2, 741 - 601, Hole(601, 670)),
        ("rotated.opk", 3, 0, None),
        ("series.000000.opk", 2, 0, None),
        ("series.opk", 1, 0, None),
        ("torn.opk", 2, 679 - 601, None),
        ("two_runs.opk", 2, 0, None),
    ],
)
def test_golden_file_recovers(name: str, lines: int, torn: int, hole: Hole | None) -> None:
    """Recovery finds the same end, number of lines and hole in a golden file as the version that wrote it."""
    data = (DATA / name).read_bytes()
    found = recover(lambda offset, length: data[offset : offset + length], len(data))
    assert (found.ledger.total_lines, found.torn, found.hole) == (lines, torn, hole)
    assert found.ledger.end == len(data) - torn


def test_golden_rotation_tells_each_file_that_was_read() -> None:
    """From the last COMMIT alone, each earlier generation's file, end and hashes are found, newest first."""
    data = (DATA / "rotated.opk").read_bytes()

    def read_at(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    other, app = recover(read_at, len(data)).ledger.sources.values()
    assert list(generations(read_at, len(data), other)) == []
    found = list(generations(read_at, len(data), app))
    assert [(info.inode, e.generation, e.resume_off, e.next_seq, e.flags) for info, e in found] == [
        (4801, 2, 0, 2, EntryFlag.NONE),
        (4801, 1, 100, 2, EntryFlag.NONE),
        (4712, 0, 18, 2, EntryFlag.OPEN_LINE),
    ]
    nothing = bytes(16)
    assert [(e.head, e.guard) for _, e in found] == [
        (nothing, nothing),
        (digest(b"second"), nothing),
        (digest(b"first file\nits end"), digest(b"first file\nits end")),
    ]


def test_golden_series_is_one_file() -> None:
    """The second segment names the end of the first, and states each source as it stood there."""
    ledgers: list[Ledger] = []
    for name in ("series.000000.opk", "series.opk"):
        data, ledger = (DATA / name).read_bytes(), Ledger()
        for frame in decode(data)[0]:
            ledger.apply(frame.header, frame.payload, data[frame.offset : frame.offset + 64], frame.offset)
            if ledgers and ledger.last_commit == frame.offset and not ledger.total_lines:
                assert list(contradictions(ledgers[0], ledger)) == []
        ledgers.append(ledger)
    assert [ledger.sealed for ledger in ledgers] == [True, False]
    read_at = lambda offset, length: data[offset : offset + length]  # noqa: E731
    first, second = recover(read_at, len(data)).ledger.sources.values()
    assert (first.generation, first.next_seq, first.resume_off, first.head_hash) == (1, 2, 4, digest(b"new\n"))
    assert (second.next_seq, second.resume_off, second.open) == (1, 11, EntryFlag.NONE)
    assert list(generations(read_at, len(data), first)) == []


def test_golden_packets_and_lines() -> None:
    """Packets with and without a table, and lines with and without their ends, come out as the bytes put in."""
    frames, _ = decode((DATA / "every_type.opk").read_bytes())
    packets = [frame.packets() for frame in frames if frame.header.type is FrameType.PACKETS]
    assert packets == [[b"\x00\xffOPK\n\x00"], [b"", b"a\nb", b"\xff" * 5]]
    frames, _ = decode((DATA / "fragments.opk").read_bytes())
    lines = [(frame.lines(), frame.header.flags) for frame in frames if frame.header.type is FrameType.LINES]
    assert lines == [
        ([b"long "], Flag.FIRST),
        ([b"longer "], Flag.MIDDLE),
        ([b"longest\n"], Flag.LAST),
        ([b"whole\n", b"cut"], Flag.UNTERMINATED),
        ([b", goes on"], Flag.MIDDLE | Flag.UNTERMINATED),
        ([b", ends\n"], Flag.LAST),
        ([b"begun "], Flag.FIRST),
        ([b"and cut"], Flag.MIDDLE | Flag.UNTERMINATED),
        ([b"again\n"], Flag.NONE),
    ]


def test_golden_log_line_holds_a_whole_commit() -> None:
    """The forged COMMIT has right checksums: only the walk to it shows that it is text."""
    data = (DATA / "forged.opk").read_bytes()
    inside = data.rindex(b"\xffOPK")
    frame = PacketDecoder(offset=inside).feed(data[inside:])[0]
    assert frame.header.type is FrameType.COMMIT
    assert CommitInfo.unpack(frame).total_lines == 99
