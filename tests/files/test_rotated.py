"""What becomes of a log: the names that rotation gives, and how a file is known by what is in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from offload.files.contents import open_contents
from offload.files.rotated import Folders, Resume, best_match, entry_of, is_rotated, rotated_from
from offload.packets.codec import SourceInfo
from offload.packets.format import GUARD_BYTES, HEAD_BYTES, Compression


@pytest.mark.parametrize(
    "name",
    [
        "app.log.1",
        "app.log.12",
        "app.log-20261121",
        "app.log.2026-11-21",
        "app.log.1.gz",
        "app.log.old",
        "app.log~",
        "app-20261121.log",
        "app.1.log",
        "app-2026-11-21T10:00.log.xz",
        "app.log.gz",
        "app.log.zst",
        "app.log_3.zst",
    ],
)
def test_names_that_rotation_gives(name: str) -> None:
    """Numbers and dates behind the name or before its suffix, and packed ones of these; found from either side."""
    assert is_rotated(name, "app.log")
    assert "app.log" in list(rotated_from(name))


@pytest.mark.parametrize(
    "name",
    ["app.log", "app-error.log", "app.log.error", "app.log2", "app2.log", "other.log.1", "app.txt", "app", "log"],
)
def test_names_of_other_logs(name: str) -> None:
    """What stands beside a log and is another one is not taken for what it was."""
    assert not is_rotated(name, "app.log")
    assert "app.log" not in list(rotated_from(name))


def known(path: Path, offset: int) -> Resume:
    """What is known of a file that was read up to here."""
    contents = open_contents(str(path))
    device, inode = contents.identity
    info = SourceInfo(device, inode, contents.birth_ns, 0, Compression.NONE, os.fsencode(path))
    guard = min(offset, GUARD_BYTES)
    head = contents.read_at(0, min(offset, HEAD_BYTES))
    resume = Resume(info, entry_of(head, contents.read_at(offset - guard, guard), offset, *contents.look()))
    contents.close()
    return resume


@pytest.mark.parametrize("size", [1, 300, 5000])
def test_the_longest_match_is_the_generation(tmp_path: Path, size: int) -> None:
    """Of several generations that a file holds, it is the one of which it holds most; of none, none."""
    path = tmp_path / "app.log"
    path.write_bytes(b"one\n" * size)
    readings = [known(path, 4), known(path, 4 * size), known(path, 0)]
    for data, expected in ((b"one\n" * size + b"two\n", 1), (b"one\ntwo\n" + b"x" * 10_000, 0 if size > 1 else 1)):
        (tmp_path / "copy").write_bytes(data)
        contents = open_contents(str(tmp_path / "copy"))
        found = best_match(contents, readings[:2])
        assert found is not None
        assert found.entry.resume_off == readings[expected].entry.resume_off
        assert best_match(contents, readings[2:]) is None  # nothing was read of it that could tell
        contents.close()
    (tmp_path / "copy").write_bytes(b"two\n" * size)
    contents = open_contents(str(tmp_path / "copy"))
    assert best_match(contents, readings) is None
    contents.close()


@pytest.mark.skipif(sys.platform != "linux", reason="birth times")
def test_an_older_file_is_no_copy(tmp_path: Path) -> None:
    """A file that was last written before the log was made is not taken for a copy of it, though it begins alike."""
    (tmp_path / "app.log").write_bytes(b"#header\n")
    (tmp_path / "app.log.1").write_bytes(b"#header\nold\n")
    os.utime(tmp_path / "app.log.1", ns=(0, 0))
    contents = open_contents(str(tmp_path / "app.log.1"))
    assert best_match(contents, [known(tmp_path / "app.log", 8)]) is None
    contents.close()


def test_folders_are_listed_anew_when_they_change(tmp_path: Path) -> None:
    """A file that comes, goes or changes its name shows at the next look, however soon that is."""
    path, folders = tmp_path / "app.log", Folders()
    path.touch()
    for number in range(50):
        assert list(folders.rotated(str(path))) == []
        other = tmp_path / f"app.log.{number}"
        other.touch()
        assert list(folders.rotated(str(path))) == [str(other)]
        assert folders.named(str(path), other.stat().st_ino) == str(other)
        other.unlink()
        assert folders.named(str(path), path.stat().st_ino) is None
