"""One file as bytes at places: as it stands on the disk, or unpacked (gzip, xz, zstd). For one thread.

Promises:
    - What is known of a file comes from the open descriptor, never from its name, which may be another file's by now.
    - An unpacked file has its length and its bytes only if all of it can be unpacked. One that is still being packed is
      an OSError, "not yet": a file is never taken for shorter than it is.
    - Reading on unpacks each byte once; only going back begins anew. No more than a block is held.

A file's birth time tells it from a later one that got its inode. Python has no name for it on Linux before 3.15, so
statx(2) is called by hand.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import struct
import sys
from functools import cache
from typing import Any, BinaryIO, cast

from ..packets.format import Compression
from .descriptor import open_regular, read_at

_BLOCK = 1 << 16
_PACKED = {
    ".gz": (Compression.GZIP, b"\x1f\x8b"),
    ".xz": (Compression.XZ, b"\xfd7zXZ\0"),
    ".zst": (Compression.ZSTD, b"\x28\xb5\x2f\xfd"),
}
# struct statx of linux/stat.h: 256 bytes; what is filled in stands in the first word, the birth time at byte 80.
_STATX, _BIRTH_AT = 256, 80
_STATX_BTIME, _AT_EMPTY_PATH = 0x800, 0x1000


def unpacked_name(name: str) -> str:
    """The name that a packed file had before it was packed."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in _PACKED else name


