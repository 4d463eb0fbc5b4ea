"""`split` and `stat`: every source back, byte for byte, and never a byte outside of the folder."""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from zlib import crc32

import pytest

from offload.errors import PacketError
from offload.files.frame_source import FrameSource
from offload.files.packet_file import PacketFile, Piece
from offload.files.packet_stream import PacketWriter
from offload.merge.names import Names, below, safe_name, short_names
from offload.merge.split import split, stat
from offload.packets.codec import GapInfo, SourceInfo, packets_payload
from offload.packets.format import HEADER_CRC_AT, NONE_U64, Compression, Flag, FrameType, GapReason

START = 1_700_000_000_000_000_000


def begin(file: PacketFile, path: bytes, source_id: int | None = None, *, start: int = 0) -> int:
    return file.open_source(SourceInfo(1, 2, 0, start, Compression.NONE, path), source_id)


def make(path: Path, *sources: tuple[bytes, bytes]) -> Path:
    """A packet file with these sources, a frame each."""
    times = iter(range(START, START + 10**6))
    file = PacketFile(path, fsync="none", clock=lambda: next(times))
    for name, data in sources:
        source_id = begin(file, name)
        rest = not data.endswith(b"\n")
        flags = Flag.UNTERMINATED if rest else Flag.NONE
        file.append([Piece(source_id, data, 0, data.count(b"\n") + rest, flags)] if data else [])
    file.close()
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def back(tmp_path: Path) -> Path:
    return tmp_path / "in" / "there" / "back"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged.opk"


def test_every_source_comes_back(out: Path, back: Path) -> None:
    """Each source is a file again, under its path below what all have in common; an empty one is an empty file."""
    make(out, (b"/logs/a", b"one\r\n\0\xff"), (b"/logs/sub/b", b""), (b"/logs/sub/c", b"x\n"))
    done = split(out, back)
    assert tree(back) == {"a": b"one\r\n\0\xff", "sub/b": b"", "sub/c": b"x\n"}
    assert done.written == {back / "a": 7, back / "sub/b": 0, back / "sub/c": 2}
    assert done.incomplete == {}


def test_an_empty_packet_file_gives_no_files(out: Path, back: Path) -> None:
    """Where nothing is, nothing is written."""
    make(out)
    assert split(out, back).written == {}
    assert not back.exists()


EVIL = [
    b"../../x",
    b"/../../etc/passwd",
    b"/abs",
    b"",
    b"/",
    b".",
    b"..",
    b"a/../b",
    b"a/./b//c/",
    b"nul\0nul",
    b"../",
    b"\xff/\n",
    b"..\\..\\x",
]


@pytest.mark.parametrize("company", [(), (b"a",), (b"/logs/a", b"/logs/b")], ids=["alone", "relative", "absolute"])
@pytest.mark.parametrize("name", EVIL, ids=repr)
def test_no_name_leads_out_of_the_folder(
    tmp_path: Path, out: Path, back: Path, name: bytes, company: tuple[bytes, ...]
) -> None:
    """Whatever a source is called, its file is below the folder, and it is its own."""
    make(out, (name, b"evil\n"), *((other, other) for other in company))
    done = split(out, back)
    files = tree(tmp_path)
    files.pop("merged.opk")
    assert len(files) == len(done.written) == 1 + len(company)
    assert all(path.startswith("in/there/back/") for path in files)
    assert sorted(files.values()) == sorted([b"evil\n", *company])
    for path in done.written:
        assert back.resolve() in path.resolve().parents


async def test_names_that_the_library_gives_are_safe_too(tmp_path: Path, out: Path, back: Path) -> None:
    """A source that a program names as it likes stays inside the folder."""
    async with PacketWriter(out) as writer:
        for name in EVIL:
            await writer.write(b"line\n", os.fsdecode(name))
    done = split(out, back)
    files = tree(tmp_path)
    files.pop("merged.opk")
    assert len(files) == len(done.written) == len(set(EVIL))
    assert all(path.startswith("in/there/back/") for path in files)


@pytest.mark.parametrize(
    "names",
    [
        (b"a", b"a/b"),
        (b"a/b", b"a"),
        (b"a/b", b"a//b", b"./a/b"),
        (b"a", b"a.2", b"./a"),
        (b"..", b"__"),
        (b"", b"_", b"/"),
        (b"a", b"a/b", b"a.2/c", b"a/b/c"),
    ],
    ids=repr,
)
def test_sources_never_share_a_file(out: Path, back: Path, names: tuple[bytes, ...]) -> None:
    """Names that would mean one file, or a file and a folder at once, give files of their own."""
    make(out, *((name, b"%d\n" % number) for number, name in enumerate(names)))
    split(out, back)
    assert sorted(tree(back).values()) == [b"%d\n" % number for number in range(len(names))]


