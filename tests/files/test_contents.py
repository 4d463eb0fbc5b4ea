"""Contents: a file as bytes at places, as it is or unpacked."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.files.contents import Contents, open_contents, unpacked_name
from offload.packets.format import Compression

DATA = random.Random(0).randbytes(200_000) + b"x" * 1_000_000
PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}


def opened(path: Path, data: bytes) -> Contents:
    path.write_bytes(data)
    return open_contents(str(path))


@pytest.mark.parametrize("suffix", ["", *PACKERS])
def test_bytes_at_places(tmp_path: Path, suffix: str) -> None:
    """Forward and back, over the end, and out of two packed parts that stand one behind the other."""
    pack = PACKERS.get(suffix, bytes)
    contents = opened(tmp_path / f"app.log{suffix}", pack(DATA[:70_000]) + pack(DATA[70_000:]))
    assert contents.look()[0] == len(DATA)
    for offset, length in ((0, 10), (69_990, 20), (5, 100_000), (len(DATA) - 3, 10), (len(DATA) + 9, 1), (1, 1)):
        assert contents.read_at(offset, length) == DATA[offset : offset + length]
    contents.close()


@pytest.mark.parametrize("suffix", list(PACKERS))
@pytest.mark.parametrize("harm", ["torn", "damaged"])
def test_packed_and_not_whole(tmp_path: Path, suffix: str, harm: str) -> None:
    """A file that is still being packed has no length, and says so; nothing stays open."""
    data = PACKERS[suffix](DATA)
    data = data[:-5] if harm == "torn" else data[:1000] + b"damage" + data[1006:]
    contents = opened(tmp_path / f"app.log{suffix}", data)
    with pytest.raises(OSError, match="data is damaged or not complete yet"):
        contents.look()
    contents.close()


def test_what_is_packed_is_told_by_name_and_bytes(tmp_path: Path) -> None:
    """Text in a file that is called .gz is text, and packed bytes in a log are a log's bytes."""
    for name, data in (("a.gz", b"text\n"), ("a.log", gzip.compress(b"text\n"))):
        contents = opened(tmp_path / name, data)
        assert contents.compression is Compression.NONE
        assert contents.read_at(0, 1000) == data
        contents.close()
    assert [unpacked_name(name) for name in ("a.log.gz", "a.xz", "a.zst", "a.log")] == ["a.log", "a", "a", "a.log"]


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files, statx")
def test_holes_and_birth(tmp_path: Path) -> None:
    """Where the next bytes are behind a hole; and the birth time, which writing and renaming leave as it is."""
    path = tmp_path / "app.log"
    contents = opened(path, b"x")
    os.truncate(path, 1 << 30)
    assert contents.data_at(1 << 20, 1 << 30) == 1 << 30
    with path.open("r+b") as file:
        file.seek(1 << 29)
        file.write(b"y")
    assert (1 << 20) < contents.data_at(1 << 20, 1 << 30) <= 1 << 29
    again = open_contents(str(path.rename(tmp_path / "other")))
    assert again.birth_ns == contents.birth_ns
    assert contents.has_name()
    (tmp_path / "other").unlink()
    assert not contents.has_name()
    again.close()
    contents.close()
