"""The layout on disk: sizes, places and values that may never change, or files written earlier become unreadable."""

from __future__ import annotations

import enum
import re
import struct
from binascii import crc32

import pytest

from offload.packets import format
from offload.packets.codec import pack_header
from offload.packets.format import Compression, EntryFlag, Flag, FrameType, GapReason

ROW = re.compile(r"^ +(\d+) +(\d) (\w+) ", re.MULTILINE)
TABLE = [(int(at), int(size), name) for at, size, name in ROW.findall(format.__doc__ or "")]

# A value for each field of the table: every byte of it differs from the others, so a swapped or shifted byte shows.
FIELDS = {
    "flags": 0x1234,
    "payload_len": 0x00A1_B2C3,
    "source_id": 0x1122_3344,
    "seq": 0x0102_0304_0506_0708,
    "source_off": 0x1112_1314_1516_1718,
    "time_ns": 0x2122_2324_2526_2728,
    "count": 0x3132_3334,
    "payload_crc": 0x4142_4344,
    "generation": 0x5152_5354,
    "prev_len": 0x6162_6364,
    "epoch": 0x7172_7374,
}


def test_table_in_the_docstring_covers_the_header_without_gaps() -> None:
    """The documented table lists 15 fields that follow each other from byte 0 to byte 64."""
    assert len(TABLE) == 15
    at = 0
    for offset, size, name in TABLE:
        assert offset == at, name
        at += size
    assert at == format.HEADER_BYTES == 64


@pytest.mark.parametrize(("offset", "size", "name"), TABLE, ids=[name for _, _, name in TABLE])
def test_each_field_stands_where_the_table_says(offset: int, size: int, name: str) -> None:
    """A field's bytes are at its documented offset, little-endian, in its documented width."""
    fields = dict(FIELDS)
    header = pack_header(FrameType.GAP, fields.pop("payload_len"), fields.pop("payload_crc"), **fields)
    expected = {
        "magic": b"\xff\x4f\x50\x4b",
        "version": b"\x01",
        "type": b"\x05",
        "header_crc": crc32(header[:60]).to_bytes(4, "little"),
        **{key: value.to_bytes(size, "little") for key, value in FIELDS.items() if key == name},
    }
    assert header[offset : offset + size] == expected[name]


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (format.HEADER, 64),
        (format.HEADER_CRC, 4),
        (format.FILE_STRUCT, 52),
        (format.SOURCE_STRUCT, 40),
        (format.COMMIT_STRUCT, 64),
        (format.ENTRY_STRUCT, 88),
        (format.GAP_STRUCT, 32),
    ],
)
def test_layouts_have_fixed_sizes(layout: struct.Struct, size: int) -> None:
    """Every layout is little-endian without native padding, of the size that version 1 has."""
    assert layout.format.startswith("<")
    assert layout.size == size


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (
            FrameType,
            {"FILE": 0, "LINES": 1, "PACKETS": 2, "SOURCE": 3, "COMMIT": 4, "GAP": 5, "INDEX": 6, "SEAL": 7, "NOTE": 8},
        ),
        (
            Flag,
            {
                "NONE": 0,
                "FIRST": 1,
                "MIDDLE": 2,
                "LAST": 4,
                "UNTERMINATED": 8,
                "TABLE": 16,
                "ZSTD": 32,
                "HOLE": 64,
                "RESTATED": 128,
            },
        ),
        (EntryFlag, {"NONE": 0, "OPEN_FRAGMENT": 1, "OPEN_LINE": 2}),
        (GapReason, {"TRUNCATED": 1, "UNLINKED": 2, "GIVEN_UP": 3, "REGRESSION": 4, "DAMAGED": 5}),
        (Compression, {"NONE": 0, "GZIP": 1, "XZ": 2, "ZSTD": 3}),
    ],
)
def test_values_never_change(kind: type[enum.IntEnum], values: dict[str, int]) -> None:
    """Values once written to disk keep their meaning; new ones are added here, none is changed or taken away."""
    assert {name: int(member) for name, member in kind.__members__.items()} == values


def test_constants_never_change() -> None:
    """Magic, version, limits and markers are those of version 1."""
    assert bytes.fromhex("FF 4F 50 4B") == format.MAGIC
    assert format.VERSION == 1
    assert format.MAX_PAYLOAD == 16 * 1024 * 1024
    assert format.NONE_U64 == 2**64 - 1
    assert (format.HEAD_BYTES, format.GUARD_BYTES, format.DIGEST_BYTES) == (1024, 256, 16)
    assert format.FULL_COMMIT_BYTES == 64 * 1024 * 1024


def test_magic_begins_with_a_byte_that_utf8_never_has() -> None:
    """No text in UTF-8 holds the magic's first byte, so a scan through log lines has no false start."""
    with pytest.raises(UnicodeDecodeError, match="invalid start byte"):
        format.MAGIC[:1].decode()
    assert all(0xFF not in chr(point).encode() for point in range(0x11_0000) if not 0xD800 <= point < 0xE000)