def test_what_is_there_is_not_overwritten(out: Path, back: Path) -> None:
    """A file in the way is FileExistsError and stays as it is; with `force` it is replaced, and the rest left alone."""
    make(out, (b"/logs/a", b"new\n"))
    back.mkdir(parents=True)
    (back / "a").write_bytes(b"older and longer\n")
    (back / "other").write_bytes(b"mine\n")
    with pytest.raises(FileExistsError) as caught:
        split(out, back)
    assert caught.value.filename == str(back / "a") or caught.value.filename == back / "a"
    assert tree(back) == {"a": b"older and longer\n", "other": b"mine\n"}
    split(out, back, force=True)
    assert tree(back) == {"a": b"new\n", "other": b"mine\n"}


def test_generations_are_files_of_their_own(out: Path, back: Path) -> None:
    """The last generation has the source's name, those before a number behind it; a gap is told."""
    file = PacketFile(out, fsync="none")
    a = begin(file, b"/logs/app.log")
    file.append([Piece(a, b"zero\n", 0, 1)])
    begin(file, b"/logs/app.log", a)
    file.append([Piece(a, b"one\n", 0, 1)])
    file.gap(a, GapInfo(4, NONE_U64, NONE_U64, GapReason.TRUNCATED))
    begin(file, b"/logs/app.log", a)
    file.append([Piece(a, b"two\n", 0, 1)])
    file.close()
    done = split(out, back)
    assert tree(back) == {"app.log": b"two\n", "app.log.gen0": b"zero\n", "app.log.gen1": b"one\n"}
    assert done.incomplete == {back / "app.log.gen1": "from byte 4 to its end: truncated before it was read"}


def test_a_source_that_was_not_read_from_its_start_is_told(out: Path, back: Path) -> None:
    """What the packet file never had is not passed over."""
    file = PacketFile(out, fsync="none")
    a = begin(file, b"/logs/a", start=100)
    file.append([Piece(a, b"late\n", 100, 1)])
    file.close()
    assert split(out, back).incomplete == {back / "a": "begins at its byte 100"}


def test_packets_come_back_without_their_table(out: Path, back: Path) -> None:
    """Packets are written one behind the other, byte for byte."""
    file = PacketFile(out, fsync="none")
    a = begin(file, b"a")
    payload, flags = packets_payload([b"one", b"", b"\0two"])
    file.append([Piece(a, payload, 0, 3, flags, FrameType.PACKETS)])
    file.close()
    split(out, back)
    assert tree(back) == {"a": b"one\0two"}
    entry = stat(out).sources[0]
    assert (entry.lines, entry.bytes) == (3, 7)


def test_more_sources_than_descriptors(out: Path, back: Path) -> None:
    """Files are opened again as needed: many sources, in turns, cost a bounded number of descriptors."""
    file = PacketFile(out, fsync="none")
    ids = [begin(file, b"/logs/%d" % number) for number in range(300)]
    for turn in range(3):
        file.append([Piece(i, b"%d\n" % turn, 2 * turn, 1) for i in ids])
    file.close()
    split(out, back)
    assert tree(back) == {str(number): b"0\n1\n2\n" for number in range(300)}


def test_damage_ends_it_with_all_that_stands_before(out: Path, back: Path) -> None:
    """A damaged file is PacketError with the place; what stands before it has been written."""
    make(out, (b"/logs/a", b"whole\n"), (b"/logs/b", b"damaged\n"))
    data = bytearray(out.read_bytes())
    at = data.rfind(b"damaged")
    data[at] ^= 1
    out.write_bytes(data)
    with pytest.raises(PacketError, match="payload checksum") as caught:
        split(out, back)
    assert caught.value.offset < at
    assert tree(back)["a"] == b"whole\n"


@pytest.mark.parametrize("field", [12, 48], ids=["source", "generation"])
def test_lines_of_nobody_are_damage(out: Path, back: Path, field: int) -> None:
    """A frame of a source or a generation that no SOURCE frame begins is an error with its place, for all that its
    checksums hold."""
    make(out, (b"/logs/a", b"one\n"))
    with FrameSource(out) as source:
        frame = next(f for f in source if f.header.type is FrameType.LINES)
    data = bytearray(out.read_bytes())
    data[frame.offset + field] = 7
    head = frame.offset + HEADER_CRC_AT
    data[head : head + 4] = crc32(data[frame.offset : head]).to_bytes(4, "little")
    out.write_bytes(data)
    with pytest.raises(PacketError, match=r"source \d has no generation \d: no SOURCE frame begins it") as caught:
        split(out, back)
    assert caught.value.offset == frame.offset
    assert tree(back) == {"a": b""}