class Contents:
    """An open file, as it is.

    Attributes:
        identity: device and inode.
        birth_ns: when the inode was made, Unix nanoseconds; 0: the file system does not say.
        compression: how it is packed on the disk; what is read is unpacked.
    """

    compression = Compression.NONE

    def __init__(self, fd: int, status: os.stat_result) -> None:
        self.fd = fd
        self.identity = status.st_dev, status.st_ino
        self.birth_ns = birth_ns(fd, status)

    def look(self) -> tuple[int, int]:
        """Its length now, unpacked, and the time of its last change in ns.

        Raises:
            OSError: it cannot be unpacked to its end.
        """
        status = os.fstat(self.fd)
        return status.st_size, status.st_mtime_ns

    def changed_ns(self) -> int:
        """The time of its last change; costs nothing, whatever it holds. Packing a file leaves it as it was."""
        return os.fstat(self.fd).st_mtime_ns

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset` on; return how many bytes there were."""
        if hasattr(os, "preadv"):
            return os.preadv(self.fd, [view], offset)
        data = read_at(self.fd, offset, len(view))
        view[: len(data)] = data
        return len(data)

    def read_at(self, offset: int, length: int) -> bytes:
        """At most `length` bytes at `offset`; fewer only at its end."""
        return read_at(self.fd, offset, length)

    def data_at(self, offset: int, size: int) -> int:
        """Where the next bytes stand that are no hole, from `offset` on; `size` if none do."""
        if not hasattr(os, "SEEK_DATA"):
            return offset
        try:
            return min(size, os.lseek(self.fd, offset, os.SEEK_DATA))
        except OSError as exc:
            return size if exc.errno == errno.ENXIO else offset

    def has_name(self) -> bool:
        """Whether any name leads to it still."""
        return os.fstat(self.fd).st_nlink > 0

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Unpacked(Contents):
    """An open file that is packed, as what was packed into it."""

    def __init__(self, fd: int, status: os.stat_result, path: str, compression: Compression) -> None:
        super().__init__(fd, status)
        self.compression = compression
        self._path = path
        self._stream: BinaryIO | None = None
        self._at = 0
        self._counted: tuple[int, int] | None = None  # packed size and mtime when its length was counted
        self._size = 0

    def look(self) -> tuple[int, int]:
        packed, mtime_ns = super().look()
        if self._counted != (packed, mtime_ns):
            self._size = self._count()
            self._counted = packed, mtime_ns
        return self._size, mtime_ns

    def read_into(self, view: memoryview, offset: int) -> int:
        try:
            stream = self._seek(offset)
            done = 0
            while done < len(view) and (got := stream.readinto(view[done:])):  # type: ignore[attr-defined]
                done += got
        except Exception as exc:
            raise self._refused(exc) from exc
        self._at += done
        return int(done)

    def read_at(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        return bytes(data[: self.read_into(memoryview(data), offset)])

    def data_at(self, offset: int, size: int) -> int:
        return offset

    def close(self) -> None:
        self._drop()
        super().close()

    def _count(self) -> int:
        view = memoryview(bytearray(_BLOCK))
        size = 0
        while got := self.read_into(view, size):
            size += got
        return size

    def _seek(self, offset: int) -> BinaryIO:
        if self._stream is None or offset < self._at:
            self._drop()
            raw = open(self.fd, "rb", closefd=False)  # noqa: SIM115 - closed with the stream
            raw.seek(0)
            self._stream, self._at = _stream(raw, self.compression), 0
        while self._at < offset:
            data = self._stream.read(min(_BLOCK, offset - self._at))
            if not data:
                break
            self._at += len(data)
        return self._stream

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def _refused(self, exc: Exception) -> OSError:
        # zlib.error, lzma.LZMAError, zstd's: each library has its own, and all say that these bytes do not unpack.
        self._drop()
        if isinstance(exc, OSError) and exc.errno is not None:
            return exc
        if isinstance(exc, io.UnsupportedOperation):  # a seek was refused, says the library; why, it does not say
            return OSError(errno.EIO, str(exc), self._path)
        kind = self.compression.name.lower()
        return OSError(errno.EINVAL, f"{kind} data is damaged or not complete yet", self._path)


def open_contents(path: str) -> Contents:
    """Open a file; one that is packed, by its name and by its first bytes, is given unpacked.

    Raises:
        OSError: as `open_regular`. That it cannot be unpacked shows when it is looked at.
    """
    fd, status = open_regular(path)
    try:
        # No more than this is read here: most packed files beside a log are looked at and left.
        compression, magic = _PACKED.get(os.path.splitext(path)[1], (Compression.NONE, b""))
        found = read_at(fd, 0, len(magic))
        if not magic or not magic.startswith(found):
            return Contents(fd, status)
        return Unpacked(fd, status, path, compression)
    except BaseException:
        os.close(fd)
        raise


def birth_ns(fd: int, status: os.stat_result) -> int:
    """When this open file's inode was made, Unix nanoseconds; 0: unknown."""
    if sys.platform != "linux":
        return int(getattr(status, "st_birthtime_ns", 0) or getattr(status, "st_birthtime", 0) * 1e9)
    statx = _statx()
    if statx is None:
        return 0
    buffer = bytearray(_STATX)
    if statx(fd, buffer) or not struct.unpack_from("<I", buffer)[0] & _STATX_BTIME:
        return 0
    seconds, nanoseconds = struct.unpack_from("<qI", buffer, _BIRTH_AT)
    return max(0, int(seconds) * 1_000_000_000 + int(nanoseconds))


@cache
def _statx() -> Any:
    """statx(2) for an open file and a buffer; None: this C library has none."""
    import ctypes

    try:
        function = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    form = ctypes.c_char * _STATX

    def statx(fd: int, buffer: bytearray) -> int:
        return int(function(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, ctypes.addressof(form.from_buffer(buffer))))

    return statx


def _stream(raw: BinaryIO, compression: Compression) -> BinaryIO:
    if compression is Compression.GZIP:
        import gzip

        return cast(BinaryIO, _Owning(gzip.GzipFile(fileobj=raw), raw))
    if compression is Compression.XZ:
        import lzma

        return cast(BinaryIO, _Owning(lzma.LZMAFile(raw), raw))
    return cast(BinaryIO, _Owning(_zstd(raw), raw))


class _Owning(io.BufferedIOBase):
    """A stream over another file that is closed with it."""

    def __init__(self, stream: Any, raw: BinaryIO) -> None:
        self._stream = stream
        self._raw = raw

    def read(self, size: int | None = -1, /) -> bytes:
        return bytes(self._stream.read(size))

    def readinto(self, buffer: Any, /) -> int:
        return int(self._stream.readinto(buffer))

    def close(self) -> None:
        self._stream.close()
        self._raw.close()
        super().close()


def _zstd(raw: BinaryIO) -> Any:
    """Whatever can read zstd here: Python 3.14's own module, its backport, or `zstandard`."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name).ZstdFile(raw)
        except ImportError:
            continue
    try:
        module = importlib.import_module("zstandard")
    except ImportError:
        raise OSError(errno.ENOSYS, "packed with zstd; install the package zstandard to read it") from None
    return io.BufferedReader(_Zstandard(raw, module.ZstdDecompressor()), _BLOCK)


class _Zstandard(io.RawIOBase):
    """Frames of zstd, one behind the other; the package's own reader takes a torn frame for the end."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw = raw
        self._decompressor = decompressor
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            if not self._packed:
                self._packed = self._raw.read(_BLOCK)
                if not self._packed:
                    if self._frame is not None:
                        raise EOFError("the last frame is not whole")
                    return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(self._ready), len(buffer))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
