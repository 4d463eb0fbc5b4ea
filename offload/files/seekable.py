"""A file packed so that any byte of it is found without unpacking what is before: zstd in frames, and a table of them.

The seekable format of zstd (contrib/seekable_format/zstd_seekable_compression_format.md in its sources, version 0.1.0):
independent frames, one behind the other, and then a skippable frame that any zstd program passes over:

    0x184D2A5E, size of what follows                  u32 each
    for each frame: packed size, unpacked size        u32 each, and a u32 checksum more if the descriptor says so
    number of frames, descriptor, 0x8F92EAB1          u32, u8 (bit 7: checksums), u32

So `zstdcat`, `zstdgrep` and `zstd -d` take the file as they take any. Unpacked it is what it was, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from .append import sync_descriptor, sync_folder
from .descriptor import open_regular, read_at

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BLOCK = 2 << 20  # unpacked bytes of a frame: what one look costs, some ms; larger ones hardly pack better

_SKIPPABLE = struct.Struct("<II")
_ENTRY = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")
_SKIPPABLE_MAGIC, _SEEKABLE_MAGIC = 0x184D2A5E, 0x8F92EAB1
_CHECKSUMS, _RESERVED = 0x80, 0x7C
_LEVEL = 3
_BLOCKS = 4  # unpacked frames held by a reader
_MAX_BLOCK = 64 << 20  # unpacked bytes of a frame that a reader takes


def zstandard() -> Any:
    """The package. Raises ImportError, which says what to install."""
    try:
        return importlib.import_module("zstandard")
    except ImportError as exc:
        message = "packing segments needs zstandard, which is not installed; pip install 'offload[zstd]'"
        raise ImportError(message, name="zstandard") from exc


def pack(path: Path, target: Path, temporary: Path) -> Iterator[None]:
    """Pack a file that does not change any more; then `target` is on the disk, and the file is gone.

    Each step packs one block, and it may be given up between two: `temporary` is left then, for the next try.

    Raises:
        OSError: as `open`, `write` and `os.replace`. The file is as it was.
    """
    module = zstandard()
    packer = module.ZstdCompressor(level=_LEVEL, write_checksum=True)
    status = os.stat(path)
    sizes: list[tuple[int, int]] = []
    with open(path, "rb") as source, open(temporary, "wb") as out:
        with contextlib.suppress(OSError, AttributeError):
            os.fchmod(out.fileno(), status.st_mode & 0o7777)
            os.fchown(out.fileno(), status.st_uid, status.st_gid)
        while data := source.read(BLOCK):
            packed = packer.compress(data)
            out.write(packed)
            sizes.append((len(packed), len(data)))
            yield
        table = b"".join(_ENTRY.pack(*size) for size in sizes)
        footer = _FOOTER.pack(len(sizes), 0, _SEEKABLE_MAGIC)
        out.write(_SKIPPABLE.pack(_SKIPPABLE_MAGIC, len(table) + len(footer)) + table + footer)
        out.flush()
        if sum(size for _, size in sizes) != status.st_size:
            raise OSError(errno.EIO, "has changed while it was packed", os.fspath(path))
        os.utime(out.fileno(), ns=(status.st_atime_ns, status.st_mtime_ns))  # when it was sealed, for retention
        sync_descriptor(out.fileno())
    os.replace(temporary, target)
    sync_folder(target.parent)
    os.unlink(path)


class Packed:
    """A packed file, read as what was packed; for one thread.

    Raises:
        OSError: as `open_regular`; there is nothing to unpack it with, or no such table at its end.
    """

    def __init__(self, path: Path) -> None:
        self._path = os.fspath(path)
        self._fd, status = open_regular(self._path)
        try:
            self._unpack = _unpacker()
            self._ends, self._packed_ends = self._table(status.st_size)
        except BaseException:
            os.close(self._fd)
            raise
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def size(self) -> int:
        """Unpacked bytes."""
        return self._ends[-1] if self._ends else 0

    def read_at(self, offset: int, length: int) -> bytes:
        """At most `length` unpacked bytes at `offset`; fewer only at the end.

        Raises:
            OSError: they cannot be unpacked.
        """
        parts: list[bytes] = []
        length = max(0, min(length, self.size() - offset))
        while length > 0:
            number = bisect_right(self._ends, offset)
            start = self._ends[number - 1] if number else 0
            data = self._block(number)[offset - start : offset - start + length]
            parts.append(data)
            offset, length = offset + len(data), length - len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        self._blocks.clear()
        if fd >= 0:
            os.close(fd)

    def _block(self, number: int) -> bytes:
        found = self._blocks.get(number)
        if found is not None:
            self._blocks.move_to_end(number)
            return found
        start, end = self._packed_ends[number - 1] if number else 0, self._packed_ends[number]
        size = self._ends[number] - (self._ends[number - 1] if number else 0)
        try:
            data = self._unpack(read_at(self._fd, start, end - start), size)
        except Exception as exc:  # each library has its own
            raise self._bad(f"bytes {start} to {end} do not unpack ({exc})") from exc
        if len(data) != size:
            raise self._bad(f"bytes {start} to {end} unpack to {len(data)} bytes, expected {size}")
        self._blocks[number] = data
        if len(self._blocks) > _BLOCKS:
            self._blocks.popitem(last=False)
        return data

    def _table(self, size: int) -> tuple[list[int], list[int]]:
        """Where each frame ends, unpacked and packed."""
        end = read_at(self._fd, max(0, size - _FOOTER.size), _FOOTER.size)
        if len(end) < _FOOTER.size:
            raise self._bad("it is too short for one")
        count, descriptor, magic = _FOOTER.unpack(end)
        if magic != _SEEKABLE_MAGIC or descriptor & _RESERVED:
            raise self._bad("it does not end in one")
        step = _ENTRY.size + (4 if descriptor & _CHECKSUMS else 0)
        length = count * step + _FOOTER.size
        start = size - length - _SKIPPABLE.size
        if start < 0 or read_at(self._fd, start, _SKIPPABLE.size) != _SKIPPABLE.pack(_SKIPPABLE_MAGIC, length):
            raise self._bad(f"one of {count} frames does not begin at byte {start}")
        table = read_at(self._fd, start + _SKIPPABLE.size, count * step)
        sizes = [_ENTRY.unpack_from(table, at) for at in range(0, count * step, step)]
        packed_ends = list(accumulate(packed for packed, _ in sizes))
        if (packed_ends[-1] if packed_ends else 0) != start or any(not 0 < n <= _MAX_BLOCK for _, n in sizes):
            raise self._bad("its sizes are not those of the frames")
        return list(accumulate(unpacked for _, unpacked in sizes)), packed_ends

    def _bad(self, why: str) -> OSError:
        return OSError(errno.EINVAL, f"no packed segment with a whole table of its frames: {why}", self._path)


def _unpacker() -> Callable[[bytes, int], bytes]:
    """Whatever can read zstd here: Python 3.14's own module, its backport, or `zstandard`."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            decompress = importlib.import_module(name).decompress
        except ImportError:
            continue
        return lambda data, size: bytes(decompress(data))
    try:
        module = importlib.import_module("zstandard")
    except ImportError:
        raise OSError(errno.ENOSYS, "packed with zstd; pip install 'offload[zstd]' to read it") from None
    unpacker = module.ZstdDecompressor()

    def unpack(data: bytes, size: int) -> bytes:
        if module.frame_content_size(data) not in (size, -1):
            raise ValueError("a frame of another size than the table says")
        return bytes(unpacker.decompress(data, max_output_size=size))

    return unpack