def test_the_watcher_sees_how_far_it_is(out: Path, back: Path) -> None:
    """Progress is told in bytes, and its last word is all of them."""
    make(out, (b"/logs/a", b"x\n"))
    told: list[tuple[int, int]] = []
    split(out, back, watcher=lambda done, size: told.append((done, size)))
    assert told[-1] == (out.stat().st_size,) * 2


# --- stat -------------------------------------------------------------------------------------------------------------


def test_stat_counts_what_each_source_has(out: Path) -> None:
    """Lines, bytes, generation, gaps, and the first and last time of arrival, from the headers."""
    make(out, (b"/logs/a", b"one\ntwo"), (b"/logs/sub/b", b""))
    report = stat(out)
    assert report.size == out.stat().st_size
    assert (report.lines, report.bytes) == (2, 7)
    a, b = report.sources
    assert (a.name, a.path, a.lines, a.bytes, a.generation, a.gaps) == ("a", "/logs/a", 2, 7, 0, 0)
    assert a.first_ns == a.last_ns
    assert a.first_ns is not None
    assert a.first_ns >= START
    assert (b.name, b.lines, b.bytes, b.first_ns, b.last_ns) == ("sub/b", 0, 0, None, None)


def test_stat_reads_a_file_with_a_torn_tail(out: Path) -> None:
    """A frame under way is not counted and no error."""
    make(out, (b"/logs/a", b"one\n"))
    with out.open("ab") as file:
        file.write(out.read_bytes()[:70])
    assert stat(out).lines == 1


def test_stat_of_a_damaged_header_says_where(out: Path) -> None:
    """A damaged header is PacketError with its place."""
    make(out, (b"/logs/a", b"one\n"))
    data = bytearray(out.read_bytes())
    data[data.rfind(b"one") - 30] ^= 1
    out.write_bytes(data)
    with pytest.raises(PacketError, match="header checksum"):
        stat(out)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "common", "names"),
    [
        (["/var/log/a"], "/var/log", ["a"]),
        (["/var/log/a", "/var/log/b"], "/var/log", ["a", "b"]),
        (["/var/log/a", "/var/log/x/b"], "/var/log", ["a", "x/b"]),
        (["/var/log/a", "/srv/log/a"], "/", ["var/log/a", "srv/log/a"]),
        (["/var/log/a", "/var/logs/b"], "/var", ["log/a", "logs/b"]),
        (["web-1", "web-2"], "", ["web-1", "web-2"]),
        (["a", "/logs/a"], "/logs", ["a", "/logs/a"]),  # one name twice: the whole path tells them apart
        (["", "/"], "/", ["", "/"]),
        ([], "", []),
    ],
)
def test_short_names(paths: list[str], common: str, names: list[str]) -> None:
    """A source's name is its path below the folder that all have in common, and its alone."""
    assert short_names(os.fsencode(path) for path in paths) == (common, names)


def test_below() -> None:
    """A path below a folder is relative to it; a name that only begins alike is not below."""
    assert below("/logs/a/b", "/logs") == "a/b"
    assert below("/logs2/a", "/logs") == "/logs2/a"
    assert below("/a", "/") == "a"
    assert below("a", "") == "a"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a/b", "a/b"),
        ("../../x", "__/__/x"),
        ("/abs", "abs"),
        ("", "_"),
        ("./.", "_"),
        ("a/../b", "a/__/b"),
        ("nul\0", "nul_"),
        ("...", "..."),
    ],
)
def test_safe_name(name: str, safe: str) -> None:
    """Nothing in a name leads anywhere but down."""
    assert safe_name(name) == PurePath(safe)


def test_names_of_sources_that_come_later(out: Path) -> None:
    """A source that comes while the file is read is named as the others are, and never like one of them."""
    make(out, (b"/logs/a", b"x\n"))
    with FrameSource(out) as source:
        names = Names(source)
        assert names.all() == ["a"]
        make_more(out)
        for frame in source:
            if frame.header.type is FrameType.SOURCE:
                names.see(frame)
        assert names.all() == ["a", "b", "/other/c"]
        assert names[99] == "source 99"


def make_more(out: Path) -> None:
    file = PacketFile(out, fsync="none")
    begin(file, b"/logs/b")
    begin(file, b"/other/c")
    file.append([])
    file.close()
