"""What any bytes must end in, whoever reads them: packets or a PacketError; and how real files become hostile ones.

For test_fuzz.py (Hypothesis) and fuzz_reader.py (atheris). `look_at` lets every exception through but PacketError, and
asserts what must hold of what was found.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

from offload import cli
from offload.errors import PacketError
from offload.files.frame_source import FrameSource
from offload.merge.audit import verify
from offload.merge.lines import LineReader, json_lines
from offload.merge.split import split, stat
from offload.net import wire
from offload.packets import Damage, Frame, Ledger, PacketDecoder, recover
from offload.packets.codec import encode
from offload.packets.format import HEADER, HEADER_BYTES, HEADER_CRC_AT, MAGIC, MAX_PAYLOAD, FrameType
from offload.packets.framer import Framer
from offload.packets.framing import LineFramer, OctetFramer, PrefixFramer
from offload.packets.ledger import SourceState
from offload.packets.recover import generations

GOLDEN = Path(__file__).parents[1] / "data" / "packets"
NUMBERS = (0, 1, 63, 64, 0x7F, 0xFF, 0xFFFF, 1 << 24, (1 << 24) + 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
# Offset and size of each field of a header behind its magic, as in `packets/format.py`.
FIELDS = (
    (4, 1),
    (5, 1),
    (6, 2),
    (8, 4),
    (12, 4),
    (16, 8),
    (24, 8),
    (32, 8),
    (40, 4),
    (44, 4),
    (48, 4),
    (52, 4),
    (56, 4),
)


def seeds() -> list[bytes]:
    """Real files to begin with."""
    return [path.read_bytes() for path in sorted(GOLDEN.glob("*.opk"))]


# --- hostile files ----------------------------------------------------------------------------------------------------


def mutate(data: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """A real file after a few harms: flips, cuts, splices, frames repeated and swapped, hostile numbers and lengths."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        if not out:
            break
        at, end = sorted((chance.randrange(len(out)), chance.randrange(len(out) + 1)))
        frames = [place for place in _headers(out) if place + HEADER_BYTES <= len(out)]
        frame = chance.choice(frames) if frames else 0
        match chance.randrange(8):
            case 0:
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                del out[at : min(end, at + chance.choice([1, 64, 1 << 20]))]
            case 2:
                other = chance.choice(others)
                start = chance.randrange(len(other))
                out[at:at] = other[start : start + chance.choice([1, 64, 200, 1 << 16])]
            case 3:
                out[at:end] = chance.randbytes(min(end - at, 300))
            case 4:
                out[at:at] = out[frame : frame + chance.choice([HEADER_BYTES, 100, 1000])]
            case 5:
                after = next((place for place in frames if place > frame), len(out))
                cut = bytes(out[frame:after])
                del out[frame:after]
                place = chance.choice([*_headers(out), len(out)])
                out[place:place] = cut
            case _ if frames:
                # A header that is sound and says what it should not: what a checksum cannot find.
                place, size = chance.choice(FIELDS)
                number = chance.choice(NUMBERS) if chance.random() < 0.7 else chance.getrandbits(64)
                out[frame + place : frame + place + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
                if chance.random() < 0.5 and len(out) > frame + HEADER_BYTES:
                    place = frame + HEADER_BYTES + chance.randrange(min(300, len(out) - frame - HEADER_BYTES))
                    value = chance.choice(NUMBERS).to_bytes(8, "little")[: len(out) - place]
                    out[place : place + len(value)] = value
                seal(out, frame)
            case _:
                out.clear()
    return bytes(out)


def seal(out: bytearray, place: int) -> None:
    """Make both checksums of the frame at this place right."""
    payload_len = HEADER.unpack_from(out, place)[4]
    payload = out[place + HEADER_BYTES : place + HEADER_BYTES + min(payload_len, MAX_PAYLOAD)]
    out[place + 44 : place + 48] = crc32(payload).to_bytes(4, "little")
    head = place + HEADER_CRC_AT
    out[head : head + 4] = crc32(out[place:head]).to_bytes(4, "little")


def seal_all(data: bytes) -> bytes:
    """The same with each header's checksums right, wherever the magic stands."""
    out = bytearray(data)
    for place in reversed(list(_headers(out))):  # of a frame in a payload first
        if place + HEADER_BYTES <= len(out):
            seal(out, place)
    return bytes(out)


def _headers(data: bytes | bytearray) -> Iterator[int]:
    at = data.find(MAGIC)
    while at >= 0:
        yield at
        at = data.find(MAGIC, at + 1)


def messages() -> list[bytes]:
    """One of each kind that `offload send` and its server say."""
    frames = [frame for data in seeds() for frame in _decoded(data, ())[0]]
    found = [wire.hello("host"), wire.seen(1, b"head", b"guard"), wire.batch({1: (2, 3)}), wire.durable(7)]
    state = next(state for data in seeds() for state in _states(data))
    found.append(wire.known(wire.Known(False, 0, 0, state.info, state.entry())))
    sent = (FrameType.SOURCE, FrameType.LINES, FrameType.GAP)
    return found + [wire.FRAME + _again(frame) for frame in frames if frame.header.type in sent][:20]


def _states(data: bytes) -> Iterator[SourceState]:
    found = _packet_error(lambda: recover(lambda offset, length: data[offset : offset + length], len(data)))
    yield from found.ledger.sources.values() if found is not None else ()


def _again(frame: Frame) -> bytes:
    header = frame.header
    return encode(
        header.type,
        frame.payload,
        flags=header.flags,
        source_id=header.source_id,
        seq=header.seq,
        source_off=header.source_off,
        count=header.count,
        generation=header.generation,
    )


# --- what must hold ---------------------------------------------------------------------------------------------------


def look_at(data: bytes, pieces: Sequence[int] = ()) -> None:
    """Decode in any pieces, replay, recover."""
    frames, damage = _decoded(data, ())
    assert (frames, damage) == _decoded(data, pieces), "pieces make a difference"
    stretches = sorted([(f.offset, f.end) for f in frames] + [(d.start, d.end) for d in damage])
    assert [0, *(end for _, end in stretches)] == [*(start for start, _ in stretches), len(data)], "bytes left over"
    _strict(data, pieces)
    ledger = Ledger()
    for frame in frames:
        for read in (frame.lines, frame.packets, frame.content, partial(getattr, frame, "hole")):
            _packet_error(read)
        raw = data[frame.offset : frame.offset + HEADER_BYTES]
        _packet_error(partial(_faults, ledger, frame, raw))

    def read_at(offset: int, length: int) -> bytes:
        assert 0 <= offset < 1 << 63, "no seek takes that"
        assert 0 <= length <= MAX_PAYLOAD + HEADER_BYTES
        return data[offset : offset + length]

    found = _packet_error(lambda: recover(read_at, len(data)))
    if found is not None:
        assert found.ledger.end + found.torn == len(data)
        for state in found.ledger.sources.values():
            _packet_error(state.entry)
            _packet_error(partial(_all, generations(read_at, len(data), state)))
        _packet_error(lambda: found.ledger.commit(0).pack())


def look_at_file(data: bytes, folder: Path) -> None:
    """Read a file of these bytes with all that reads packet files; `folder` is empty again afterwards."""
    path, back = folder / "file.opk", folder / "back"
    path.write_bytes(data)

    def lines() -> None:
        with FrameSource(path, on_damage=lambda damage: None) as source:
            reader = LineReader(source)
            for frame in source:
                for group in reader.feed(frame):
                    list(json_lines(group))
            for group in reader.close():
                list(json_lines(group))
            source.end()

    def frames() -> None:
        with FrameSource(path) as source:
            list(source.headers())

    found = _packet_error(lambda: verify(path))
    assert found is None or found.ok == (not found.faults)

    def apart() -> None:
        with contextlib.suppress(OSError):  # a hole that no disk takes
            split(path, back)

    for read in (frames, lines, lambda: stat(path), apart):
        _packet_error(read)
    shutil.rmtree(back, ignore_errors=True)
    path.unlink()


COMMANDS = (["cat"], ["cat", "--prefix"], ["cat", "--json"], ["verify"], ["verify", "--json"], ["stat"], ["split"])


FRAMERS: tuple[Callable[..., Framer], ...] = (
    partial(PrefixFramer, "!I"),
    partial(PrefixFramer, "<4sBH", magic=b"ABAC", digest="crc32"),
    OctetFramer,
    LineFramer,
)


def look_at_stream(data: bytes, which: int, pieces: Sequence[int] = ()) -> None:
    """Take packets out of a stream; the same ones however it is cut, and never more memory than was fed."""
    for on_error in ("close", "skip", "resync"):
        try:
            ways = [
                _packets(FRAMERS[which](max_packet=1000, on_error=on_error), _cut(data, way)) for way in ((), pieces)
            ]
        except ValueError:
            continue  # this framing cannot find its way back
        assert ways[0] == ways[1], "pieces make a difference"
        assert all(len(payload) <= 1000 for payload, _ in ways[0])


def _packets(framer: Framer, pieces: Iterable[bytes]) -> list[tuple[bytes, int]]:
    found: list[tuple[bytes, int]] = []
    with contextlib.suppress(PacketError):
        for piece in pieces:
            found += [(bytes(packet.payload), packet.offset) for packet in framer.feed(piece)]
            assert framer.held_bytes <= 4 * 1000 + (256 << 10), "more than a packet and what is received at once"
        found += [(bytes(packet.payload), packet.offset) for packet in framer.close()]
    return found


def look_at_message(data: bytes) -> None:
    """Read it as each message that one side may send to the other."""
    for read in (wire.read_hello, wire.read_known, wire.read_seen, wire.read_batch, wire.read_durable):
        _packet_error(partial(read, data))
    _packet_error(lambda: wire.check(wire.read_frame(data[1:]).header))


def look_at_commands(data: bytes, folder: Path) -> None:
    """Let each command that reads packet files read these bytes; it must end with one of its codes, and never else."""
    path = folder / "file.opk"
    path.write_bytes(data)
    handler = signal.getsignal(signal.SIGPIPE)
    for command in COMMANDS:
        options = ["--directory", str(folder / "back"), "--force"] if command == ["split"] else []
        code, errors = _run(["offload", *command, *options, str(path)])
        assert code in (0, 1, 3) or (command == ["split"] and code == 4), (command, code, errors)  # 4: a huge hole
        assert "Traceback" not in errors
    signal.signal(signal.SIGPIPE, handler)
    shutil.rmtree(folder / "back", ignore_errors=True)
    path.unlink()


def _run(command: list[str]) -> tuple[Any, str]:
    argv, sys.argv = sys.argv, command
    out, errors = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            cli.main()
    except SystemExit as exc:
        return exc.code, errors.getvalue()
    finally:
        sys.argv = argv
    raise AssertionError("main() returned")


def _decoded(data: bytes, pieces: Sequence[int]) -> tuple[list[Frame], list[Damage]]:
    damage: list[Damage] = []
    decoder = PacketDecoder(on_damage=damage.append)
    frames: list[Frame] = []
    for piece in _cut(data, pieces):
        frames += decoder.feed(piece)
        assert decoder.pending <= len(data)
    return frames + decoder.close(), damage


def _strict(data: bytes, pieces: Sequence[int]) -> None:
    decoder = PacketDecoder()
    with contextlib.suppress(PacketError):
        for piece in _cut(data, pieces):
            decoder.feed(piece)
        decoder.close()


def _cut(data: bytes, pieces: Sequence[int]) -> Iterator[bytes]:
    at = 0
    for size in pieces:
        yield data[at : at + size]
        at += size
    yield data[at:]


def _packet_error(read: Callable[[], Any]) -> Any:
    """What it gives, or None where it raises what it may."""
    try:
        return read()
    except PacketError as exc:
        if exc.offset < 0:
            raise AssertionError("an error before the file's start") from exc
        return None


def _all(items: Iterable[object]) -> None:
    list(items)


def _faults(ledger: Ledger, frame: Frame, raw: bytes) -> None:
    list(ledger.faults(frame))
    ledger.apply(frame.header, frame.payload, raw, frame.offset)


def memory() -> str | None:
    """Where files cost no disk; None: there is no such place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
